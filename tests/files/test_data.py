import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import VOCAB, text, tiny_checkpoint

from esparse_jax.files import (
    calibration_windows,
    evaluation_windows,
    load_tokenizer,
    read_prompts,
    read_text_tokens,
    window_length,
)

WINDOWS = np.arange(60, dtype=np.uint16).reshape(6, 10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def document(tmp_path) -> Path:
    file = tmp_path / "document.txt"
    file.write_text(text(400), encoding="utf-8")
    return file


def ids(tokenizer, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def documents(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": t, "id": 3}) + "\n" for t in texts))
    return file


def draw(file: Path, tokenizer=None, samples: int = 4, length: int = 8, seed: int = 0, **options):
    return calibration_windows(
        file, tokenizer, num_samples=samples, sequence_length=length, seed=seed, **options
    )


def occurrences(stream, window) -> int:
    stream, window = np.asarray(stream), np.asarray(window)
    parts = np.lib.stride_tricks.sliding_window_view(stream, len(window))
    return int((parts == window).all(axis=1).sum())


def test_windows_of_a_text_are_its_tokens_at_the_offsets_of_pcg64(document, tokenizer):
    stream = np.array(ids(tokenizer, document.read_text()))
    windows = draw(document, tokenizer, samples=50, seed=3)
    assert (windows.shape, windows.dtype) == ((50, 8), np.int32)
    offsets = np.random.Generator(np.random.PCG64(3)).integers(0, len(stream) - 7, size=50)
    np.testing.assert_array_equal(windows, [stream[o : o + 8] for o in offsets])
    np.testing.assert_array_equal(windows, draw(document, tokenizer, samples=50, seed=3))
    assert (windows != draw(document, tokenizer, samples=50, seed=4)).any()
    assert not np.isin(windows, [1, 2]).any()  # no special tokens


def test_a_text_of_one_window(document, tokenizer):
    stream = ids(tokenizer, document.read_text())
    np.testing.assert_array_equal(draw(document, tokenizer, 2, len(stream)), [stream, stream])
    with pytest.raises(
        ValueError, match=rf"document\.txt has {len(stream)} tokens, fewer than one window of"
    ):
        draw(document, tokenizer, 2, len(stream) + 1)


def test_windows_of_documents(tmp_path, tokenizer):
    texts = [text(60, seed) for seed in range(5)] + ["so"]
    file = documents(tmp_path / "documents.jsonl", *texts)
    file.write_text(file.read_text().replace("\n", "\n\n", 1))  # an empty line is no document
    streams = [ids(tokenizer, t) for t in texts]
    windows = draw(file, tokenizer, samples=15, length=20)
    found = [[i for i in range(5) if occurrences(streams[i], w)] for w in windows]
    assert all(len(origin) == 1 for origin in found)
    # Each long document once before any comes twice.
    order = [origin[0] for origin in found]
    for start in (0, 5, 10):
        assert sorted(order[start : start + 5]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert len({tuple(w) for w in windows}) == 15  # at other offsets
    np.testing.assert_array_equal(windows, draw(file, tokenizer, samples=15, length=20))
    assert (windows != draw(file, tokenizer, samples=15, length=20, seed=1)).any()


def test_documents_that_are_too_short(tmp_path, tokenizer):
    file = documents(tmp_path / "documents.jsonl", "so", "the sparse model")
    longest = len(ids(tokenizer, "the sparse model"))
    with pytest.raises(
        ValueError, match=f"None of the 2 documents .* has 30 tokens.* longest has {longest}"
    ):
        draw(file, tokenizer, length=30)


def test_documents_without_text_name_their_line(tmp_path, tokenizer):
    file = documents(tmp_path / "documents.jsonl", "a", "b")
    good = file.read_text()
    for line, message in (
        ('{"body": "c", "id": 1}', r"line 3 has no text in a field 'text' \(it has: body, id\)"),
        ('{"text": 7}', r"line 3 has no text in a field 'text' \(it has: text\)"),
        ("[1]", r"line 3 has no text in a field 'text' \(it has: list\)"),
        ("{oops", r"line 3 is not valid JSON"),
    ):
        file.write_text(f"{good}{line}\n")
        with pytest.raises(ValueError, match=message):
            draw(file, tokenizer)
    for empty in ("", "\n\n"):
        file.write_text(empty)
        with pytest.raises(ValueError, match=r"documents\.jsonl is empty"):
            draw(file, tokenizer)


@pytest.mark.parametrize("name", ["windows.npy", "only.npz", "named.npz"])
def test_token_windows(tmp_path, name):
    file = tmp_path / name
    if name == "windows.npy":
        np.save(file, WINDOWS)
    elif name == "only.npz":
        np.savez(file, whatever=WINDOWS)
    else:
        np.savez(file, tokens=WINDOWS, other=np.zeros(3))
    np.testing.assert_array_equal(draw(file, samples=6, length=10), WINDOWS)
    chosen = draw(file, samples=4, length=10, seed=1)
    assert chosen.dtype == np.int32
    rows = chosen[:, 0] // 10
    np.testing.assert_array_equal(chosen, WINDOWS[rows])
    assert (np.diff(rows) > 0).all()  # each at most once, in the order of the file
    assert any((draw(file, samples=4, length=10, seed=s) != chosen).any() for s in range(2, 6))
    shorter = draw(file, samples=6, length=3)
    np.testing.assert_array_equal(shorter, shorter[:, :1] + np.arange(3))
    np.testing.assert_array_equal(shorter // 10, np.repeat(np.arange(6)[:, None], 3, axis=1))
    assert len(set(shorter[:, 0] % 10)) > 1
    for samples, length in ((7, 10), (6, 11)):
        with pytest.raises(
            ValueError, match=f"has 6 windows of 10 tokens, and {samples} of {length}"
        ):
            draw(file, samples=samples, length=length)


def test_arrays_that_are_no_token_windows(tmp_path):
    file = tmp_path / "a.npy"
    np.save(file, np.arange(9))
    with pytest.raises(ValueError, match=r"array of shape \(9,\); it must be \[sample, seq\] and"):
        draw(file)
    np.save(file, np.zeros((0, 4), int))
    with pytest.raises(ValueError, match=r"shape \(0, 4\); it must be"):
        draw(file)
    np.save(file, np.zeros((4, 8)))
    with pytest.raises(TypeError, match="holds float64; token ids must be integers"):
        draw(file)
    file.write_bytes(b"not numpy")
    with pytest.raises(ValueError, match="cannot be read as a numpy file: it begins with"):
        draw(file)
    np.savez(tmp_path / "b.npz", a=WINDOWS, b=WINDOWS)
    with pytest.raises(ValueError, match="holds the arrays a, b; it must hold one array, or one"):
        draw(tmp_path / "b.npz")


def test_ids_outside_the_vocabulary(tmp_path, document, tokenizer):
    file = tmp_path / "windows.npy"
    np.save(file, WINDOWS)
    with pytest.raises(ValueError, match="token ids from 0 to 59, but the vocabulary has ids 0 to"):
        draw(file, samples=6, length=10, vocab_size=59)
    draw(file, samples=6, length=10, vocab_size=60)
    np.save(file, WINDOWS + 100)
    with pytest.raises(ValueError, match=f"ids 0 to {VOCAB - 1}. The tokens were made with ano"):
        draw(file, tokenizer, samples=6, length=10)
    np.save(file, WINDOWS.astype(int) - 1)
    with pytest.raises(ValueError, match="token ids from -1 to 58"):
        read_text_tokens(file, None, vocab_size=60)
    with pytest.raises(ValueError, match="has ids 0 to 9"):
        read_text_tokens(document, tokenizer, vocab_size=10)


def test_files_that_cannot_be_text(tmp_path, document, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere\.txt\. Give a text"):
        draw(tmp_path / "nowhere.txt", tokenizer)
    with pytest.raises(TypeError, match=r"holds text, and the checkpoint has no tokenizer"):
        draw(document, None)
    (tmp_path / "a.txt").write_text(" \n")
    for read in (draw, read_text_tokens):
        with pytest.raises(ValueError, match=r"a\.txt is empty\. Give a file with text"):
            read(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(.* at byte 3\)\. Convert it"):
        draw(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not read here\. Give a text"):
        draw(tmp_path / "a.parquet", tokenizer)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 0}])
def test_counts_must_be_positive(document, tokenizer, wrong):
    with pytest.raises(ValueError, match="is 0; it must be at least 1"):
        draw(document, tokenizer, **wrong)


def test_raw_is_the_file_as_it_is(tmp_path, tokenizer):
    file = tmp_path / "raw.txt"
    string = " the sparse\r\n\r\n model \n keeps\ttwo \n"
    file.write_bytes(string.encode())
    tokens = read_text_tokens(file, tokenizer)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, ids(tokenizer, string))


def test_published_joins_the_rows_of_the_data_set_behind_one_bos(tmp_path, tokenizer):
    file = tmp_path / "wiki.raw"
    # The data set's rows, as its loader makes them: lines with their end, blank lines empty.
    rows = ["", " = the sparse = \n", "", " model \n", " keeps two \n", ""]
    file.write_text(" \n = the sparse = \n \n model \n keeps two \n \n")
    expected = [tokenizer.bos_token_id, *ids(tokenizer, "\n\n".join(rows))]
    tokens = read_text_tokens(file, tokenizer, protocol="published")
    np.testing.assert_array_equal(tokens, expected)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(read_text_tokens(file, tokenizer, protocol="published"), expected)
    assert not np.array_equal(read_text_tokens(file, tokenizer), expected)


def test_documents_are_rows_of_a_data_set(tmp_path, tokenizer):
    file = documents(tmp_path / "documents.jsonl", "the sparse model\n", "keeps two", "")
    expected = ids(tokenizer, "the sparse model\n\n\nkeeps two\n\n")
    np.testing.assert_array_equal(read_text_tokens(file, tokenizer), expected)
    published = read_text_tokens(file, tokenizer, protocol="published")
    np.testing.assert_array_equal(published, [tokenizer.bos_token_id, *expected])
    assert window_length(file) is None
    file.write_text('{"tekst": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 has no text in a field 'text' \(it has: tekst"):
        read_text_tokens(file, tokenizer)
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"documents\.jsonl is empty"):
        read_text_tokens(file, tokenizer)


def test_published_needs_a_text_and_a_bos(tmp_path, document):
    np.save(tmp_path / "a.npy", WINDOWS)
    with pytest.raises(ValueError, match="holds tokens, so nothing is left to join: protocol 'pub"):
        read_text_tokens(tmp_path / "a.npy", None, protocol="published")
    without = load_tokenizer(tiny_checkpoint(tmp_path / "tiny", bos_token_id=None))
    with pytest.raises(ValueError, match="puts a BOS before the text, and this tokenizer has none"):
        read_text_tokens(document, without, protocol="published")
    with pytest.raises(ValueError, match="protocol is 'wanda'; it must be one of raw, published"):
        read_text_tokens(document, without, protocol="wanda")


def test_evaluation_windows_are_consecutive_and_drop_the_remainder(tmp_path):
    for array in (WINDOWS, WINDOWS.ravel()):
        np.save(tmp_path / "a.npy", array)
        tokens = read_text_tokens(tmp_path / "a.npy", None)
        np.testing.assert_array_equal(tokens, np.arange(60))
    windows = evaluation_windows(tokens, 8)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, np.arange(56).reshape(7, 8))
    with pytest.raises(ValueError, match="has 60 tokens, fewer than one window of 61"):
        evaluation_windows(tokens, 61)
    with pytest.raises(ValueError, match="sequence_length is 1; a window needs at least 2"):
        evaluation_windows(tokens, 1)


def test_stored_windows_say_how_long_they_are(tmp_path, document):
    np.save(tmp_path / "rows.npy", WINDOWS)
    np.savez(tmp_path / "stream.npz", WINDOWS.ravel())
    assert window_length(tmp_path / "rows.npy") == 10
    assert window_length(tmp_path / "stream.npz") is None
    assert window_length(document) is None
    with pytest.raises(FileNotFoundError, match="There is no file"):
        window_length(tmp_path / "absent.npy")


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("  one \r\n\r\n\t\nzw\u2028ei\nthree".encode())
    assert read_prompts(file) == ["  one ", "zw\u2028ei", "three"]
    file.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt is empty"):
        read_prompts(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(.*\)\. Convert it\.$"):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match="Give a text file, one prompt a line"):
        read_prompts(tmp_path)


def test_a_path_in_place_of_tokens_is_told_who_reads_it():
    untyped = inspect.unwrap(evaluation_windows)  # the annotations refuse it first
    with pytest.raises(TypeError, match=r"got str\. read_text_tokens makes one of a file"):
        untyped("valid.txt", 4)
