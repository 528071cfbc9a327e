"""The fields of a training run about validation: its data, the best checkpoint and early stopping. No torch here."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bigbatch.errors import InputError
from bigbatch.lm.config.field_types import Count, Keep, Number, Patience, Text, Texts
from bigbatch.lm.config.validation_sets import primary_set, read_sets

DEFAULT_KEEP = 2
VALIDATIONS_PER_RUN = 10


class EvaluationFields(BaseModel):
    """The fields about validation and the checkpoints that are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation_data: Texts | None = Field(
        default=None,
        json_schema_extra={"several": True, "placeholder": "[NAME=]DATA"},
        description="validation data, never trained on: sources as in --data. With names, as in web=web.jsonl "
        "code=src/, each name is a set with its own loss (default: the split validation of a dataset, else what "
        "--validation-fraction holds out)",
    )
    validation_every: Count | None = Field(
        default=None,
        description=f"updates between two validations (default: about {VALIDATIONS_PER_RUN} validations per run)",
    )
    best_metric: Text | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"placeholder": "NAME"},
        description="name of the set of --validation-data whose loss is validation_loss in metrics.jsonl and decides "
        "for --keep best and --early-stopping (default: the first set)",
    )
    early_stopping: Patience = Field(
        default=None,
        json_schema_extra={"placeholder": "N|none"},
        description="end the run after N validations in a row without a lower validation loss; none = never "
        "(default: none)",
    )
    early_stopping_min_delta: Number = Field(
        default=0.0,
        ge=0,
        description="smallest decrease of the validation loss, in its unit (nats per token for sft), that "
        "--early-stopping counts as lower",
    )
    keep: Keep | None = Field(
        default=None,
        description="checkpoints to keep; older ones are deleted when a newer one is verified. best = the one with the "
        "lowest validation loss and the newest other one; at the end, model/ has the weights of the best (default: "
        f"{DEFAULT_KEEP}, or best with --early-stopping)",
    )

    @property
    def resolved_keep(self) -> int | Literal["best"]:
        """The checkpoints to keep, with the default filled in."""
        if self.keep is not None:
            return self.keep
        return DEFAULT_KEEP if self.early_stopping is None else "best"

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        names = {"first": "validation_data", "second": "best_metric"}
        try:
            sets = read_sets(self.validation_data or ())
        except ValueError as error:
            why = {"first": "validation_data", "why": str(error)}
            raise PydanticCustomError("named_sets", "{first} {why}", why) from None
        if self.best_metric is not None:
            if not sets:
                raise PydanticCustomError("idle", "{second} does nothing without {first}: give both", names)
            try:
                primary_set(sets, self.best_metric)
            except InputError as error:
                text = str(error).removeprefix("--best-metric").rstrip(".")
                raise PydanticCustomError("named_sets", "{second}{why}", names | {"why": text}) from None
        if self.early_stopping_min_delta and self.early_stopping is None:
            names = {"first": "early_stopping_min_delta", "second": "early_stopping"}
            raise PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
        return self
