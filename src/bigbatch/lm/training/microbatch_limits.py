"""What limits the micro-batch of a run, as its settings say."""

from typing import Literal

from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.memory.limit import gpu_limit
from bigbatch.memory.usage import MemoryBudget, resolve_memory_budget

SHARED_PERCENT = 80  # of a machine's memory, for all ranks on its processors together
REPEATABLE = 8  # of the longest sequences in a micro-batch, where a choice by the clock is not wanted


def microbatch_of(
    config: TrainConfig, *, longest: int, ranks: RankContext = SINGLE_PROCESS
) -> "int | TokenBudget | Literal['auto']":
    """Give what `bigbatch.Engine` takes.

    Args:
        config: With every default written out.
        longest: Tokens of the longest sequence.
        ranks: The processes of the run.

    Raises:
        InputError: The longest sequence is above the budget that was asked for, or the ranks of a sharded model cannot
            do what is asked.
    """
    if config.async_checkpoint and ranks.are_sharded:
        raise InputError(
            f"--async-checkpoint writes from one process, and with --parallel {config.parallel} every rank writes its "
            "shards: leave it out."
        )
    if config.token_budget is not None:
        if longest > config.token_budget:
            raise InputError(
                f"--token-budget {config.token_budget} is less than the longest sequence, which has {longest} tokens "
                f"and is never cut: pass --token-budget {longest} or more, or a smaller --max-length."
            )
        return TokenBudget(config.token_budget)
    assert config.microbatch is not None, "resolved() gives one of the two"
    if config.microbatch == "auto" and config.deterministic:
        return TokenBudget(REPEATABLE * longest)
    if config.microbatch == "auto" and ranks.are_sharded:
        raise InputError(
            f"--parallel {config.parallel} cannot try micro-batches until one does not fit, since its ranks cannot go "
            "on after that: pass --token-budget or --microbatch."
        )
    return config.microbatch


def memory_of(config: TrainConfig, device_spec: DeviceSpec, *, ranks: RankContext = SINGLE_PROCESS) -> str | int | None:
    """Give what ``auto`` may use; None where nobody said. Ranks on the processors of one machine share its memory.

    Raises:
        InputError: Memory was given, and the micro-batch is decided; or a card, and the run is not on one.
    """
    name = "memory" if config.memory is not None else "gpu" if config.gpu is not None else None
    if name is None:
        shares = config.microbatch == "auto" and not config.deterministic and device_spec.device.type == "cpu"
        return f"{SHARED_PERCENT // ranks.local_size}%" if shares and ranks.local_size > 1 else None
    decided = "token_budget" if config.token_budget is not None else "microbatch"
    if config.microbatch != "auto":
        raise InputError(
            f"--{name} decides about the micro-batch, and --{decided.replace('_', '-')} {getattr(config, decided)} has "
            "decided: leave one of them out."
        )
    if config.deterministic:
        raise InputError(
            f"--{name} is for a micro-batch that is chosen by the clock, which --deterministic leaves out: pass "
            f"--token-budget instead of --{name}."
        )
    if config.gpu is None:
        return config.memory
    if device_spec.device.type != "cuda":
        raise InputError(f"--gpu {config.gpu} is about a card, and this run is on {device_spec.device}: pass --memory.")
    return gpu_limit(config.gpu)


def enforce_memory_budget(memory: str | int | None, setup: TrainingSetup) -> MemoryBudget:
    """Find what a run may use, and hold this process to it where it was asked for.

    Raises:
        InputError: It is no amount, or more than there is.
    """
    device_spec, model = setup.device_spec, setup.model
    try:
        budget = resolve_memory_budget(memory, device_spec.device, [*model.parameters(), *model.buffers()])
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if memory is not None:
        device_spec.limit_memory(budget.limit_bytes)
    return budget
