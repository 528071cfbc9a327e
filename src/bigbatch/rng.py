"""Random generators of this process: torch on the CPU and on CUDA devices, ``random``, and NumPy if it is loaded."""

import random
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch


def random_states(devices: Sequence[torch.device] = ()) -> dict[str, Any]:
    """Return the states of all generators.

    Args:
        devices: CUDA devices to include; devices of other types are ignored.

    Returns:
        Tensors and plain values, under ``cpu``, ``devices``, ``python`` and ``numpy``.
    """
    numpy = sys.modules["numpy"].random.get_state(legacy=False) if "numpy" in sys.modules else None
    if numpy is not None:
        numpy = {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}}
    return {
        "cpu": torch.get_rng_state(),
        "devices": [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"],
        "python": random.getstate(),
        "numpy": numpy,
    }


def set_random_states(states: Mapping[str, Any], devices: Sequence[torch.device] = ()) -> None:
    """Set the states of all generators; ignore states of devices or libraries that are no longer available.

    Args:
        states: Returned by `random_states`.
        devices: The devices passed to `random_states`, in the same order.
    """
    torch.set_rng_state(states["cpu"])
    on_cuda = [device for device in devices if device.type == "cuda"]
    for device, state in zip(on_cuda, states["devices"], strict=False):
        torch.cuda.set_rng_state(state, device)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if states["numpy"] is not None and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        key = numpy.array(states["numpy"]["state"]["key"], dtype="uint32")
        numpy.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})


def states_of_seed(seed: int, devices: Sequence[torch.device] = ()) -> dict[str, Any]:
    """Return the states that `seed_everything` sets, without changing the generators."""
    before = random_states(devices)
    seed_everything(seed)
    try:
        return random_states(devices)
    finally:
        set_random_states(before, devices)


def seed_everything(seed: int) -> None:
    """Seed all generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """Return the 32-bit seed of a rank from an update onwards; ``seed`` itself for rank 0 at step 0."""
    if not rank and not step:
        return seed
    return int.from_bytes(sha256(f"seed {seed} rank {rank} step {step}".encode()).digest()[:4], "big")
