"""Tokenize texts without documents: many at a time, and a text together with its continuation.

Most tokenizers spell "prompt" + "completion" if both are tokenized separately. Those in the manner of SentencePiece
begin a text with a space, "▁": the completion would get one that nobody wrote, "prompt" + " completion".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerFast

from bigbatch.lm.data.tokenizer import AnyTokenizer

_PLAIN_ENCODE = PreTrainedTokenizerFast._encode_plus


@dataclass(frozen=True)
class JoinedTexts:
    """Which continuations a tokenizer spells only as a part of the whole text.

    Attributes:
        before_space: Those that begin with a space.
        before_other: All others.
    """

    before_space: bool = False
    before_other: bool = False

    @classmethod
    def of(cls, tokenizer: AnyTokenizer) -> JoinedTexts:
        """Compare, for a letter, the decoded tokens of a whole and of its parts; a tokenizer without letters has none.

        The tokens are decoded, because those of a whole may be others without a space between the parts.
        """
        for letter in _letters(tokenizer):
            others = [letter, letter + letter, f" {letter}", f"{letter} {letter}"]
            first, whole, spaced, spaced_whole = tokenize_texts(tokenizer, others)
            unknown = tokenizer.unk_token_id
            if all(ids and unknown not in ids for ids in (first, whole, spaced, spaced_whole)):

                def differ(tokens: list[int], joined: list[int]) -> bool:
                    return _decoded(tokenizer, tokens) != _decoded(tokenizer, joined)

                return cls(differ(first + spaced, spaced_whole), differ(first + first, whole))
        return cls()

    def __bool__(self) -> bool:
        """Whether there are such continuations."""
        return self.before_space or self.before_other

    def has(self, continuation: str) -> bool:
        """Return whether a continuation is one of them."""
        return self.before_space if continuation.startswith(" ") else self.before_other


def releases_gil(tokenizer: AnyTokenizer) -> bool:
    """Return whether texts are tokenized outside of Python."""
    return getattr(type(tokenizer), "_encode_plus", None) is _PLAIN_ENCODE


def tokenize_texts(tokenizer: AnyTokenizer, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """Return the tokens of each text, without truncation; with the special tokens that the tokenizer adds, or none."""
    if not texts:
        return []
    if releases_gil(tokenizer):
        backend: Any = tokenizer.backend_tokenizer  # as transformers calls it, without its work for each text
        if backend.truncation is not None:  # set only what differs: other threads may encode with it
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != tokenizer.split_special_tokens:
            backend.encode_special_tokens = tokenizer.split_special_tokens
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
    # verbose=False: transformers would warn about texts longer than the model supports; they are cut later.
    found: Any = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = found["input_ids"]
    return ids


def num_shared(prompt: list[int], whole: list[int]) -> int:
    """Return how many tokens both begin with.

    These are the tokens of the prompt: a token of the whole that has characters of both sides is not among them.
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))


def _letters(tokenizer: AnyTokenizer) -> Iterable[str]:
    """Yield letters to try: "a", which most tokenizers have, then those of the vocabulary."""
    yield "a"
    known = tokenizer.get_vocab()
    yield from sorted(token for token in known if len(token) == 1 and token.isalpha())[:100]


def _decoded(tokenizer: AnyTokenizer, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
