"""Stores hold what was encoded, bit by bit, whatever the sizes of shards, batches and pieces."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bigbatch.errors import InputError
from bigbatch.lm.data.dataset import TokenDataset, encode
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.legacy_fingerprint import legacy_fingerprint
from bigbatch.lm.data.token_store import encoding, manifest, samples
from bigbatch.lm.data.token_store.manifest import Manifest, read_manifest
from bigbatch.lm.data.token_store.reader import MemoryTokens, StoredTokens
from bigbatch.lm.data.token_store.samples import make_samples, read_samples, write_samples
from bigbatch.lm.data.token_store.workers import Encoding
from bigbatch.lm.data.token_store.writer import Block, StoreWriter, concatenated
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.data.validation_split import HashSplit, split_documents
from support.tiers import slow_except

TOKENIZER = train_tokenizer(["the quick brown fox and the quick brown hen"] * 4, vocabulary_size=280)
ENCODING = Encoding(TOKENIZER)
LEGACY = "4d65da833007b9d774cc8f1d78aab8d6dec9980c1613a087d15a98d372b05cfd"


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several record batches, shards and encoded batches of few tokens."""
    monkeypatch.setattr(manifest, "BATCH_TOKENS", 64)
    monkeypatch.setattr(manifest, "BATCH_ROWS", 8)
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 5)


def documents(number: int) -> list[Document]:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "the hen"})
    return [
        Document(str(i), text=f"the quick {i} {'brown ' * (i % 9)}")
        if i % 3 == 0
        else Document(str(i), prompt=f"p{i % 40}", completion="fox " * (1 + i % 4))
        if i % 3 == 1
        else Document(str(i), messages=({**turns[0], "content": f"q {i}"}, turns[1]))
        for i in range(number)
    ]


def blocks_of(found: list[Document]) -> Iterator[Block]:
    return map(ENCODING.encode, encoding.batches(found, ENCODING.encoder))


def store_of(folder: Path, blocks: Iterator[Block], *, shard_tokens: int = 500) -> Manifest:
    folder.mkdir()
    with StoreWriter(folder, shard_tokens=shard_tokens) as writer:
        for block in blocks:
            writer.add(block)
    return writer.finish(Manifest((), 0, "tokenizer", "model"))


@pytest.fixture
def two_stores(tmp_path: Path) -> tuple[Block, StoredTokens]:
    stores = [(tmp_path / name, store_of(tmp_path / name, blocks_of(documents(60)))) for name in ("a", "b")]
    return concatenated(blocks_of(documents(60))), StoredTokens(stores)


def all_samples(dataset: TokenDataset) -> list[Any]:
    return [{name: tensor.tolist() for name, tensor in dataset[i].items()} for i in range(len(dataset))]


@pytest.mark.parametrize("max_length", [3, 7, 1000])
def test_stored_samples_equal_those_in_memory(tmp_path: Path, max_length: int) -> None:
    found = documents(120)
    written = store_of(tmp_path / "store", blocks_of(found))
    assert len(written.shards) > 2
    assert read_manifest(tmp_path / "store") == written
    reader = StoredTokens([(tmp_path / "store", written)])
    assert (reader.num_rows, written.documents) == (120, 120)
    for fraction in (0.0, 0.2, 1e-9, 1 - 1e-9):
        split = HashSplit.of((rows.keys for rows in reader.rows()), validation_fraction=fraction)
        (tmp_path / str(fraction)).mkdir()
        write_samples(tmp_path / str(fraction), [reader], max_length=max_length, split=split, facts={})
        sides, by_source = read_samples(tmp_path / str(fraction))
        assert by_source == [[len(side.starts) for side in sides]]
        for side, expected in zip(sides, split_documents(found, validation_fraction=fraction), strict=True):
            dataset, counts = encode(expected, TOKENIZER, max_length=max_length)
            stored = TokenDataset(reader, side)
            assert all_samples(stored) == all_samples(dataset)
            assert side.counts == counts
            assert stored.label_counts.tolist() == dataset.label_counts.tolist()
            if len(dataset):
                assert stored.unigram_entropy() == pytest.approx(dataset.unigram_entropy())


def test_samples_do_not_depend_on_tokens_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = concatenated(blocks_of(documents(60)))
    split = HashSplit.of([block.keys], validation_fraction=0.2)
    whole = make_samples(MemoryTokens(block), max_length=3, split=split)
    monkeypatch.setattr(samples, "_CHUNK_TOKENS", 20)
    for one, other in zip(whole, make_samples(MemoryTokens(block), max_length=3, split=split), strict=True):
        assert one.starts.tolist() == other.starts.tolist()
        assert one.lengths.tolist() == other.lengths.tolist()
        assert one.label_counts.tolist() == other.label_counts.tolist()
        assert one.counts == other.counts


