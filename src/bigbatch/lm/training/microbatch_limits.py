"""Limits of the micro-batch of a run, from its configuration."""

from typing import Literal

from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec, check_gpu
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.memory.limit import gpu_limit
from bigbatch.memory.usage import MemoryBudget, resolve_memory_budget

SHARED_PERCENT = 80  # of the host memory, shared by all ranks of a machine that run on the CPU
REPEATABLE = 8  # longest sequences per micro-batch under --deterministic, which excludes a choice by timing


def microbatch_of(
    config: TrainConfig, *, longest: int, ranks: RankContext = SINGLE_PROCESS
) -> "int | TokenBudget | Literal['auto']":
    """Return the ``microbatch`` argument of `bigbatch.Engine`.

    Args:
        config: With every default resolved.
        longest: Tokens of the longest sequence.
        ranks: The processes of the run.

    Raises:
        InputError: The longest sequence exceeds --token-budget, or a setting is not supported for sharded models.
    """
    if config.async_checkpoint and ranks.are_sharded:
        raise InputError(
            f"--async-checkpoint is not supported with --parallel {config.parallel}, where every rank writes its "
            "shards. Remove it."
        )
    if config.token_budget is not None:
        if longest > config.token_budget:
            raise InputError(
                f"--token-budget {config.token_budget} is less than the longest sequence, which has {longest} tokens "
                f"and is never cut: pass --token-budget {longest} or more, or a smaller --max-length."
            )
        return TokenBudget(config.token_budget)
    assert config.microbatch is not None, "set by resolved()"
    if config.microbatch == "auto" and config.deterministic:
        return TokenBudget(REPEATABLE * longest)
    if config.microbatch == "auto" and ranks.are_sharded:
        raise InputError(
            f"--microbatch auto of --parallel {config.parallel} is chosen by bigbatch train and bigbatch resume, by "
            "prediction: pass token_budget or microbatch here."
        )
    return config.microbatch


def memory_of(config: TrainConfig, device_spec: DeviceSpec, *, ranks: RankContext = SINGLE_PROCESS) -> str | int | None:
    """Return the memory limit for ``--microbatch auto``; None if not set. CPU ranks of one machine share its memory.

    Raises:
        InputError: --memory or --gpu is combined with a fixed micro-batch, or --gpu with a device that is not CUDA.
    """
    name = "memory" if config.memory is not None else "gpu" if config.gpu is not None else None
    if name is None:
        shares = config.microbatch == "auto" and not config.deterministic and device_spec.device.type == "cpu"
        return f"{SHARED_PERCENT // ranks.local_size}%" if shares and ranks.local_size > 1 else None
    decided = "token_budget" if config.token_budget is not None else "microbatch"
    if config.microbatch != "auto" and not config.reproducible:
        raise InputError(
            f"--{name} limits --microbatch auto and cannot be combined with --{decided.replace('_', '-')} "
            f"{getattr(config, decided)}. Remove one of them."
        )
    if config.deterministic:
        raise InputError(
            f"--{name} is for a micro-batch that is chosen by timing, which --deterministic excludes. Pass "
            f"--token-budget instead of --{name}."
        )
    if config.gpu is None:
        return config.memory
    check_gpu(config.gpu, device_spec.device)
    return gpu_limit(config.gpu)


def enforce_memory_budget(memory: str | int | None, setup: TrainingSetup) -> MemoryBudget:
    """Resolve the memory budget of a run; with an explicit limit, apply it to this process.

    Raises:
        InputError: The limit is not an amount of memory, or exceeds the device's.
    """
    device_spec, model = setup.device_spec, setup.model
    try:
        budget = resolve_memory_budget(memory, device_spec.device, [*model.parameters(), *model.buffers()])
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if memory is not None:
        device_spec.limit_memory(budget.limit_bytes)
    return budget
