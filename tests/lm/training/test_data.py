"""The data of a run comes from the cache when it is there, and is what it would be without."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.dataset import TokenDataset, encode
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.legacy_fingerprint import legacy_fingerprint
from bigbatch.lm.data.sampling_order import epoch_order, sampling_order_of
from bigbatch.lm.data.sources import read_corpus
from bigbatch.lm.data.token_store.build import Tokenization
from bigbatch.lm.data.token_store.cache import Cache
from bigbatch.lm.data.token_store.encoding import batches
from bigbatch.lm.data.token_store.reader import MemoryTokens
from bigbatch.lm.data.token_store.workers import Encoding
from bigbatch.lm.data.token_store.writer import concatenated
from bigbatch.lm.data.tokenizer import load_tokenizer, train_tokenizer
from bigbatch.lm.data.validation_split import HashSplit, split_documents
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.data import DataLoader, RunData
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.command_line import completed
from support.forked_processes import script
from support.gloo_processes import run as run_ranks
from support.language_models import RecordingCallback, metrics, records, write_jsonl
from support.tiers import slow

TOKENIZER = train_tokenizer(["def return class value self None import x für 日本語"] * 9, vocabulary_size=290)


def load(cache: Path, data: Any, max_length: int = 16, **settings: Any) -> tuple[RunData, list[str]]:
    """Return the data of a run, and what was done for it."""
    done: list[str] = []
    config = TrainConfig(data=data, cache=None if settings.get("no_cache") else cache, **settings).resolved()
    with DataLoader(config, lambda activity, *_: done.append(activity.partition(" ")[0])) as loader:
        return loader.load(TOKENIZER, max_length), sorted(set(done))


def all_samples(dataset: TokenDataset | None) -> list[Any]:
    assert dataset is not None
    return [{name: tensor.tolist() for name, tensor in dataset[i].items()} for i in range(len(dataset))]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "data.jsonl", records(60)))


def test_data_equals_that_in_memory(tmp_path: Path, data: str) -> None:
    found, _ = load(tmp_path / "cache", data, validation_fraction=0.2)
    parts = split_documents(read_corpus(data).documents, validation_fraction=0.2)
    for dataset, documents in zip((found.training, found.validation), parts, strict=True):
        assert all_samples(dataset) == all_samples(encode(documents, TOKENIZER, max_length=16)[0])
    assert found.notes[0].startswith("60 records in 1 file from ")


def test_second_start_tokenizes_nothing(tmp_path: Path, data: str) -> None:
    first, done = load(tmp_path / "cache", data)
    assert done == ["reading", "tokenizing"]
    assert any(note.startswith("token cache: ") for note in first.notes)
    for settings in ({}, {"validation_fraction": 0.3}, {"max_length": 5}, {"seed": 9}, {"cache_by_content": False}):
        again, done = load(tmp_path / "cache", data, **settings)  # type: ignore[arg-type]
        assert done == ["reading"]
    again, _ = load(tmp_path / "cache", data)
    assert again.fingerprint == first.fingerprint
    assert again.notes == tuple(note for note in first.notes if not note.startswith("token cache: "))
    assert all_samples(again.training) == all_samples(first.training)


@pytest.mark.parametrize("change", [{"skip_broken": True}, {"train_on": "last-turn"}, {"text_column": "completion"}])
def test_setting_of_tokens_needs_another_entry(tmp_path: Path, data: str, change: dict[str, Any]) -> None:
    load(tmp_path / "cache", data)
    assert load(tmp_path / "cache", data, **change)[1] == ["reading", "tokenizing"]


def test_changed_file_is_tokenized_again(tmp_path: Path, data: str) -> None:
    first, _ = load(tmp_path / "cache", data)
    write_jsonl(Path(data), records(61))
    second, done = load(tmp_path / "cache", data)
    assert done == ["reading", "tokenizing"]
    assert second.fingerprint != first.fingerprint


def test_content_hash_ignores_modification_time(tmp_path: Path, data: str) -> None:
    load(tmp_path / "cache", data, cache_by_content=True)
    os.utime(data, (1, 1))
    assert load(tmp_path / "cache", data, cache_by_content=True)[1] == ["reading"]
    assert load(tmp_path / "cache", data)[1] == ["reading", "tokenizing"]
    text = Path(data).read_text(encoding="utf-8")
    Path(data).write_text(text.replace("def", "fed"), encoding="utf-8")
    os.utime(data, (1, 1))
    assert load(tmp_path / "cache", data, cache_by_content=True)[1] == ["reading", "tokenizing"]


def test_run_without_cache_leaves_nothing(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    kept, _ = load(tmp_path / "cache", data)
    found, _ = load(tmp_path / "cache", data, no_cache=True)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert all_samples(found.training) == all_samples(kept.training)
    assert found.fingerprint == kept.fingerprint


def test_start_without_place_for_cache_says_so(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    config = TrainConfig(data=data).resolved()
    with DataLoader(config, lambda *_: None) as loader:
        notes = loader.load(TOKENIZER, 16).notes
    assert notes[-1] == (
        f"the token cache {tmp_path}/file/bigbatch cannot be written (not a directory): every start tokenizes the data "
        "again. Pass --cache DIR"
    )


def test_single_text_is_cut_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"value {i}\n" for i in range(60)))
    for fraction in (0.1, 0.3, 0.0):
        found, _ = load(tmp_path / "cache", str(path), validation_fraction=fraction)
        training, held_out = split_documents(read_corpus(str(path)).documents, validation_fraction=fraction)
        assert all_samples(found.training) == all_samples(encode(training, TOKENIZER, max_length=16)[0])
        if held_out:
            assert all_samples(found.validation) == all_samples(encode(held_out, TOKENIZER, max_length=16)[0])
        else:
            assert found.validation is None


def test_several_sources_are_one_data_set(tmp_path: Path) -> None:
    rows = records(50)
    names = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows[25 * i : 25 * i + 25])) for i in range(2)]
    together, _ = load(tmp_path / "cache", names)
    alone, _ = load(tmp_path / "cache", str(write_jsonl(tmp_path / "all.jsonl", rows)))
    assert all_samples(together.training) == all_samples(alone.training)
    assert all_samples(together.validation) == all_samples(alone.validation)
    assert load(tmp_path / "cache", names[0])[1] == ["reading"]


def test_mixture_is_described_and_ordered(tmp_path: Path) -> None:
    names = [str(write_jsonl(tmp_path / f"{i}.jsonl", records(number))) for i, number in enumerate((80, 20))]
    found, _ = load(tmp_path / "cache", names, 1000, data_weights=[0.5, 0.5], validation_fraction=0)
    (note,) = [note for note in found.notes if note.startswith("mixture: ")]
    assert f"50.0% of the tokens from {names[0]}, 1 pass; 50.0% of the tokens from {names[1]}, " in note
    assert f"an epoch is one pass over {names[0]}, " in note
    order = found.order.epoch(0)
    samples = order.part(0, len(order))
    first = found.training.lengths[samples[samples < 80]].sum()
    assert abs(first - found.training.lengths[samples[samples >= 80]].sum()) <= 2 * found.training.longest


def test_weighted_source_without_sequences_is_rejected(tmp_path: Path) -> None:
    same = [{"text": "value x"}]
    names = [str(write_jsonl(tmp_path / "a.jsonl", records(30))), str(write_jsonl(tmp_path / "b.jsonl", same))]
    key = int(Document("b", text="value x").key[:16], 16) / 2**64
    with pytest.raises(
        InputError, match=r"b\.jsonl has no sequence to train on, so it cannot have a weight\. Leave it"
    ):
        load(tmp_path / "cache", names, data_weights=[1, 1], validation_fraction=min(0.99, key + 0.01))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ["a", "b"], "data_weights": [1]}, r"data_weights has 1 and data has 2: give one weight for each"),
        ({"data": ["a"], "data_weights": [0]}, r"greater than 0"),
        ({"data": ["a"], "data_weights": ["x"]}, r"valid number"),
        ({"cache": "c", "no_cache": True}, r"no_cache and cache exclude each other: give one of them"),
    ],
)
def test_settings_that_contradict_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_file_that_changes_while_read_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "growing.txt"
    path.write_text("x")

    def read(reading: Any) -> Iterator[Document]:
        yield Document("a", text="value")
        path.write_text("longer")

    corpus = Corpus(read, name="growing.txt", files=[path])
    with pytest.raises(InputError, match=r"^growing\.txt changed while it was read\. Start again when nothing writes"):
        Tokenization(Encoding(TOKENIZER), Cache(tmp_path / "cache")).store(corpus)
    assert Cache(tmp_path / "cache").entries() == []


# runs of earlier versions -----------------------------------------------------------------------------------------


def test_earlier_run_keeps_order_and_fingerprint(tmp_path: Path, data: str) -> None:
    config = TrainConfig(data=data, cache=tmp_path / "cache", seed=3).resolved()
    with DataLoader(config, lambda activity, *_: None, order_version=1) as loader:
        found = loader.load(TOKENIZER, 16)
    number = len(found.training)
    assert found.order.epoch(1).part(0, number).tolist() == epoch_order(number, seed=3, epoch=1, version=1)
    training, _ = split_documents(read_corpus(data).documents, validation_fraction=0.05)
    encoding = Encoding(TOKENIZER)
    reader = MemoryTokens(concatenated(map(encoding.encode, batches(training, encoding.encoder))))
    assert found.fingerprint == legacy_fingerprint([reader], max_length=16, split=HashSplit())


@pytest.mark.parametrize(
    ("facts", "has_checkpoint", "version"),
    [
        (None, False, 2),
        (None, True, 1),
        ({}, False, 1),
        ({"sampling_order": 1}, True, 1),
        ({"sampling_order": 2}, True, 2),
    ],
)
def test_order_of_run_follows_its_facts(facts: Any, has_checkpoint: bool, version: int) -> None:
    assert sampling_order_of(Path("run"), facts, has_checkpoint=has_checkpoint) == version


def test_order_of_newer_version_is_refused() -> None:
    message = r"^run has sampling order 3, and bigbatch .* knows orders up to 2\. Upgrade bigbatch; nothing was changed"
    with pytest.raises(InputError, match=message):
        sampling_order_of(Path("run"), {"sampling_order": 3}, has_checkpoint=True)


@pytest.mark.parametrize("kind", [slow("earlier"), "mixed"])
def test_stopped_run_resumes_in_its_order(tmp_path: Path, data: str, kind: str) -> None:
    settings: dict[str, Any] = {"data": data, "device": "cpu", "max_length": 16, "deterministic": True}
    version = 1
    if kind == "mixed":
        other = str(write_jsonl(tmp_path / "other.jsonl", [{"text": f"self value {i}"} for i in range(4)]))
        settings |= {"data": [data, other], "data_weights": [0.6, 0.4]}
        version = 2
    config = TrainConfig(**settings, steps=6, global_batch=4, microbatch=4, checkpoint_every=2)
    done: list[int] = []
    for name, stops in (("whole", False), ("run", True)):
        setup = set_up_training(config.model_copy(update={"out": tmp_path / name}), order_version=version)
        trainer = Trainer(setup)
        directory = RunDirectory.create(tmp_path / name, setup.config.model_dump(mode="json"))
        directory.record_facts(trainer.initial_facts)
        recorder = RecordingCallback()
        trainer.run(directory, callback=recorder, should_stop=lambda r=recorder, s=stops: s and len(r.rows) == 3)  # type: ignore[misc]
        done.append(len(recorder.rows))
    assert done == [6, 3]
    assert main(["resume", str(tmp_path / "run")]) == 0
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "run")]
    assert losses[0] == losses[1]


# killed, several ranks --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from bigbatch.lm.data.token_store.writer import StoreWriter

def add(self, block, add=StoreWriter.add):
    add(self, block)
    if self.documents >= 2000:
        os.kill(os.getpid(), signal.SIGKILL)

StoreWriter.add = add
from bigbatch.cli import main
main(sys.argv[1:])
"""


