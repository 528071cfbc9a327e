"""Shards that other tools wrote are trained on as other sources: same samples, order, resume and checks."""

import io
import json
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import TokenDataset
from bigbatch.lm.data.tokenizer import load_tokenizer
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.data import DataLoader, RunData
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.command_line import completed
from support.forked_processes import script
from support.gloo_processes import run as run_ranks
from support.language_models import RecordingCallback, metrics, save_model_folder
from support.tiers import slow

RNG = np.random.default_rng(5)
ROWS = [RNG.integers(3, 250, size=int(RNG.integers(2, 40))).tolist() for _ in range(60)]
LABELS = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ROWS]


def write_mosaic(folder: Path, rows: list[list[int]], labels: list[list[int]] | None = None, size: int = 9) -> Path:
    """Write shards as MDSWriter does, with columns of the encoding ndarray:int32."""
    folder.mkdir()
    shards = []
    names = ["input_ids"] + ["labels"] * (labels is not None)
    for number, first in enumerate(range(0, len(rows), size)):
        samples = []
        for i in range(first, min(first + size, len(rows))):
            columns = [rows[i], *([] if labels is None else [labels[i]])]
            values = [b"\5" + np.uint16(len(row)).tobytes() + np.array(row, "<i4").tobytes() for row in columns]
            samples.append(np.array([len(value) for value in values], "<u4").tobytes() + b"".join(values))
        header, table = b"{}", 4 * (len(samples) + 2)
        offsets = np.cumsum([table + len(header), *map(len, samples)]).astype("<u4")
        data = np.uint32(len(samples)).tobytes() + offsets.tobytes() + header + b"".join(samples)
        basename = f"shard.{number:05d}.mds"
        (folder / basename).write_bytes(data)
        shards.append(
            {
                "column_encodings": ["ndarray:int32"] * len(names),
                "column_names": names,
                "column_sizes": [None] * len(names),
                "compression": None,
                "format": "mds",
                "hashes": [],
                "raw_data": {"basename": basename, "bytes": len(data), "hashes": {}},
                "samples": len(samples),
                "size_limit": 1 << 26,
                "version": 2,
                "zip_data": None,
            }
        )
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return folder


