"""Text and rates from the chunks of generate."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from esparse_jax.inference import TextStream, TokenRate
from esparse_jax.inference import stream as stream_room

TEXT = "Schöne Grüße, 東京 — 🙂🙂 ok."


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a byte, as byte-level tokenizers spell them or as LLaMA's fallback does; <s> is 1.

    The fallback one has words as well, with the space before them inside.
    """
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<unk>": 0, "<s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        merges = [("▁", "o"), ("▁o", "k"), ("▁", "b"), ("▁b", "i"), ("▁bi", "g")]
        names = ["<unk>", "<s>", *"▁okbig.", *("".join(merge) for merge in merges)]
        names += [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = {name: i for i, name in enumerate(names)}
        made = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
        )
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


def pieces(stream: TextStream, tokens: list[int], size: int) -> list[str]:
    chunks = [np.array(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [stream.add(chunk) for chunk in chunks]


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_characters_of_several_tokens_are_given_out_whole(size):
    codes = tokenizer("bytes")
    stream = TextStream(codes, "Hallo ")
    tokens = codes(TEXT)["input_ids"]
    assert len(tokens) == len(TEXT.encode())
    given = pieces(stream, tokens, size)
    assert "".join(given) == TEXT == stream.text
    assert not any("\ufffd" in piece for piece in given)
    assert stream.finish() == ""
    assert stream.tokens == tokens
    if size == 1:
        assert given.count("🙂") == 2
        assert given[:7] == ["S", "c", "h", "", "ö", "n", "e"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_bytes_of_the_fallback_and_spaces_of_words(size):
    codes = tokenizer("fallback")
    number = codes.get_vocab()
    stream = TextStream(codes, "ok")
    assert stream.prompt_tokens == [number["▁ok"]]
    tokens = [number["▁big"], number["▁ok"]]
    tokens += [number[f"<0x{byte:02X}>"] for byte in "é🙂".encode()]
    tokens += [number["▁"], number["▁big"], number["."]]
    given = pieces(stream, tokens, size)
    assert "".join(given) == " big oké🙂  big." == stream.text
    assert not any("\ufffd" in piece for piece in given)


def test_what_is_never_completed_comes_at_the_end():
    codes = tokenizer("bytes")
    stream = TextStream(codes, "a")
    tokens = codes("xé")["input_ids"]
    assert pieces(stream, tokens[:-1], 1) == ["x", ""]
    assert stream.text == "x"
    assert stream.finish() == "\ufffd"
    assert stream.text == "x\ufffd"


def test_special_tokens_are_not_text():
    codes = tokenizer("bytes")
    stream = TextStream(codes, "a")
    assert stream.add(np.array([1])) == ""
    assert stream.add(np.array(codes("b")["input_ids"])) == "b"
    assert stream.add(np.array([], np.int32)) == ""


def test_the_rate_leaves_compilation_out_where_it_can(monkeypatch):
    times = iter([0.0, 5.0, 8.0, 9.0, 11.0])
    monkeypatch.setattr(stream_room.time, "perf_counter", lambda: next(times))
    rate = TokenRate()
    assert rate.as_dict() == {"tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0}
    rate.add(2)
    assert rate.tokens_per_second == 2 / 5
    rate.add(32)
    assert rate.summary() == "34 tokens in 8.0 s, 4.2 tokens/s (compilation included)"
    rate.add(32)
    rate.add(16)
    assert rate.tokens_per_second == 48 / 3
    assert rate.summary() == "82 tokens in 11.0 s (compilation included), then 16.0 tokens/s"
    assert rate.as_dict() == {"tokens": 82, "seconds": 11.0, "tokens_per_second": 16.0}