def test_start_after_kill_while_tokenizing_begins_again(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "data.jsonl", [{"text": f"value {i}"} for i in range(3000)]))
    command = ["tokenize", "--data", data, "--model", "tiny", "--out", str(tmp_path / "tokens")]
    assert completed(script, KILLED, *command, folder=tmp_path).returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tokens"]


def test_run_after_kill_while_tokenizing_never_uses_half_a_cache(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "data.jsonl", [{"text": f"value {i}"} for i in range(3000)]))

    def command(cache: str, out: str) -> list[str]:
        folders = ["--cache", str(tmp_path / cache), "--out", str(tmp_path / out)]
        return ["train", "--data", data, "--steps", "1", "--microbatch", "4", "--global-batch", "4", *folders]

    killed = completed(script, KILLED, *command("killed", "first"), folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "killed" / "tokens").glob("*.partial")
    assert (partial / "tokens-00000.arrow").exists()
    assert main(command("killed", "second")) == main(command("whole", "third")) == 0
    assert not partial.exists()
    tokens = [path.read_bytes() for path in sorted(tmp_path.glob("*/tokens/*/tokens-00000.arrow"))]
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


def load_on_rank(cache: Path, data: str) -> tuple[str, bool, list[str]]:
    config = TrainConfig(data=data, cache=cache).resolved()
    with DataLoader(config, lambda activity, *_: None) as loader:
        found = loader.load(TOKENIZER, 16)
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = sorted({line.split(maxsplit=5)[5] for line in lines if str(cache) in line})
    return found.fingerprint, any(note.startswith("token cache: ") for note in found.notes), mapped


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_ranks_map_one_cache(tmp_path: Path, data: str) -> None:
    found = run_ranks(load_on_rank, 2, tmp_path / "cache", data)
    (fingerprint, first_wrote, mapped), (other, second_wrote, also_mapped) = found
    assert fingerprint == other
    assert first_wrote != second_wrote
    assert mapped == also_mapped
    assert any(name.endswith("tokens-00000.arrow") for name in mapped)


