"""What `generate` hands out chunk by chunk, as text and as a rate."""

import time
from typing import Any

import numpy as np
from jaxtyping import Int


class TextStream:
    """The text of one row of `generate`, decoded while its tokens come.

    One token by itself is no text: a character may take several, and whether a word has a space
    before it depends on what it follows. So the whole sequence is decoded each time, prompt
    included, and what is new at its end is given out; not yet what an incomplete character
    decodes to.

    Args:
        tokenizer: Of transformers.
        prompt: The text to continue.

    Attributes:
        prompt: As given.
        prompt_tokens: Its token ids, with what the tokenizer puts before them.
        tokens: The new token ids so far.
        text: The new text so far; after `finish`, all of it.
    """

    def __init__(self, tokenizer: Any, prompt: str):
        self.prompt = prompt
        self.prompt_tokens: list[int] = list(tokenizer(prompt)["input_ids"])
        self.tokens: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._before = self._decode(self.prompt_tokens)

    def add(self, tokens: Int[np.ndarray, " token"]) -> str:
        """The new text that the next tokens complete."""
        self.tokens += tokens.tolist()
        text = self._whole().rstrip("\ufffd")
        if not text.startswith(self.text):
            # A byte of the next character makes the one before it illegible to some decoders.
            return ""
        more, self.text = text[len(self.text) :], text
        return more

    def finish(self) -> str:
        """The rest, when no more tokens come; an incomplete character as the decoder shows it."""
        text = self._whole()
        more, self.text = text[_common(text, self.text) :], text
        return more

    def _whole(self) -> str:
        whole = self._decode(self.prompt_tokens + self.tokens)
        return whole[_common(whole, self._before) :]

    def _decode(self, tokens: list[int]) -> str:
        # Cleaning up would take back spaces that were given out already.
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _common(a: str, b: str) -> int:
    """How many characters two texts share at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


class TokenRate:
    """How fast the tokens of a `generate` call come, from its making on.

    The first chunk comes from the prefill, the second from the first decode step; both compile.
    Where there are more, the rate is that of those.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._chunks: list[tuple[float, int]] = []

    def add(self, tokens: int) -> None:
        """Counts the tokens of a chunk that has just come."""
        self._chunks.append((time.perf_counter(), tokens))

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self._chunks)

    @property
    def seconds(self) -> float:
        """Until the last chunk."""
        return self._chunks[-1][0] - self._started if self._chunks else 0.0

    @property
    def compiled(self) -> bool:
        """Whether the rate leaves the chunks out that compile."""
        return sum(tokens for _, tokens in self._chunks[2:]) > 0

    @property
    def tokens_per_second(self) -> float:
        if self.compiled:
            tokens = sum(tokens for _, tokens in self._chunks[2:])
            return tokens / (self._chunks[-1][0] - self._chunks[1][0])
        return self.tokens / self.seconds if self.tokens else 0.0

    def summary(self) -> str:
        """A line for a person."""
        rate, included = f"{self.tokens_per_second:.1f} tokens/s", "(compilation included)"
        which = f" {included}, then {rate}" if self.compiled else f", {rate} {included}"
        return f"{self.tokens} tokens in {self.seconds:.1f} s{which}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
