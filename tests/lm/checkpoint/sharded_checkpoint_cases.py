"""Functions that ranks run in test_sharded_checkpoint.py, with a small model.

The model has rows that no number of ranks divides, an empty shard, two dtypes and tied weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bigbatch.lm.checkpoint import newest, read
from bigbatch.lm.checkpoint.sharded_reader import read_into
from bigbatch.lm.checkpoint.sharded_writer import write_sharded
from bigbatch.lm.checkpoint.state_tree import join_tensors, split_tensors
from support.checkpoints import RUN_ID, bits

Bits = dict[str, tuple[str, tuple[int, ...], bytes]]


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows5 = nn.Linear(3, 5)
        self.tied = nn.Linear(3, 5, bias=False)
        self.tied.weight = self.rows5.weight
        self.bf16 = nn.Linear(5, 7, dtype=torch.bfloat16)
        self.row1 = nn.Linear(7, 1)
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        hidden = self.rows5(x) * self.tied(x)
        return self.row1(self.bf16(hidden.bfloat16()).float())


class Run:
    """A model and its optimizer with their saved state; ``kind`` is plain, fsdp or hsdp."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = TinyModel()
        if kind != "plain":
            size = torch.distributed.get_world_size()
            shape, names = ((2, size // 2), ("replicate", "shard")) if kind == "hsdp" else ((size,), ("shard",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            fully_shard(self.model.bf16, mesh=mesh)
            fully_shard(self.model.row1, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.train(seed)

    def train(self, seed: int) -> None:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        self.model(inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        named = {name: p.detach() for name, p in self.model.named_parameters()}
        return {"model": named | dict(self.model.named_buffers()), "optimizer": self.optimizer.state_dict()}

    def write(self, folder: Path, step: int) -> Path:
        return write_sharded(folder, step, run_id=RUN_ID, **parts_of(self.state()))

    def load(self, path: Path) -> None:
        _, tensors = split_tensors(self.state())
        contents = read_into(path, tensors)
        state = join_tensors(contents.values["state"], tensors)
        self.optimizer.load_state_dict(state["optimizer"])

    def load_whole(self, path: Path) -> None:
        contents = read(path)
        tensors = {place: t for part in contents.tensors.values() for place, t in part.items()}
        state = join_tensors(contents.values["state"], tensors)
        for name, tensor in self.state()["model"].items():
            tensor.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def bits(self) -> Bits:
        """Return the full state as bytes."""
        return bits_of(split_tensors(self.state())[1])


def parts_of(state: dict[str, Any]) -> dict[str, Any]:
    values, tensors = split_tensors(state)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for place, tensor in tensors.items():
        parts["model" if place.startswith("/model/") else "optimizer"][place] = tensor
    return {"tensors": parts, "values": {"state": values}}


def bits_of(tensors: dict[str, Tensor]) -> Bits:
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: (str(t.dtype), tuple(t.shape), bits(t)) for name, t in whole.items()}


# functions of the ranks ----------------------------------------------------------------------------------------------


def save(folder: Path, kind: str) -> tuple[Bits, Bits]:
    """Train and write step-2; return the state at that point and after another update."""
    run = Run(kind, 0)
    run.train(1)
    run.write(folder, 2)
    saved = run.bits()
    run.train(2)
    return saved, run.bits()


def load(folder: Path, kind: str) -> tuple[Bits, Bits]:
    """Load the newest checkpoint into a different run; return the state at that point and after another update."""
    run = Run(kind, 7)
    path, rejected = newest(folder)
    assert path is not None
    assert not rejected
    run.load(path)
    loaded = run.bits()
    run.train(2)
    return loaded, run.bits()


def load_and_save(folder: Path, kind: str, step: int) -> Bits:
    """Load the newest checkpoint, write it as another step, and return its state."""
    run = Run(kind, 8)
    path, _ = newest(folder)
    assert path is not None
    run.load(path)
    run.write(folder, step)
    return run.bits()
