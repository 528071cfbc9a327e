"""The fields of a training run that starts from a configuration instead of trained weights. No torch here."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bigbatch.lm.config.field_types import Text, TokenizerText

TRAINED_TOKENIZER = re.compile(r"train:([0-9]{1,9})")


class PretrainingFields(BaseModel):
    """The fields of the group "model" of ``--help`` about pretraining.

    pydantic reserves the attribute ``model_config``, so the field of ``--model-config`` has another name in Python; in
    files of settings and as an argument it is ``model_config``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    model_config_path: Text | None = Field(
        default=None,
        alias="model_config",
        min_length=1,
        json_schema_extra={"placeholder": "FILE|FOLDER"},
        description="pretrain a new model instead of --model: a config.json of transformers, or a folder with one. "
        "Weights are random, initialized as the model defines it, from --seed (default: none)",
    )
    tokenizer: TokenizerText | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"placeholder": "FOLDER|FILE|train:N"},
        description="tokenizer for --model-config: a folder, a tokenizer.json or a Hub name; train:N = train one of at "
        "most N tokens on the data (default: that in the folder of --model-config)",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_model(cls, values: Any) -> Any:
        """Set ``model``, the name of the model in messages and defaults, to the path of the configuration."""
        if isinstance(values, dict) and "model" not in values:
            path = values.get("model_config", values.get("model_config_path"))
            if isinstance(path, str):
                return {**values, "model": path}
        return values

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer: that of ``tokenizer``, else the model."""
        model: str = getattr(self, "model", "")
        return self.tokenizer or model

    @property
    def vocabulary_to_train(self) -> int | None:
        """The most tokens of a tokenizer that is trained on the data; None if it is loaded."""
        match = None if self.tokenizer is None else TRAINED_TOKENIZER.fullmatch(self.tokenizer)
        return None if match is None else int(match[1])

    @model_validator(mode="after")
    def _check_pretraining(self) -> Self:
        model: str = getattr(self, "model", "")
        if self.model_config_path is None:
            if self.tokenizer is not None:
                names = {"first": "tokenizer", "second": "model_config"}
                raise PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
            return self
        if model != self.model_config_path:
            names = {"first": "model", "second": "model_config"}
            raise PydanticCustomError("exclusive", "{first} and {second} exclude each other: give one of them", names)
        if getattr(self, "lora_rank", 0):
            names = {"first": "lora_rank", "second": "model_config"}
            raise PydanticCustomError(
                "idle",
                "{first} adapts weights that are trained, and those of {second} are random: leave one out",
                names,
            )
        return self