def test_fingerprint_of_earlier_runs_is_reproduced(tmp_path: Path) -> None:
    # Of bigbatch before it stored tokens: documents(120), pieces of 7 tokens, a fifth held out.
    written = store_of(tmp_path / "store", blocks_of(documents(120)))
    reader = StoredTokens([(tmp_path / "store", written)])
    split = HashSplit.of((rows.keys for rows in reader.rows()), validation_fraction=0.2)
    assert legacy_fingerprint([reader], max_length=7, split=split) == LEGACY
    memory = MemoryTokens(concatenated(blocks_of(documents(120))))
    assert legacy_fingerprint([memory], max_length=7, split=split) == LEGACY


def test_fingerprint_depends_on_tokens_marks_and_bounds(tmp_path: Path) -> None:
    block = concatenated(blocks_of(documents(9)))
    other_tokens, other_trained, other_keys = block.tokens.copy(), block.trained.copy(), block.keys.copy()
    other_tokens[5] += 1
    other_trained[5] ^= True
    other_keys[5] += np.uint64(1)
    counts = block.counts + np.array([1, -1, *[0] * 7])
    changes: list[dict[str, Any]] = [
        {}, {}, {"tokens": other_tokens}, {"trained": other_trained}, {"keys": other_keys}, {"counts": counts},
        {"weights": block.trained.astype(np.float32)},
    ]  # fmt: skip
    stores = [
        store_of(tmp_path / str(i), iter([replace(block, **change)])).fingerprint for i, change in enumerate(changes)
    ]
    assert stores[0] == stores[1]
    assert len(set(stores)) == len(stores) - 1


def test_weights_are_stored_from_their_shard_on(tmp_path: Path) -> None:
    plain, other = concatenated(blocks_of(documents(6))), concatenated(blocks_of(documents(7)))
    weights = np.where(other.trained, 0.5, 0).astype(np.float32)
    written = store_of(tmp_path / "store", iter([plain, replace(other, weights=weights), plain]), shard_tokens=10**6)
    assert [shard.has_weights for shard in written.shards] == [False, True]
    reader = StoredTokens([(tmp_path / "store", written)])
    training, _ = make_samples(reader, max_length=100, split=HashSplit())
    dataset = TokenDataset(reader, training)
    assert "weights" not in dataset[5]
    assert set(dataset[6]["weights"].tolist()) <= {0.0, 0.5}
    assert set(dataset[len(dataset) - 1]["weights"].tolist()) <= {0.0, 1.0}
    assert training.counts.label_tokens == 2 * int(plain.trained.sum()) + int(other.trained.sum())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=1, max_size=5))
def test_any_span_equals_tokens_in_memory(two_stores: tuple[Block, StoredTokens], cuts: list[Any]) -> None:
    block, reader = two_stores
    tokens, trained = np.concatenate([block.tokens] * 2), np.concatenate([block.trained] * 2)
    assert reader.num_tokens == len(tokens)
    for start, length in cuts:
        stop = min(start + length, len(tokens))
        span = reader.read(start, stop)
        assert np.array_equal(span.tokens, tokens[start:stop])
        assert np.array_equal(span.trained, trained[start:stop])


def test_files_are_plain_arrow(tmp_path: Path) -> None:
    written = store_of(tmp_path / "store", blocks_of(documents(30)))
    first = pa.ipc.open_file(pa.memory_map(str(tmp_path / "store" / "tokens-00000.arrow"))).read_all()
    assert first.schema.names == ["token", "trained"]
    rows = pa.ipc.open_file(pa.memory_map(str(tmp_path / "store" / "documents-00000.arrow"))).read_all()
    assert rows.schema.names == ["tokens", "key", "part"]
    assert sum(rows["tokens"].to_pylist()) == len(first) == written.shards[0].tokens
    assert rows["key"][0].as_py() == int(documents(1)[0].key[:16], 16)


# long texts -------------------------------------------------------------------------------------------------------


def test_long_text_is_tokenized_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"the quick  brown\n\n fox {i}\nand{' ' * (i % 5)}\n" for i in range(400))
    whole = concatenated(blocks_of([Document("a", text=text)]))
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "LONG_TEXT", 1000)
    found = [Document("b", text="the fox"), Document("a", text=text), Document("c", text="hen")]
    pieces = list(encoding.batches(found, ENCODING.encoder))
    assert len(pieces) > 20
    block = concatenated(map(ENCODING.encode, pieces))
    alone = concatenated(blocks_of([found[0]]))
    start = len(alone.tokens)
    assert block.counts.tolist()[1] == len(whole.tokens)
    assert np.array_equal(block.tokens[start : start + len(whole.tokens)], whole.tokens)
    assert np.array_equal(block.trained[start : start + len(whole.tokens)], whole.trained)
    assert block.keys.tolist() == [int(document.key[:16], 16) for document in found]
    assert block.documents == 3


