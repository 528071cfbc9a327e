"""Rules between reproducible updates and the other settings of a run. No torch here."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

from bigbatch.lm.config.reproducible_fields import DEFAULT_QUANTUM
from bigbatch.lm.config.train_fields import TrainFields


def check_reproducible(config: TrainFields) -> None:
    """Refuse the settings that reproducible updates exclude.

    Raises:
        PydanticCustomError: There is such a setting.
    """
    if config.precision == "fp16":
        raise PydanticCustomError(
            "unsupported",
            "{first} adds gradients in float32 or bfloat16, not those of {second} {precision}: use bf16 or float32",
            {"first": "reproducible", "second": "precision", "precision": config.precision},
        )
    if config.parallel != "ddp":
        raise PydanticCustomError(
            "sharded",
            "{first} needs whole gradients on every rank, which {second} fsdp and hsdp shard: use ddp",
            {"first": "reproducible", "second": "parallel"},
        )
    if config.objective == "embedding":
        names = {"first": "reproducible", "second": "objective"}
        raise PydanticCustomError(
            "unsupported",
            "{first} is not supported with {second} embedding, whose loss compares all samples of a batch: "
            "leave one out",
            names,
        )
    if config.compile == "graphs":
        names = {"first": "reproducible", "second": "compile"}
        raise PydanticCustomError(
            "exclusive", "{first} excludes {second} graphs, which do not capture quanta: use layers or none", names
        )
    quantum = config.quantum or DEFAULT_QUANTUM
    if isinstance(config.microbatch, int) and config.microbatch % quantum:
        raise PydanticCustomError(
            "out_of_range",
            "{first} {microbatch} is no whole number of quanta: pass a multiple of {second}, {quantum}",
            {"first": "microbatch", "second": "quantum", "microbatch": config.microbatch, "quantum": quantum},
        )
