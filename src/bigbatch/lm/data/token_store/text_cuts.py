"""Where a long text may be cut, so that the tokens of its pieces are those of the whole.

text → places after lines, or between words → those where the tokenizer, too, separates both sides
"""

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from typing import Any

from bigbatch.lm.data.pair_encoding import PairEncoder
from bigbatch.lm.data.tokenization import DocumentEncoder

_MOST_TRIES = 1000  # lines, and words, after which a text without a place to cut is not cut any more
_CONTEXT = 256  # characters on each side of a cut that are tokenized with and without it
# Never within white space: a tokenizer may count a run of it from its beginning, however far that is.
_BETWEEN_LINES = re.compile(r"(?<=\S)\n(?=\S)")
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)")


class TextCutter:
    """Finds places to cut texts.

    Args:
        encoder: Of the texts.
    """

    def __init__(self, encoder: DocumentEncoder | PairEncoder) -> None:
        self._encoder = encoder

    def cuts(self, text: str, *, every: int) -> Iterator[int]:
        """Yield the places to cut a text, about ``every`` characters apart; none, or fewer, if they are not found."""
        place = every
        while (found := self._next(text, place)) is not None:
            yield found
            place = found + every

    def _next(self, text: str, start: int) -> int | None:
        """Return the first place after ``start``: after a line, if one of the next ends there, or a word."""
        for between in _BETWEEN_LINES, _BETWEEN_WORDS:
            for match in islice(between.finditer(text, start), _MOST_TRIES):
                place = match.end()
                if self._is_cut(text[max(0, place - _CONTEXT) : place], text[place : place + _CONTEXT]):
                    return place
        return None

    def _is_cut(self, before: str, after: str) -> bool:
        """Return whether the tokens of a text cannot depend on both parts, of which these are the end and the start.

        That is so if the pre-tokenizer cuts it there; or if nothing does, between lines that no token can join.
        """
        if not self._encoder.releases_gil:
            return False
        together, first, second = (self._words(text) for text in (before + after, before, after))
        is_one_word = len(together) == len(first) == len(second) == 1
        if together != first + second and not (is_one_word and before.endswith("\n") and not self._joins_lines):
            return False
        _, (tokens, *alone), _ = self._encoder.texts([before + after, before, after])
        return tokens == list(chain.from_iterable(alone))

    def _words(self, text: str) -> list[str]:
        """Return the parts of a text that are tokenized each on its own."""
        backend: Any = self._encoder.tokenizer.backend_tokenizer
        normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is None:
            return [normalized]
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]

    @cached_property
    def _joins_lines(self) -> bool:
        """Whether a token has a line's end, as such or as the letter of its byte, before something else."""
        return any(re.search("[\nĊ][^\nĊ]", token) for token in self._encoder.tokenizer.get_vocab())