@pytest.mark.parametrize("text", ["brown" * 600, "\n" * 3000, f"{' ' * 1500}\n{' ' * 1500}", "a\n\nb" * 600])
def test_text_without_place_to_cut_stays_whole(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "LONG_TEXT", 1000)
    (piece,) = encoding.batches([Document("a", text=text)], ENCODING.encoder)
    assert isinstance(piece, encoding.TextPiece)
    assert piece.is_first
    assert piece.is_last


LLAMA_3 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIPELINES: dict[str, dict[str, Any]] = {
    "bytes": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)},
    "bytes of words by a pattern": {
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(LLAMA_3, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    },
    "one word for all": {"normalizer": normalizers.Replace(" ", "▁")},
    "words that are never found": {
        "normalizer": normalizers.Replace(" ", "▁"),
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
    },
    "one word with a prefix": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    },
    "words with a prefix": {"pre_tokenizer": pre_tokenizers.Metaspace()},
    "white space dropped": {"normalizer": normalizers.Lowercase(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()},
}
ATOMS = [
    "the",
    " Quick",
    "  ",
    "\n",
    "\n\n",
    "\n" * 700,
    " " * 700,
    "\t",
    "fox",
    "'s",
    " 1234567",
    "\r\n",
    "dogs. ",
    "a b\n",
]
ATOMS += ["fox" * 200, "1" * 600, "\n fox", "."]


@pytest.mark.parametrize("joins_lines", [False, True])
@pytest.mark.parametrize("name", slow_except(PIPELINES, "bytes", "one word for all", "words that are never found"))
def test_no_cut_of_hostile_text_changes_tokens(monkeypatch: pytest.MonkeyPatch, name: str, joins_lines: bool) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 400)
    monkeypatch.setattr(encoding, "LONG_TEXT", 1200)
    tokenizer = Tokenizer(models.BPE())
    for part, value in PIPELINES[name].items():
        setattr(tokenizer, part, value)
    lines = ["the quick  brown", "fox jumps, over 1234 dogs. It's", "\tfun", "\n" * 64, " " * 64, "a b"] * 3
    texts = ["\n".join(lines)] * 5 if joins_lines else lines
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<e>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    encoder = Encoding(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")).encoder
    draw = random.Random(name)
    number = 0
    for _ in range(6):
        text = "".join(draw.choices(ATOMS, k=draw.randrange(200, 400)))
        pieces = list(encoding.batches([Document("a", text=text)], encoder))
        number += len(pieces)
        assert "".join(piece.text for piece in pieces if isinstance(piece, encoding.TextPiece)) == text
        (whole,) = encoder.texts([text])[1]
        found = concatenated(encoding.encode_batch(piece, encoder, skip_broken=False) for piece in pieces)
        assert found.tokens.tolist()[1:-1] == whole
    is_cut = name not in ("one word for all", "words that are never found") or not joins_lines
    assert (number > 6) == (is_cut and name != "one word with a prefix")


# damage -----------------------------------------------------------------------------------------------------------


def edit_version(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**content, "version": 99}))


def edit_count(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**content, "documents": 99}))


def cut_tokens(folder: Path) -> None:
    path = folder / "tokens-00000.arrow"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"are damaged: .*manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), r"manifest\.json is not what bigbatch writes"),
        (lambda folder: (folder / "manifest.json").write_text("[1"), r"manifest\.json is not what bigbatch writes"),
        (edit_version, r"holds tokens in version 99 of its format, and this bigbatch reads version 1\."),
        (edit_count, r"manifest\.json was changed"),
        (cut_tokens, r"tokens-00000\.arrow has .* bytes and had "),
        (lambda folder: (folder / "documents-00000.arrow").unlink(), r"documents-00000\.arrow cannot be read"),
    ],
    ids=["no-manifest", "empty-manifest", "cut-manifest", "version", "edited", "cut-tokens", "no-documents"],
)
def test_damaged_store_is_rejected(tmp_path: Path, damage: Any, message: str) -> None:
    store_of(tmp_path / "store", blocks_of(documents(30)))
    damage(tmp_path / "store")
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "store")


def test_shard_that_is_no_arrow_file_is_rejected(tmp_path: Path) -> None:
    written = store_of(tmp_path / "store", blocks_of(documents(30)))
    path = tmp_path / "store" / "tokens-00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=r"tokens-00000\.arrow cannot be read: .* tokenize the data again\.$"):
        StoredTokens([(tmp_path / "store", written)])


def test_damaged_samples_are_rejected(tmp_path: Path) -> None:
    reader = MemoryTokens(concatenated(blocks_of(documents(9))))
    write_samples(tmp_path, [reader], max_length=9, split=HashSplit(), facts={})
    (tmp_path / "training.length").write_bytes(b"")
    with pytest.raises(InputError, match=r"the samples in .* are damaged \(training.length has 0 bytes"):
        read_samples(tmp_path)
