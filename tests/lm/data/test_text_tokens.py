"""Prompt and completion are spelled without a space between them that nobody wrote, by every kind of tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.records import to_document
from bigbatch.lm.data.text_tokens import JoinedTexts
from bigbatch.lm.data.token_store.build import Tokenization
from bigbatch.lm.data.token_store.cache import Cache
from bigbatch.lm.data.token_store.workers import Encoding
from bigbatch.lm.data.tokenization import encode_documents
from bigbatch.lm.data.tokenizer import train_tokenizer

TEXTS = ["abab What is the capital of France? Paris Paris Answer: 1 2 3 4"] * 9
ALPHABET = [*map(chr, range(33, 127)), "▁", "\n"]
BYTE_LEVEL = train_tokenizer(TEXTS, vocabulary_size=340)
PAIRS = [("What is 1", "234"), ("Answer:", " Paris."), ("Answer: ", "Paris"), ("", "Paris"), ("a\n", "b")]


def sentencepiece(*, normalizer: Any = None, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that writes spaces as ▁."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    return sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


LLAMA_2 = sentencepiece(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))
METASPACE = {scheme: metaspace(scheme) for scheme in ("first", "always", "never")}


def plain(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def parts(record: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the completion, without special tokens."""
    (found,) = encode_documents([to_document(record, "a:1")], tokenizer)
    start = found.trained.index(1)
    masked = [token for token in found.tokens[:start] if token != tokenizer.bos_token_id]
    assert found.tokens[-1] == tokenizer.eos_token_id
    assert all(found.trained[start:])
    return masked, found.tokens[start:-1]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA_2, *METASPACE.values()])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_spell_the_record(tokenizer: Any, prompt: str, completion: str) -> None:
    masked, trained = parts({"prompt": prompt, "completion": completion}, tokenizer)
    assert tokenizer.decode(masked + trained) == tokenizer.decode(plain(prompt + completion, tokenizer))
    assert tokenizer.decode(masked + trained) == prompt + completion


@pytest.mark.parametrize("tokenizer", [LLAMA_2, METASPACE["first"]])
def test_output_follows_instruction_without_space(tokenizer: Any) -> None:
    masked, trained = parts({"instruction": "What", "output": "Paris"}, tokenizer)
    assert tokenizer.decode(masked + trained).endswith(":\nParis")


def test_token_of_both_sides_is_trained() -> None:
    masked, trained = parts({"prompt": "of Fr", "completion": "ance"}, LLAMA_2)
    assert masked + trained == plain("of France", LLAMA_2)
    assert LLAMA_2.convert_ids_to_tokens(masked) == ["▁of▁"]
    assert LLAMA_2.convert_ids_to_tokens(trained) == ["Fran", "ce"]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "completion"),
    [
        (BYTE_LEVEL, "ab", "ab"),
        (METASPACE["never"], "ab", "ab"),
        (METASPACE["first"], "Answer:", " Paris."),
        (METASPACE["first"], "Answer: ", " Paris."),
    ],
)
def test_completion_without_added_space_keeps_its_tokens(tokenizer: Any, prompt: str, completion: str) -> None:
    alone = plain(prompt, tokenizer), plain(completion, tokenizer)
    assert parts({"prompt": prompt, "completion": completion}, tokenizer) == alone


def test_byte_level_tokens_would_join_without_rule() -> None:
    assert plain("abab", BYTE_LEVEL) != 2 * plain("ab", BYTE_LEVEL)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (BYTE_LEVEL, JoinedTexts()),
        (METASPACE["never"], JoinedTexts()),
        (METASPACE["first"], JoinedTexts(before_other=True)),
        (METASPACE["always"], JoinedTexts(before_other=True)),
        (LLAMA_2, JoinedTexts(before_space=True, before_other=True)),
    ],
)
def test_probe_finds_tokenizers_that_add_space(tokenizer: Any, expected: JoinedTexts) -> None:
    assert JoinedTexts.of(tokenizer) == expected


def test_tokenizer_without_known_letters_joins_nothing() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "sea": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    assert not JoinedTexts.of(tokenizer)


@pytest.mark.parametrize(("tokenizer", "is_same"), [(BYTE_LEVEL, True), (LLAMA_2, False)])
def test_cached_tokens_of_separate_texts_are_left_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, is_same: bool
) -> None:
    corpus = Corpus(lambda reading: iter([Document("a:1", prompt="What is 1", completion="234")] * 3), state=list)

    def store() -> Path:
        return Tokenization(Encoding(tokenizer), Cache(tmp_path)).store(corpus)[0]

    now = store()
    monkeypatch.setattr(JoinedTexts, "of", lambda tokenizer: JoinedTexts())
    assert (store() == now) is is_same
