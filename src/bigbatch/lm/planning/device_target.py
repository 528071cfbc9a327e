"""What a run is planned for: a device of this machine, or a card that is somewhere else, and its memory."""

from dataclasses import dataclass

import torch

from bigbatch.autotune.peak_prediction import stand_in_for
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import Machine, find_machine
from bigbatch.memory.limit import describe_bytes, gpu_limit, parse_memory
from bigbatch.memory.usage import Room, find_room


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        name: Of the device, with the precision.
        device: Its kind; it need not be here.
        machine: Where the step is rehearsed, and in which precision it is to run.
        room: The memory; None where it is not known.
        here: Whether the run could begin on this machine.
    """

    name: str
    device: torch.device
    machine: Machine
    room: Room | None
    here: bool

    @property
    def notes(self) -> list[str]:
        """What is behind the figures that a user would not expect."""
        if self.device.type == self.machine.device.type:
            return []
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return [f"torch {why} here: memory is that of the CPU's operations, counted as CUDA counts"]


def find_target(config: TrainConfig) -> Target:
    """Find what a plan is for: a card by its name, a device of this machine, or a CUDA device that is not here.

    Raises:
        InputError: The memory that is asked for is more than there is, a share of what is not known, or not known where
            the micro-batch depends on it; or a card is named beside another device.
    """
    if config.gpu is not None and not config.device.startswith(("auto", "cuda")):
        raise InputError(f"--gpu {config.gpu} and --device {config.device} exclude each other: give one of them.")
    elsewhere = config.gpu is not None or (config.device.startswith("cuda") and not torch.cuda.is_available())
    try:
        return _elsewhere(config) if elsewhere else _here(config)
    except InputError:
        raise
    except ValueError as error:  # about the memory, which it calls by the name of the flag
        raise InputError(f"--{error}") from error


def _here(config: TrainConfig) -> Target:
    machine = find_machine(config.device, config.precision)
    return Target(str(machine), machine.device, machine, find_room(config.memory, machine.device, ()), True)


def _elsewhere(config: TrainConfig) -> Target:
    device = torch.device("cuda")
    machine = Machine(stand_in_for(device), "bf16" if config.precision == "auto" else config.precision)
    room = None
    if config.gpu is not None:
        limit_bytes = gpu_limit(config.gpu)
        room = Room.of(limit_bytes, f"the {describe_bytes(limit_bytes)} that are usually free on {config.gpu}")
    elif config.memory is not None:
        room = Room.of(parse_memory(config.memory).bytes_of(), config.memory)
    elif config.microbatch == "auto":
        raise InputError(
            f"--device {config.device} is not here, so its memory is not known: name a card, such as --gpu h100, or an "
            "amount, such as --memory 24GiB, or give --microbatch or --token-budget."
        )
    return Target(f"{config.gpu or 'a CUDA device'}, {machine.precision}", device, machine, room, False)
