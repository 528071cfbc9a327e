"""Ranks of a process group that accelerate, and so a Trainer, recognizes as its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState


@contextmanager
def known_to_accelerate() -> Iterator[None]:
    """Make trainers that are made inside see the ranks of the process group of this process."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    found = dict(os.environ)
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost", MASTER_PORT="1")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(found)
