"""Every token to learn is a label exactly once, masks are where they belong, and the split is by content."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.errors import InputError
from bigbatch.lm.data.dataset import IGNORED, TokenDataset, collate, encode, split_documents
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.token_store.reader import MemoryTokens
from bigbatch.lm.data.token_store.samples import make_samples
from bigbatch.lm.data.token_store.writer import Block
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.data.validation_split import HashSplit

TOKENIZER = train_tokenizer(["the quick brown fox and the quick brown hen"] * 4, vocabulary_size=280)
BEGIN, END, PAD = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
SHORT = st.text(max_size=12)


def tokenizer_with(**changes: Any) -> Any:
    """Return a tokenizer of its own whose attributes are changed."""
    changed = train_tokenizer([], vocabulary_size=259)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def conversation(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))


DOCUMENTS = st.lists(
    st.one_of(
        SHORT.filter(str.strip).map(lambda text: Document("t", text=text)),
        st.tuples(SHORT, SHORT).map(lambda pair: Document("p", prompt=pair[0], completion=pair[1])),
        st.lists(SHORT, min_size=2, max_size=6).map(lambda turns: Document("m", messages=conversation(*turns))),
    ),
    max_size=6,
)


def plain(text: str, tokenizer: Any = TOKENIZER) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def only_sample(document: Document, tokenizer: Any = TOKENIZER) -> tuple[list[int], list[int]]:
    dataset, _ = encode([document], tokenizer, max_length=10_000)
    assert len(dataset) == 1
    return dataset[0]["input_ids"].tolist(), dataset[0]["labels"].tolist()


@settings(deadline=None)
@given(documents=DOCUMENTS, max_length=st.integers(1, 9))
def test_every_token_to_learn_is_labelled_once(documents: list[Document], max_length: int) -> None:
    dataset, counts = encode(documents, TOKENIZER, max_length=max_length)
    whole, uncut = encode(documents, TOKENIZER, max_length=10**6)
    assert len(whole) == len(documents)
    pieces = iter(dataset[i] for i in range(len(dataset)))
    learned = []
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
        assert len(sample["input_ids"]) == len(sample["labels"]) == dataset.lengths[i] <= max_length
        is_label = sample["labels"] != IGNORED
        assert dataset.label_counts[i] == int(is_label.sum()) >= 1
        learned += sample["labels"][is_label].tolist()
        follows = sample["input_ids"][1:][is_label[:-1]].tolist()
        assert follows == sample["labels"][:-1][is_label[:-1]].tolist()
    assert learned == [int(label) for i in range(len(whole)) for label in whole[i]["labels"] if label != IGNORED]
    for i in range(len(whole)):  # the pieces with labels, in order, are those of the document
        for start in range(0, int(whole.lengths[i]), max_length):
            labels = whole[i]["labels"][start : start + max_length]
            if (labels != IGNORED).any():
                piece = next(pieces)
                assert torch.equal(piece["labels"], labels)
                assert torch.equal(piece["input_ids"], whole[i]["input_ids"][start : start + max_length])
    assert int(dataset.label_counts.sum()) == len(learned) == counts.label_tokens == uncut.label_tokens


@settings(deadline=None)
@given(documents=DOCUMENTS, max_length=st.integers(1, 9))
def test_only_unlabelled_chunks_are_dropped_and_counted(documents: list[Document], max_length: int) -> None:
    dataset, counts = encode(documents, TOKENIZER, max_length=max_length)
    whole, uncut = encode(documents, TOKENIZER, max_length=10**6)
    inputs = whole.lengths.tolist()
    assert counts.samples + counts.masked_pieces_left_out == sum(-(-length // max_length) for length in inputs)
    assert counts.cut_documents == sum(length > max_length for length in inputs)
    assert counts.tokens == uncut.tokens == sum(inputs) + len(documents)
    assert (counts.documents, counts.samples) == (len(documents), len(dataset))
    assert (uncut.samples, uncut.cut_documents, uncut.masked_pieces_left_out) == (len(documents), 0, 0)


def test_text_is_labelled_up_to_end_token() -> None:
    inputs, labels = only_sample(Document("a", text="the quick é"))
    assert inputs == [BEGIN, *plain("the quick é")]
    assert labels == [*plain("the quick é"), END]


def test_first_token_is_predicted_without_begin_token() -> None:
    from tokenizers import processors

    with_begin = tokenizer_with()
    with_begin.backend_tokenizer.post_processor = processors.Sequence([])
    assert with_begin("ab")["input_ids"] == plain("ab", with_begin)
    assert only_sample(Document("a", text="ab"), with_begin) == (
        [with_begin.bos_token_id, *plain("ab", with_begin)],
        [*plain("ab", with_begin), with_begin.eos_token_id],
    )
    without = tokenizer_with(bos_token=None)
    without.backend_tokenizer.post_processor = processors.Sequence([])
    assert only_sample(Document("a", text="ab"), without)[0] == [without.eos_token_id, *plain("ab", without)]
    # A prompt begins as generation will begin it; an empty one still needs something to predict from.
    assert only_sample(Document("a", prompt="ab", completion="c"), without)[0] == plain("abc", without)
    assert only_sample(Document("a", prompt="", completion="c"), without) == (
        [without.eos_token_id, *plain("c", without)],
        [*plain("c", without), without.eos_token_id],
    )


def test_end_token_of_tokenizer_is_not_doubled() -> None:
    from tokenizers import processors

    tokenizer = tokenizer_with()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", pair=None, special_tokens=ends
    )
    assert only_sample(Document("a", text="ab"), tokenizer) == (
        [tokenizer.bos_token_id, *plain("ab", tokenizer)],
        [*plain("ab", tokenizer), tokenizer.eos_token_id],
    )
    inputs, _ = only_sample(Document("a", prompt="ab", completion="c"), tokenizer)
    assert inputs == [tokenizer.bos_token_id, *plain("ab", tokenizer), *plain("c", tokenizer)]


def test_prompt_is_masked_and_completion_labelled() -> None:
    inputs, labels = only_sample(Document("a", prompt="the quick", completion=" brown"))
    prompt, completion = plain("the quick"), plain(" brown")
    assert inputs == [BEGIN, *prompt, *completion]
    assert labels == [IGNORED] * len(prompt) + [*completion, END]


def test_assistant_turns_are_labelled_with_end_tokens() -> None:
    # The second answer begins with a line break, which could merge with the one before it.
    turns = conversation("the quick", "brown 🦊", "and?", "\nthe hen", "bye")
    inputs, labels = only_sample(Document("a", messages=turns))
    rendered = TOKENIZER.apply_chat_template(list(turns), tokenize=False)
    assert TOKENIZER.decode([*inputs, labels[-1]] if labels[-1] != IGNORED else inputs) in rendered
    learned = [label for label in labels if label != IGNORED]
    assert TOKENIZER.decode(learned) == "brown 🦊<|end|>\nthe hen<|end|>"
    assert inputs[0] == BEGIN
    for position, label in enumerate(labels[:-1]):
        assert label in (IGNORED, inputs[position + 1])


def test_other_chat_template_is_masked_at_its_markers() -> None:
    tokenizer = tokenizer_with(
        chat_template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    inputs, labels = only_sample(Document("a", messages=conversation("q", " é ", "r", "s")), tokenizer)
    assert tokenizer.decode(inputs) == "<user>q</>\n<assistant>é</>\n<user>r</>\n<assistant>s</>"
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "é</>s</>"  # nothing after end marks


def test_mixed_documents_keep_order_across_batches() -> None:
    documents = [
        Document(str(i), text=f"text {i}")
        if i % 3 == 0
        else Document(str(i), prompt=f"p{i}", completion=f"c{i}")
        if i % 3 == 1
        else Document(str(i), messages=conversation(f"q{i}", f"a{i}"))
        for i in range(1203)
    ]
    calls: list[tuple[int, int]] = []
    dataset, _ = encode(documents, TOKENIZER, max_length=1000, progress=lambda *done: calls.append(done))
    assert len(dataset) == len(documents)
    for i, document in enumerate(documents):
        assert document.texts[-1] in TOKENIZER.decode(dataset[i]["input_ids"])
    assert calls == [(1000, 1203), (1203, 1203)]


def test_long_documents_are_cut_without_tokenizer_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(model_max_length=4)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        documents = [Document("a", text="x" * 50), Document("b", messages=conversation("y" * 50, "z" * 50))]
        dataset, counts = encode(documents, tokenizer, max_length=4)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert counts.cut_documents == 2
    assert max(dataset.lengths) == 4
    assert not caplog.records


def test_counts_are_one_line_naming_dropped_chunks() -> None:
    documents = [Document("a", text="ab"), Document("b", prompt="x" * 9, completion="y")]
    _, counts = encode(documents, tokenizer_with(), max_length=4)
    assert counts.describe() == (
        "2 documents with 16 tokens, 5 of them trained on; 2 sequences; 1 long document cut into pieces; "
        "2 pieces without training tokens left out"
    )


def test_no_documents_make_empty_dataset() -> None:
    dataset, counts = encode([], TOKENIZER, max_length=4)
    assert (len(dataset), len(dataset.lengths), len(dataset.label_counts), counts.tokens) == (0, 0, 0, 0)


def test_index_beyond_samples_raises_index_error() -> None:
    dataset, _ = encode([Document("a", text="the")], TOKENIZER, max_length=100)
    assert len(dataset) == 1
    with pytest.raises(IndexError):
        dataset[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chat_template": None},
            r"a\.jsonl:3: the data has conversations, and the tokenizer has no chat template .* --chat-template with",
        ),
        (
            {"chat_template": "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"},
            r"a\.jsonl:3: the chat template renders message 2 differently from how it begins an answer to generate: "
            r"'2a1b' and not '1a'\. Pass another",
        ),
        (
            {"chat_template": "{{ raise_exception('Roles must be polite.\nAlways.') }}"},
            r"a\.jsonl:3: the chat template rejects the conversation: Roles must be polite\. Pass --skip-broken to "
            r"leave out and count what is broken\.$",
        ),
        ({"chat_template": "{% for"}, r"a\.jsonl:3: the chat template rejects the conversation: "),
        (
            {"chat_template": "{{ messages[0]['content'] }}"},
            r"a\.jsonl:3: the chat template leaves out the content of message 2 \(assistant\)\. Remove it",
        ),
        ({"eos_token": None}, "the tokenizer has no end token"),
    ],
)
def test_tokenizer_unable_to_mask_conversations_is_rejected(changes: dict[str, Any], message: str) -> None:
    document = Document("a.jsonl:3", messages=conversation("a", "b", "c", "d"))
    with pytest.raises(InputError, match=message):
        encode([document], tokenizer_with(**changes), max_length=8)


def test_length_without_tokens_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"max_length=0 leaves no token in a sample\. Use at least 1\."):
        encode([], TOKENIZER, max_length=0)


def texts(number: int) -> list[Document]:
    return [Document(f"{i}.txt", text=f"document {i}") for i in range(number)]


@given(number=st.integers(2, 80), fraction=st.floats(0.001, 0.999), copies=st.integers(1, 3))
def test_split_loses_nothing_and_groups_equal_documents(number: int, fraction: float, copies: int) -> None:
    documents = texts(number) * copies
    training, validation = split_documents(documents, validation_fraction=fraction)
    assert training
    assert validation
    assert len(training) + len(validation) == len(documents)
    assert not {document.key for document in training} & {document.key for document in validation}
    assert training == [document for document in documents if document in training]


def test_split_depends_on_content_not_order() -> None:
    documents = texts(1000)
    _, validation = split_documents(documents, validation_fraction=0.1)
    assert 70 <= len(validation) <= 130
    _, reordered = split_documents(documents[::-1], validation_fraction=0.1)
    assert reordered == validation[::-1]
    _, more = split_documents(texts(1500), validation_fraction=0.1)
    assert more[: len(validation)] == validation


def test_nearest_document_moves_to_empty_side() -> None:
    documents = sorted(texts(3), key=lambda document: document.key)
    assert split_documents(documents, validation_fraction=1e-9) == (documents[1:], documents[:1])
    assert split_documents(documents, validation_fraction=1 - 1e-9) == (documents[2:], documents[:2])


def test_zero_fraction_holds_nothing_out() -> None:
    assert split_documents(texts(3), validation_fraction=0) == (texts(3), [])
    assert split_documents([], validation_fraction=0.5) == ([], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_fraction_out_of_range_is_rejected(fraction: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        split_documents(texts(3), validation_fraction=fraction)


def test_single_long_text_splits_off_last_lines() -> None:
    lines = [f"line {i}\u2028\n" for i in range(40)]
    document = Document("a.txt", text="".join(lines))
    training, validation = split_documents([document], validation_fraction=0.1)
    assert training == [Document("a.txt", text="".join(lines[:36]))]
    assert validation == [Document("a.txt:37", text="".join(lines[36:]))]
    for fraction in (1e-6, 0.999):
        training, validation = split_documents([document], validation_fraction=fraction)
        assert f"{training[0].text}{validation[0].text}" == document.text


@pytest.mark.parametrize(
    "documents",
    [
        [Document("a", text="line\n" * 19)],
        [Document("a", text="line\n" * 19 + "\n" * 20)],
        [Document("a", text="line\n" * 20), Document("b", text="line\n" * 20)],
        [Document("a", text="line\n" * 20)],
        [Document("a", prompt="line\n" * 40, completion="c")],
    ],
    ids=["short", "blank-end", "copies", "equal-halves", "prompt"],
)
def test_single_uncuttable_document_is_for_training(documents: list[Document]) -> None:
    assert split_documents(documents, validation_fraction=0.5) == (documents, [])


def test_unigram_entropy_equals_empirical_cross_entropy() -> None:
    documents = [Document("a", text="the quick brown fox"), Document("b", prompt="and the", completion=" brown hen")]
    dataset, _ = encode(documents, TOKENIZER, max_length=3)
    labels = torch.cat([dataset[i]["labels"] for i in range(len(dataset))])
    shares = torch.bincount(labels[labels != IGNORED], minlength=len(TOKENIZER)).double()
    logits = (shares / shares.sum()).log().expand(len(labels), -1)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED).item()
    assert dataset.unigram_entropy() == pytest.approx(expected, abs=1e-12)


def test_unigram_entropy_of_many_samples_is_that_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(f"a:{i}", text="value " * (1 + i % 7) + f"{i}") for i in range(40)]
    chosen = [documents[i * 40 // 8] for i in range(8)]
    some, _ = encode(chosen, TOKENIZER, max_length=100)
    every, _ = encode(documents, TOKENIZER, max_length=100)
    before = every.unigram_entropy()
    monkeypatch.setattr("bigbatch.lm.data.dataset.MOST_COUNTED", 8)
    assert every.unigram_entropy() == some.unigram_entropy() != before


def test_unigram_entropy_handles_single_and_no_token() -> None:
    tokens, trained = np.full(8, 7, np.int32), np.array([False] + [True] * 7)
    block = Block(tokens, trained, None, np.array([8]), np.zeros(1, np.uint64), np.zeros(1, np.int32))
    reader = MemoryTokens(block)
    training, _ = make_samples(reader, max_length=3, split=HashSplit())
    assert TokenDataset(reader, training).unigram_entropy() == 0.0
    with pytest.raises(ValueError, match="the dataset has no token to train on"):
        encode([], TOKENIZER, max_length=3)[0].unigram_entropy()


def test_samples_are_right_padded_without_labels_or_attention() -> None:
    samples: list[dict[str, torch.Tensor]] = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORED, 7, END])},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([END])},
    ]
    batch = collate(samples, pad_id=PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 7, END], [END, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    with pytest.raises(ValueError, match="there is no sample to collate"):
        collate([], pad_id=PAD)


def test_dataset_is_a_sequence_for_engine() -> None:
    dataset, _ = encode(texts(4), TOKENIZER, max_length=100)
    assert isinstance(dataset, TokenDataset)
    batch = collate([dataset[i] for i in (3, 0)], pad_id=PAD)
    assert batch["input_ids"].shape == (2, max(dataset.lengths[3], dataset.lengths[0]))
