"""Random generators of this process: torch on the CPU and on CUDA devices, ``random``, and NumPy if it is loaded."""

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    torch.set_rng_state(states["cpu"].cpu())
    on_cuda = [device for device in devices if device.type == "cuda"]
    for device, state in zip(on_cuda, states["devices"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if states["numpy"] is not None and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        key = numpy.array(states["numpy"]["state"]["key"], dtype="uint32")
        numpy.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})


def same_random_states(states: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether no generator differs in two states of `random_states`, of the same devices."""
    pairs = zip([states["cpu"], *states["devices"]], [others["cpu"], *others["devices"]], strict=True)
    same = all(torch.equal(state, other) for state, other in pairs)
    return same and all(states[name] == others[name] for name in ("python", "numpy"))


def check_random_states(states: Any, devices: Sequence[torch.device] = ()) -> None:
    """Check that `set_random_states` accepts states; no generator is changed.

    Args:
        states: Returned by `random_states`.
        devices: As for `set_random_states`.

    Raises:
        ValueError: A state is missing, or is not one of its generator.
    """
    if not isinstance(states, Mapping):
        raise ValueError(f"the random states are {states!r:.40}, not a dictionary: use those of random_states().")
    names = {"cpu", "devices", "python", "numpy"}
    if states.keys() != names:
        found = ", ".join(sorted(map(str, states)))
        raise ValueError(f"the random states are of {found}, not of {', '.join(sorted(names))}: use all of them.")
    if not isinstance(states["devices"], list | tuple):
        raise ValueError("the random states of devices are not a list: use those of random_states().")
    on_cuda = [device for device in devices if device.type == "cuda"]
    checks: list[tuple[str, Callable[[], object]]] = [("cpu", lambda: _check_torch_state(states["cpu"], "cpu"))]
    for index, state in enumerate(states["devices"]):
        device = on_cuda[index] if index < len(on_cuda) else None
        checks.append((f"devices.{index}", partial(_check_torch_state, state, device)))
    checks += [("python", lambda: _check_python_state(states["python"]))]
    checks += [("numpy", lambda: _check_numpy_state(states["numpy"]))] if states["numpy"] is not None else []
    for name, check in checks:
        try:
            check()
        except (TypeError, ValueError, RuntimeError, LookupError, OverflowError, AttributeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"the random state {name} is not one of its generator ({reason}): use the states of random_states()."
            ) from error


def _check_torch_state(state: Any, device: torch.device | str | None) -> None:
    """Set a new generator to a state; without a device only its type is checked."""
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.ndim != 1 or state.is_meta:
        raise TypeError("not a uint8 tensor of one dimension")
    if device is not None:
        torch.Generator(device).set_state(state.cpu())


def _check_python_state(state: Any) -> None:
    version, internal, gauss = state
    *_, place = _check_words(internal, 625)
    if place > 624 or not (gauss is None or _is_finite(gauss)):
        raise ValueError("its position or its normal number is invalid")
    random.Random().setstate((version, tuple(internal), gauss))


def _check_numpy_state(state: Any) -> None:
    if not isinstance(state, Mapping) or not isinstance(state["state"], Mapping):
        raise TypeError("not a dictionary")
    _check_words(state["state"]["key"], 624)
    has_gauss, gauss, place = state["has_gauss"], state["gauss"], state["state"]["pos"]
    if state["bit_generator"] != "MT19937" or type(place) is not int or not 0 <= place <= 624:
        raise ValueError("another generator, or its position is invalid")
    if type(has_gauss) is not int or has_gauss not in (0, 1) or not _is_finite(gauss):
        raise ValueError("its normal number is invalid")


def _is_finite(number: Any) -> bool:
    return isinstance(number, float) and math.isfinite(number)


def _check_words(words: Any, count: int) -> Sequence[int]:
    if not isinstance(words, list | tuple) or len(words) != count:
        raise ValueError(f"not a list of {count} numbers")
    if not all(type(word) is int and 0 <= word < 2**32 for word in words):
        raise ValueError("a number that is not of 32 bits")
    return words


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


def seed_of_quantum(seed: int, window: int, quantum: int) -> int:
    """Return the 63-bit seed of a quantum, by its position in the global batch of a window."""
    digest = sha256(f"seed {seed} window {window} quantum {quantum}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the host and of one device.

    As `seed_everything`, in 12 µs instead of 100 and more: `torch.manual_seed` visits every kind of device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
