"""What ranks do in the tests of a sharded start: bytes on the device and bytes read, counted as they happen."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from bigbatch.lm.checkpoint import reader, sharded_reader
from bigbatch.lm.checkpoint.run_checkpoint import load
from bigbatch.lm.checkpoint.state_tree import bits, split_tensors
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.distributed.ranks import RankContext, gather_full_model
from bigbatch.lm.model.meta_model import copy_to_meta
from bigbatch.lm.training import text_sample
from bigbatch.lm.training.model_saver import ModelSaver
from bigbatch.lm.training.setup import TrainingSetup, set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.memory.allocation_tracker import AllocationTracker
from support.language_models import records

CPU = torch.device("cpu")


def save_deep_model(folder: Path, *, layers: int = 8, max_shard_size: str = "1GB") -> int:
    """Save a model of equal layers, which are most of it; return the bytes of its parameters in float32."""
    tokenizer = train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def this_rank(parallel: Any = "fsdp") -> RankContext:
    size = dist.get_world_size()
    return RankContext(size, dist.get_rank(), 2 if parallel == "hsdp" else size, parallel)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about parameters and buffers that a start decides, with the bits of their values."""
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        values = bits(whole).numpy().tobytes()
        found[name] = (tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad, str(tensor.device), values)
    return found


def ties_of(model: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names: dict[Tensor, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return {frozenset(named) for named in names.values() if len(named) > 1}


def describe(setup: TrainingSetup) -> dict[str, Any]:
    """What set-up decided, and the model."""
    model = setup.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "state": state_of(model),
        "ties": ties_of(model),
        "attention": base.config._attn_implementation,
        "dtype": str(base.config.dtype),
        "generation": base.generation_config.to_dict(),
        "layout": setup.model_setup.layout,
        "loss": type(setup.loss_fn).__name__,
        "mode": None if setup.model_setup.layers is None else setup.model_setup.layers.mode,
        "training": model.training,
        "notes": [note for note in setup.notes if not note.startswith("token cache: ")],  # of the first process
    }


def start(settings: dict[str, Any], parallel: str = "fsdp") -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Start sharded; describe it, and on the first rank its model when it was gathered for the final save."""
    ranks = this_rank(parallel)
    setup = set_up_training(TrainConfig(**settings), ranks=ranks)
    assert all(p.is_meta or p.requires_grad for p in setup.model.parameters()), "only adapters have values yet"
    empty = copy_to_meta(setup.model)
    trainer = Trainer(setup, ranks=ranks)
    found = describe(setup) | {"frozen": trainer.facts["frozen_sha256"]}
    whole = gather_full_model(setup.model, empty)
    return found, state_of(whole) if ranks.is_first else None


def measure_start(settings: dict[str, Any]) -> dict[str, int]:
    """Count what is on the device at most while a sharded run starts, and the bytes read from the model's files."""
    with counted_reads() as read, DeviceTracker() as tracker:
        ranks = this_rank()
        setup = set_up_training(TrainConfig(**settings), ranks=ranks)
        Trainer(setup, ranks=ranks)
    own = sum(p.to_local().nbytes for p in setup.model.parameters() if isinstance(p, DTensor))
    return {"peak": tracker.peak_bytes, "own": own, **read}


def measure_resume(settings: dict[str, Any], run: Path) -> dict[str, int]:
    """Count the same while a run is resumed."""
    with counted_reads() as read, DeviceTracker() as tracker:
        ranks = this_rank()
        checkpoint, _ = load(run, ranks)
        trainer = Trainer(set_up_training(TrainConfig(**settings), ranks=ranks), checkpoint=checkpoint, ranks=ranks)
        before = dict(read)  # the model's own files were read until here
        assert checkpoint is not None
        checkpoint.restore(trainer.engine, trainer.optimizer, ranks, CPU)
    _, tensors = split_tensors(trainer.engine.state_dict())
    own = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())
    return {
        "peak": tracker.peak_bytes,
        "own": own,
        **{kind: read[kind] - before[kind] * (kind == "slices") for kind in read},
    }


@contextmanager
def counted_reads() -> Iterator[dict[str, int]]:
    """Count bytes read from safetensors files by slices, by hashing, and of whole small files."""
    read = {"slices": 0, "hashed": 0, "whole": 0}

    def add(kind: str, num_bytes: int) -> None:
        read[kind] += num_bytes

    digest, checked = sharded_reader.file_digest, reader.checked_bytes

    def counted_digest(file: Any, name: str) -> Any:
        found = digest(file, name)
        add("hashed", file.tell())
        return found

    def counted_bytes(*words: Any) -> bytes:
        found = checked(*words)
        add("whole", len(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        opened = safetensors.safe_open
        patch.setattr(safetensors, "safe_open", lambda *a, **k: _CountedFile(opened(*a, **k), add))
        patch.setattr(sharded_reader, "file_digest", counted_digest)
        patch.setattr(sharded_reader, "checked_bytes", counted_bytes)
        patch.setattr(reader, "checked_bytes", counted_bytes)
        yield read


class _CountedFile:
    def __init__(self, file: Any, add: Callable[[str, int], None]) -> None:
        self._file, self._add = file, add

    def __enter__(self) -> "_CountedFile":
        self._file.__enter__()
        return self

    def __exit__(self, *words: Any) -> Any:
        return self._file.__exit__(*words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> "_CountedSlice":
        return _CountedSlice(self._file.get_slice(name), self._add)


class _CountedSlice:
    def __init__(self, view: Any, add: Callable[[str, int], None]) -> None:
        self._view, self._add = view, add

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def __getitem__(self, region: Any) -> Tensor:
        piece: Tensor = self._view[region]
        self._add("slices", piece.nbytes)
        return piece


class DeviceTracker(AllocationTracker):
    """Counts what this rank holds on the device, with what FSDP frees and takes by resizing storages."""

    def __init__(self) -> None:
        super().__init__(CPU)

    def __enter__(self) -> Self:
        resize = self._resize = torch.UntypedStorage.resize_

        def noticed(memory: torch.UntypedStorage, size: int) -> Any:
            result = resize(memory, size)
            if (storage := self._storages.get(memory._cdata)) is not None:
                self._count_storage(memory, storage.category)
            return result

        torch.UntypedStorage.resize_ = noticed  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)


# a cap on the device ---------------------------------------------------------------------------------------------


class CappedTracker(DeviceTracker):
    """Raises what CUDA raises as soon as more than so many bytes are on the device."""

    def __init__(self, cap_bytes: int) -> None:
        super().__init__()
        self.cap_bytes: float = cap_bytes

    def reset_peak(self) -> None:
        super().reset_peak()
        if self.peak_bytes > self.cap_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. The cap of {self.cap_bytes:,} bytes is exceeded")


def cap_memory(cap_bytes: int, rank: int) -> None:
    """Cap the device in a process that will run the command, but for what the first rank gathers on its host."""
    tracker = CappedTracker(cap_bytes)
    save = ModelSaver.save

    def save_on_host(self: ModelSaver, directory: Any) -> None:
        Path(f"peak-{rank}.json").write_text(json.dumps(tracker.peak_bytes))
        tracker.cap_bytes = float("inf")  # host and device are one memory here
        save(self, directory)

    ModelSaver.save = save_on_host  # type: ignore[method-assign]
    text_sample.SAMPLE_TOKENS = 2  # counting slows every operation down
    tracker.__enter__()
