"""A sharded run starts, trains, stops and resumes on devices that cannot hold the whole model.

    python benchmarks/sharded_start.py                          # 2 CUDA devices: 1.2 billion parameters, 4.6 GiB
    python benchmarks/sharded_start.py --ranks 4 --resume-ranks 2 --lora-rank 0 --cap 3.3          # 4 CUDA devices
    python benchmarks/sharded_start.py --device cpu --layers 8 --width 128          # gloo, under a minute

A Llama is written to a temporary folder. One process then tries to start it whole, and ``--ranks`` start it with
``--parallel fsdp``, train two updates, save and stop; ``--resume-ranks`` new processes resume it for two more. The
saved folder is then loaded by transformers alone, in one process. On CUDA every process is
capped at ``--cap`` times the bytes of the model by `torch.cuda.set_per_process_memory_fraction`, so the whole model
runs out of memory. The table has, per rank, the highest bytes on the device at start and at resume, before the first
update, and the bytes read from safetensors files: slices of tensors, and files hashed to verify the checkpoint. On the
CPU nothing is capped, and the bytes are counted by `AllocationTracker`.

With adapters (``--lora-rank``, the default) a rank holds its share of the frozen weights. Without them, AdamW and
gradient sums add three times as much: pass ``--lora-rank 0 --cap 3.3``.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import safetensors
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers.utils import logging

from bigbatch.errors import MemoryLimitError
from bigbatch.lm.checkpoint import sharded_reader
from bigbatch.lm.checkpoint.run_checkpoint import load
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.runs.directory import ReadOnlyRunDirectory, RunDirectory
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.memory.allocation_tracker import AllocationTracker

SENTENCES = [f"the value of item {i} is {i * i % 97} and of the next one {(i + 1) ** 2 % 97}" for i in range(400)]


def write_inputs(folder: Path, *, layers: int, width: int) -> int:
    """Write data and model; return the bytes of the model's parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    tokenizer = train_tokenizer(SENTENCES, vocabulary_size=400)
    shape = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": max(2, width // 64), "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, bos_token_id=0, eos_token_id=1))
    logging.disable_progress_bar()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return sum(parameter.nbytes for parameter in model.parameters())


# what is counted -------------------------------------------------------------------------------------------------


@dataclass
class ReadBytes:
    """Bytes read from safetensors files by this process."""

    slices: int = 0
    hashed: int = 0


@dataclass(eq=False)
class CountedSlices:
    """A safetensors file, or a tensor in it, whose slices are counted as they are read."""

    real: Any
    read: ReadBytes

    def __enter__(self) -> "CountedSlices":
        self.real.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.real.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_slice(self, name: str) -> "CountedSlices":
        """Open one tensor."""
        return CountedSlices(self.real.get_slice(name), self.read)

    def __getitem__(self, region: Any) -> Tensor:
        piece: Tensor = self.real[region]
        self.read.slices += piece.nbytes
        return piece


def count_reads() -> ReadBytes:
    """Count what this process reads from now on."""
    read, open_file, digest = ReadBytes(), safetensors.safe_open, sharded_reader.file_digest

    def counted_digest(file: Any, name: str) -> Any:
        found = digest(file, name)
        read.hashed += file.tell()
        return found

    safetensors.safe_open = lambda *words, **options: CountedSlices(open_file(*words, **options), read)
    sharded_reader.file_digest = counted_digest
    return read


@contextmanager
def counted_peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the highest bytes on the device so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
    else:
        with AllocationTracker(device) as tracker:
            yield lambda: tracker.peak_bytes


# what processes do -----------------------------------------------------------------------------------------------


@dataclass
class CountingCallback:
    """A callback that counts updates."""

    updates: int = 0

    def on_update(self, row: Any) -> None:
        """Count."""
        self.updates += 1

    def on_validation(self, step: int, loss: float) -> None:
        """Do nothing."""

    def on_sample(self, step: int, text: str) -> None:
        """Do nothing."""


def train(rank: int, size: int, folder: Path, options: argparse.Namespace, cap_bytes: int, phase: str) -> None:
    """Start or resume on one rank, train two updates, and write what was counted."""
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes), device)
    else:
        torch.set_num_threads(1)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = f"file://{folder}/store-{phase}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    result: dict[str, Any] = {}
    try:
        result = _run(RankContext(size, rank, size, "fsdp"), folder, options, device, resumes=phase == "resume")
    except (torch.OutOfMemoryError, MemoryLimitError) as error:
        result = {"error": str(error).partition(". ")[0]}
    (folder / f"{phase}-{rank}.json").write_text(json.dumps(result))
    if size > 1:
        dist.destroy_process_group()


