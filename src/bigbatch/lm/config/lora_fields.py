"""The fields of a training run about LoRA adapters. No torch here."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bigbatch.lm.config.field_types import LARGEST_COUNT, LoraTargets, Number, Whole

IDLE_WITHOUT_RANK = ("lora_alpha", "lora_targets", "lora_dropout", "rslora", "dora")


class LoraFields(BaseModel):
    """The fields of the group "model" of ``--help`` about LoRA adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_rank: Whole = Field(
        default=0,
        ge=0,
        le=LARGEST_COUNT,
        description="rank of the LoRA adapters, such as 16, to train in less memory; 0 = train all weights. The run "
        "saves adapter/, for PeftModel.from_pretrained and bigbatch merge, instead of model/",
    )
    lora_alpha: Number | None = Field(
        default=None,
        gt=0,
        description="LoRA scaling: adapter outputs are multiplied by alpha / rank (default: twice --lora-rank)",
    )
    lora_targets: LoraTargets | None = Field(
        default=None,
        json_schema_extra={"placeholder": "NAME,NAME,..."},
        description="linear layers that get an adapter, comma-separated, by the ends of their names, such as "
        "q_proj,v_proj (default: all-linear, all of them but the output layer)",
    )
    lora_dropout: Number = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="dropout of the inputs of the adapters. Its random numbers, and so the result, depend on the "
        "micro-batch",
    )
    rslora: bool = Field(
        default=False,
        strict=True,
        description="multiply adapter outputs by alpha / √rank instead of alpha / rank (rsLoRA), for high ranks",
    )
    dora: bool = Field(
        default=False,
        strict=True,
        description="also train the norm of each row of the adapted weights (DoRA); slower",
    )
    quantize: Literal["nf4", "nf4-double"] | None = Field(
        default=None,
        description="store the weights under the adapters in 4 bits, in blocks of 64 with a scale of 32 bits; "
        "nf4-double = with scales of 8 bits. Needs the package bitsandbytes, and CUDA or the CPU (default: none)",
    )

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        for name in IDLE_WITHOUT_RANK:
            if not self.lora_rank and getattr(self, name) not in (None, 0):
                names = {"first": name, "second": "lora_rank"}
                raise PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
        if self.quantize is not None and not self.lora_rank:
            names = {"first": "quantize", "second": "lora_rank"}
            raise PydanticCustomError(
                "idle", "{first} needs {second}: weights in 4 bits are not trained, only adapters on them", names
            )
        return self