def write_tars(folder: Path, rows: list[list[int]], labels: list[list[int]], size: int = 25) -> Path:
    folder.mkdir()
    for first in range(0, len(rows), size):
        with tarfile.open(folder / f"part-{first:04}.tar", "w") as archive:
            for i in range(first, min(first + size, len(rows))):
                for name, values in (("input_ids", rows[i]), ("labels", labels[i])):
                    sink = io.BytesIO()
                    np.save(sink, np.array(values, np.int32))
                    member = tarfile.TarInfo(f"{i:06}.{name}.npy")
                    member.size = len(sink.getvalue())
                    archive.addfile(member, io.BytesIO(sink.getvalue()))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_model_folder(tmp_path / "model"))


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Return the same records of tokens in every format."""
    table = pa.table({"input_ids": ROWS, "labels": LABELS, "id": range(len(ROWS))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    Dataset(table).save_to_disk(tmp_path / "saved")
    lines = [json.dumps({"tokens": row, "labels": labels}) for row, labels in zip(ROWS, LABELS, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write_mosaic(tmp_path / "mosaic", ROWS, LABELS)
    write_tars(tmp_path / "tars", ROWS, LABELS)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for name in ("mosaic", "tars"):
        fs.put(str(tmp_path / name), f"/bucket/{name}", recursive=True)
    names = ("mosaic", "tars", "a.parquet", "a.arrow", "saved", "a.jsonl")
    return {name: str(tmp_path / name) for name in names} | {
        "remote mosaic": "memory://bucket/mosaic",
        "remote tars": "memory://bucket/tars",
        "URL": f"file://{tmp_path}/mosaic",
    }


def load(tmp_path: Path, model: str, data: Any, **settings: Any) -> tuple[RunData, list[str]]:
    done: list[str] = []
    config = TrainConfig(data=data, model=model, cache=tmp_path / "cache", **settings).resolved()
    with DataLoader(config, lambda activity, *_: done.append(activity.partition(" ")[0])) as loader:
        return loader.load(load_tokenizer(model), 16), sorted(set(done))


def all_samples(dataset: TokenDataset | None) -> list[Any]:
    assert dataset is not None
    return [{name: tensor.tolist() for name, tensor in dataset[i].items()} for i in range(len(dataset))]


def test_samples_are_same_in_every_format(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    found = {name: load(tmp_path, model, data, validation_fraction=0.2) for name, data in sources.items()}
    training, validation = (
        [all_samples(getattr(data, side)) for data, _ in found.values()] for side in ("training", "validation")
    )
    assert all(samples == training[0] for samples in training)
    assert all(samples == validation[0] for samples in validation)
    pieces = [label for sample in (*training[0], *validation[0]) for label in sample["labels"] if label != -100]
    expected = [label for labels in LABELS for label in labels[1:] if label != -100]
    assert sorted(pieces) == sorted(expected)  # every trained token is a label exactly once
    for name, (data, done) in found.items():
        assert ("indexing" in done) == (name in ("mosaic", "tars") or name.startswith("remote"))
        assert data.notes[0].startswith("60 record")


def test_order_is_that_of_other_sources(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    orders = []
    for name in ("mosaic", "a.jsonl"):
        data, _ = load(tmp_path, model, [sources[name], sources["a.parquet"]], data_weights=[0.7, 0.3])
        orders.append(data.order.epoch(0).part(0, 200).tolist())
    assert orders[0] == orders[1]


def test_second_start_reads_no_shard(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    first, done = load(tmp_path, model, sources["mosaic"])
    assert done == ["indexing", "reading"]
    again, done = load(tmp_path, model, sources["mosaic"], seed=3, validation_fraction=0.3)
    assert done == ["reading"]
    assert again.fingerprint == first.fingerprint


def test_changed_shard_is_indexed_again(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    first, _ = load(tmp_path, model, sources["mosaic"])
    path = Path(sources["mosaic"]) / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-4:] = data[-8:-4] = np.int32(77).tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"'labels' has 77 where the token is \d+"):
        load(tmp_path, model, sources["mosaic"])
    second, done = load(tmp_path, model, sources["mosaic"], skip_broken=True)
    assert done == ["indexing", "reading"]
    assert second.fingerprint != first.fingerprint
    assert second.notes[1].startswith("1 broken record left out; the first: ")


def test_tokens_of_other_tokenizer_are_refused(tmp_path: Path, model: str) -> None:
    data = write_mosaic(tmp_path / "mosaic", [[1, 2, 31_999], [3, 4]])
    message = "has the token 31,999, and the tokenizer of the model has 300 tokens. Pass the --model whose tokenizer"
    with pytest.raises(InputError) as caught:
        load(tmp_path, model, str(data))
    assert str(caught.value).startswith(f"{data} {message}")
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 31999]}\n{"input_ids": [1, 2]}\n')
    with pytest.raises(InputError) as caught:
        load(tmp_path, model, str(tmp_path / "a.jsonl"))
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:1 {message}")
    found, _ = load(tmp_path, model, str(tmp_path / "a.jsonl"), skip_broken=True)
    assert "1 document left out; the first: " in found.notes[1]


def test_vocabulary_of_tiny_cannot_be_trained(sources: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("mosaic", "tars", "a.parquet"):
        for command in (
            ["train", "--data", sources[name]],
            ["inspect", sources[name]],
            ["plan", "--data", sources[name]],
        ):
            assert main(command) == 2
            assert "has tokens and no text, and --model tiny trains a tokenizer on text. Pass" in capfd.readouterr().err


QUICK = ("--device", "cpu", "--microbatch", "2", "--global-batch", "4", "--max-length", "16", "--deterministic")


@pytest.mark.parametrize("names", [["mosaic"], slow(["remote tars"]), slow(["mosaic", "a.parquet"])])
def test_stopped_run_resumes_exactly(names: list[str], tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    """The losses are those of an uninterrupted run on the same tokens in JSON lines."""
    settings: dict[str, Any] = {"model": model, "device": "cpu", "max_length": 16, "deterministic": True}
    settings |= {"steps": 6, "global_batch": 4, "microbatch": 4, "checkpoint_every": 2, "cache": tmp_path / "cache"}
    if len(names) > 1:
        settings["data_weights"] = [0.6, 0.4]
    done = []
    for out, data, stops in (("whole", "a.jsonl", False), ("run", "", True)):
        paths = [sources[data or name] for name in names]
        if len(names) > 1 and data:  # the same file twice is refused
            (tmp_path / "b.jsonl").write_bytes(Path(paths[1]).read_bytes())
            paths[1] = str(tmp_path / "b.jsonl")
        trainer = Trainer(set_up_training(TrainConfig(**settings, data=paths, out=tmp_path / out)))
        directory = RunDirectory.create(tmp_path / out, trainer.setup.config.model_dump(mode="json"))
        directory.record_facts(trainer.initial_facts)
        recorder = RecordingCallback()
        trainer.run(directory, callback=recorder, should_stop=lambda r=recorder, s=stops: s and len(r.rows) == 3)  # type: ignore[misc]
        done.append(len(recorder.rows))
    assert done == [6, 3]
    assert main(["resume", str(tmp_path / "run")]) == 0
    losses = [[row["loss"] for row in metrics(tmp_path / out)] for out in ("whole", "run")]
    assert len(losses[1]) == 6
    assert losses[0] == losses[1]


def test_resume_refuses_other_tokens(
    tmp_path: Path, model: str, sources: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    out, data = str(tmp_path / "run"), Path(sources["mosaic"])
    command = ["train", "--data", str(data), "--model", model, "--out", out, "--cache", str(tmp_path / "cache")]
    assert main([*command, "--steps", "2", "--checkpoint-every", "1", *QUICK]) == 0
    assert "validation data: " in capfd.readouterr().out
    last = max((Path(out) / "checkpoints").iterdir())
    shutil.rmtree(last)  # as if it had been stopped before its last update
    shutil.rmtree(data)
    write_mosaic(data, [row[::-1] for row in ROWS])
    assert main(["resume", out]) == 2
    assert "--allow-data-change" in capfd.readouterr().err
    shutil.rmtree(data)
    write_mosaic(data, ROWS, LABELS)
    assert main(["resume", out]) == 0


def test_inspect_shows_tokens(
    tmp_path: Path, model: str, sources: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", sources["mosaic"], "--model", model, "--samples", "1"]) in (0, 1)
    printed = capfd.readouterr().out
    assert "60 documents: 60 tokens" in printed
    assert f"60 records of tokens in 7 shards from {sources['mosaic']}" in printed
    assert "masked" in printed


def test_plan_counts_sequences_of_shards(
    tmp_path: Path, model: str, sources: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for name in ("tars", "a.jsonl"):
        assert main(["plan", "--data", sources[name], "--model", model, *QUICK[:-1]]) == 0
        printed.append(capfd.readouterr().out.replace(sources[name], "DATA"))
    assert printed[0].splitlines()[-1] == printed[1].splitlines()[-1]


def test_shards_are_tokenized_ahead_as_a_copy(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    assert main(["tokenize", "--data", sources["tars"], "--model", model, "--out", str(tmp_path / "tokens")]) == 0
    copied, done = load(tmp_path, model, str(tmp_path / "tokens"))
    assert done == ["reading"]
    assert all_samples(copied.training) == all_samples(load(tmp_path, model, sources["tars"])[0].training)


def test_parts_of_other_remote_data_are_refused(
    tmp_path: Path, model: str, sources: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    fs = fsspec.filesystem("memory")
    lines = [json.dumps({"input_ids": row}) for row in ROWS]
    fs.pipe("/bucket/rows/a.jsonl", "\n".join(lines).encode())
    out = str(tmp_path / "parts")
    for part in ("0/2", "1/2"):
        command = ["tokenize", "--data", "memory://bucket/rows/a.jsonl", "--model", model, "--out", out]
        assert main([*command, "--shard", part]) == 0
        fs.pipe("/bucket/rows/a.jsonl", "\n".join(lines[1:]).encode())
    capfd.readouterr()
    assert main(["train", "--data", out, "--model", model, "--out", str(tmp_path / "run"), "--steps", "1"]) == 2
    assert "was made from other data, settings or another tokenizer than" in capfd.readouterr().err


# killed, several ranks --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from bigbatch.lm.data.token_shards import index

def add(self, raw, document, add=index._Writer.add):
    add(self, raw, document)
    if self.documents == 40:
        os.kill(os.getpid(), signal.SIGKILL)

index._Writer.add = add
from bigbatch.cli import main
main(sys.argv[1:])
"""


def test_start_after_kill_while_indexing_begins_again(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    command = [
        "train",
        "--data",
        sources["mosaic"],
        "--model",
        model,
        "--cache",
        str(tmp_path / "cache"),
        "--steps",
        "1",
    ]
    command += ["--out", str(tmp_path / "run"), *QUICK]
    killed = completed(script, KILLED, *command, folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir()] == [".partial"]
    assert main(command) == 0
    assert [path.suffix for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir()] == [""]


def load_on_rank(cache: Path, model: str, data: str) -> tuple[str, int]:
    done: list[str] = []
    config = TrainConfig(data=data, model=model, cache=cache).resolved()
    with DataLoader(config, lambda activity, *_: done.append(activity.partition(" ")[0])) as loader:
        return loader.load(load_tokenizer(model), 16).fingerprint, done.count("indexing")


def test_ranks_share_one_index(tmp_path: Path, model: str, sources: dict[str, str]) -> None:
    (first, indexed), (second, also_indexed) = run_ranks(load_on_rank, 2, tmp_path / "cache", model, sources["mosaic"])
    assert first == second
    assert bool(indexed) != bool(also_indexed)