def _run(
    ranks: RankContext, folder: Path, options: argparse.Namespace, device: torch.device, *, resumes: bool
) -> dict[str, Any]:
    path = folder / ("run" if ranks.size > 1 else "whole")
    config = TrainConfig(
        data=str(folder / "data.jsonl"), model=str(folder / "model"), out=path, steps=4, global_batch=16,
        microbatch=4, max_length=64, validation_fraction=0, lora_rank=options.lora_rank, device=options.device,
        gradient_checkpointing="full", compile="none", layout="padded", parallel="fsdp",
    )  # fmt: skip
    logging.disable_progress_bar()
    read = count_reads()
    with counted_peak(device) as peak:
        checkpoint, _ = load(path, ranks) if resumes else (None, ())
        trainer = Trainer(set_up_training(config, ranks=ranks), checkpoint=checkpoint, ranks=ranks)
        if checkpoint is not None:
            checkpoint.restore(trainer.engine, trainer.optimizer, ranks, device)
        result = {"peak": peak(), "slices": read.slices, "hashed": read.hashed}
    callback, stops = CountingCallback(), not resumes
    last = 2 if ranks.size == 1 else 1  # ranks agree about stopping within an update, before its callback
    directory: RunDirectory = ReadOnlyRunDirectory(path)
    if ranks.is_first:
        directory = RunDirectory(path) if resumes else RunDirectory.create(path, config.model_dump(mode="json"))
    outcome = trainer.run(directory, callback=callback, should_stop=lambda: stops and callback.updates >= last)
    trained = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {**result, "trained": trained, "step": outcome.step, "finished": outcome.finished}


def describe_folder(path: Path, full_bytes: int) -> str:
    """Load what a run has saved as anyone would, and say what it is."""
    from transformers import AutoModelForCausalLM

    saved = path / ("adapter" if (path / "adapter").is_dir() else "model")
    files = ", ".join(sorted(file.name for file in saved.iterdir()))
    if saved.name == "adapter":
        return f"{saved.name}/: {files}"
    model = AutoModelForCausalLM.from_pretrained(saved, local_files_only=True)
    parameters = list(model.parameters())
    assert sum(parameter.nbytes for parameter in parameters) == full_bytes, "a part of the model is missing"
    assert all(parameter.isfinite().all() for parameter in parameters), "weights are not finite"
    return f"{saved.name}/, loaded by transformers: {full_bytes / 2**20:,.1f} MiB in {files}"


# the table -------------------------------------------------------------------------------------------------------


def run_phase(size: int, *arguments: Any, phase: str, folder: Path) -> list[dict[str, Any]]:
    """Run one phase in processes of its own; return what each rank counted."""
    mp.spawn(train, args=(size, folder, *arguments, phase), nprocs=size)
    return [json.loads((folder / f"{phase}-{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--lora-rank", type=int, default=8, help="0 trains all weights")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--resume-ranks", type=int, help="default: as many")
    parser.add_argument("--cap", type=float, default=0.85, help="of each CUDA device, in bytes of the model")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        full_bytes = write_inputs(folder, layers=options.layers, width=options.width)
        cap_bytes = int(options.cap * full_bytes)
        capped = f"cap {cap_bytes / 2**20:,.0f} MiB" if options.device == "cuda" else "no cap"
        print(
            f"{name}, torch {torch.__version__}, {options.ranks} ranks; model {full_bytes / 2**20:,.1f} MiB, {capped}"
        )
        print(f"{'':<16}{'rank':>5}{'peak MiB':>11}{'of model':>10}{'slices MiB':>12}{'hashed MiB':>12}  then")
        again = options.resume_ranks or options.ranks
        for phase, size in (("whole", 1), ("start", options.ranks), ("resume", again)):
            rows = run_phase(size, options, cap_bytes, phase=phase, folder=folder)
            for rank, row in enumerate(rows):
                print(_line(phase, rank, row, full_bytes), flush=True)
        print(describe_folder(folder / "run", full_bytes))


def _line(phase: str, rank: int, row: dict[str, Any], full_bytes: int) -> str:
    if "error" in row:
        return f"{phase:<16}{rank:>5}  {row['error']}"
    peak, slices, hashed = (row[name] / 2**20 for name in ("peak", "slices", "hashed"))
    trained = "" if row["trained"] is None else f", {row['trained'] / 2**20:,.1f} MiB at most while training"
    ended = f"{'finished' if row['finished'] else 'stopped'} after update {row['step']}{trained}"
    return (
        f"{phase:<16}{rank:>5}{peak:>11,.1f}{row['peak'] / full_bytes:>10.2f}{slices:>12,.1f}{hashed:>12,.1f}  {ended}"
    )


if __name__ == "__main__":
    main()
