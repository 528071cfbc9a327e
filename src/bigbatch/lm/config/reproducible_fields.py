"""The fields of a training run about reproducible updates."""

from __future__ import annotations

from pydantic import BaseModel, Field

from bigbatch.lm.config.field_types import Count

DEFAULT_QUANTUM = 2  # of --reproducible


class ReproducibleFields(BaseModel):
    """Whether updates are the same bits on any number of ranks, and the samples that are computed together."""

    reproducible: bool = Field(
        default=False,
        strict=True,
        description="the same bits for any micro-batch, memory limit and number of ranks, dropout included: quanta of "
        "sequences are computed one after the other, gradients are added as integers, and fingerprints of every "
        "update are written, for bigbatch diff",
    )
    quantum: Count | None = Field(
        default=None,
        description="sequences that are computed together under --reproducible, whatever the micro-batch is, which "
        "must be a multiple; more are faster and need more memory (default: 2)",
    )