# tokenized ahead --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def tokenize(model: str, data: str, out: Path, *more: str) -> int:
    return main(["tokenize", "--data", data, "--model", model, "--out", str(out), *more])


def load_tokenized(model: str, folder: Path, **settings: Any) -> RunData:
    config = TrainConfig(data=str(folder), model=model, no_cache=True, **settings).resolved()
    with DataLoader(config, lambda activity, *_: None) as loader:
        return loader.load(load_tokenizer(model), 16)


def test_parts_of_tokens_hold_every_document_once(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigbatch.lm.data.token_store.tokenized.BLOCK_DOCUMENTS", 7)
    data = str(write_jsonl(tmp_path / "data.jsonl", records(60)))
    assert tokenize(model, data, tmp_path / "whole", "--max-length", "16") == 0
    printed = capfd.readouterr().out
    assert printed.endswith(f"next: bigbatch train --data {tmp_path / 'whole'} --model {model} --max-length 16\n")
    sequences = int(printed.partition("with --max-length 16: ")[2].partition(" sequences, before any are held out")[0])
    for i in range(3):
        assert tokenize(model, data, tmp_path / "parts", "--shard", f"{i}/3") == 0
    printed = capfd.readouterr().out
    assert "the other 2 of 3 parts: the same command with --shard 1/3, and so on" in printed
    whole, parts = (load_tokenized(model, tmp_path / name) for name in ("whole", "parts"))
    kept, _ = load(tmp_path / "cache", data)
    assert len(all_samples(whole.training) + all_samples(whole.validation)) == sequences
    assert all_samples(whole.training) == all_samples(kept.training)
    assert sorted(map(str, all_samples(parts.training))) == sorted(map(str, all_samples(whole.training)))
    assert sorted(map(str, all_samples(parts.validation))) == sorted(map(str, all_samples(whole.validation)))


def test_missing_part_is_named(tmp_path: Path, model: str, data: str) -> None:
    for i in (0, 2):
        assert tokenize(model, data, tmp_path / "parts", "--shard", f"{i}/3") == 0
    with pytest.raises(
        InputError, match=r"has 2 of 3 parts; part-00001-of-00003 is missing\. Run .* --shard 1/3 to make"
    ):
        load_tokenized(model, tmp_path / "parts")


def test_parts_of_other_data_are_rejected(tmp_path: Path, model: str, data: str) -> None:
    assert tokenize(model, data, tmp_path / "parts", "--shard", "0/2") == 0
    write_jsonl(Path(data), records(61))
    assert tokenize(model, data, tmp_path / "parts", "--shard", "1/2") == 0
    with pytest.raises(
        InputError, match=r"part-00001-of-00002 was made from other data, settings or another tokenizer"
    ):
        load_tokenized(model, tmp_path / "parts")


def test_tokens_of_other_tokenizer_are_rejected(tmp_path: Path, model: str, data: str) -> None:
    assert tokenize(model, data, tmp_path / "tokens") == 0
    train_tokenizer(["other words"], vocabulary_size=270).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"tokens was tokenized with the tokenizer of .*model, and that of .*other "):
        load_tokenized(str(tmp_path / "other"), tmp_path / "tokens")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "3/3"], "--shard is '3/3': parts count from 0, so I must be less than N"),
        (["--shard", "x"], "--shard is 'x': it must be I/N, such as 0/8 for the first of eight parts"),
        (["--shard", "0/2"], r"holds documents-00000.arrow, which is no part of 2. Name a new or empty folder"),
        ([], "exists. Name a new folder, or remove it first."),
    ],
    ids=["part-beyond", "no-part", "whole-there", "there"],
)
def test_tokenize_refuses_what_it_cannot_write(
    tmp_path: Path, model: str, data: str, more: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(model, data, tmp_path / "tokens") == 0
    assert tokenize(model, data, tmp_path / "tokens", *more) == 2
    assert message in capfd.readouterr().err


def test_next_command_has_chat_template(
    tmp_path: Path, model: str, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(model, data, tmp_path / "tokens", "--chat-template", "chatml") == 0
    *_, last = capfd.readouterr().out.splitlines()
    assert last == f"next: bigbatch train --data {tmp_path / 'tokens'} --model {model} --chat-template chatml"


def test_tokens_to_validate_on_are_rejected(tmp_path: Path, model: str, data: str) -> None:
    assert tokenize(model, data, tmp_path / "tokens") == 0
    config = TrainConfig(data=(data,), validation_data=(str(tmp_path / "tokens"),)).resolved()
    with pytest.raises(
        InputError, match=r"--validation-data .*tokens holds tokens of bigbatch tokenize\. Pass the data "
    ):
        DataLoader(config, lambda activity, *_: None)


def test_tokens_cannot_be_tokenized(tmp_path: Path, model: str, data: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert tokenize(model, data, tmp_path / "tokens") == 0
    assert tokenize(model, str(tmp_path / "tokens"), tmp_path / "again") == 2
    assert "holds tokens already. Pass the data that they were made from." in capfd.readouterr().err
    assert main(["inspect", str(tmp_path / "tokens"), "--model", model]) == 2
    assert "holds tokens. Inspect the data that they were made from." in capfd.readouterr().err
