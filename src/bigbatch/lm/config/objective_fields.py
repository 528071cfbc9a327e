"""The fields of a training run about its objective: what is learned from the data. No torch here."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bigbatch.lm.config.field_types import Number

DEFAULT_DPO_BETA = 0.1
DEFAULT_TEMPERATURE = 0.05
DEFAULT_LR_DPO = 1e-6
DEFAULT_LR_DPO_LORA = 1e-5
LOSS_UNITS = {
    "sft": "nats per token",
    "dpo": "nats per pair",
    "reward": "nats per pair",
    "embedding": "nats per example",
}
"""What the loss of an objective is measured in; that of the loss ipo is no logarithm."""

OF_OBJECTIVE = {
    "dpo_beta": "dpo",
    "dpo_loss": "dpo",
    "dpo_label_smoothing": "dpo",
    "center_rewards_coefficient": "reward",
    "pooling": "embedding",
    "temperature": "embedding",
}
"""Settings that belong to one objective."""


class _Idle(NamedTuple):
    """A setting that does nothing with some objectives, unless it has one of the values."""

    name: str
    values: tuple[Any, ...]
    objectives: tuple[str, ...] = ("dpo", "reward", "embedding")


_IDLE = (
    _Idle("train_on", ("all-assistant",)),
    _Idle("text_column", (None,)),
    _Idle("messages_column", (None,)),
    _Idle("router_aux_loss_coef", (None,)),
    _Idle("router_aux_loss", ("global",)),
    _Idle("logits", ("auto",)),
    _Idle("sample_prompt", (None, "def "), ("reward", "embedding")),
    _Idle("chat_template", (None,), ("embedding",)),
)
_UNSUPPORTED = (("layout", "packed", "padded"), ("compile", "layers", "none"), ("compile", "graphs", "none"))

_SFT_ALONE = {"quantize": "quantize", "model_config_path": "model_config"}
"""Settings that are supported for sft alone, with the names of their flags."""


class ObjectiveFields(BaseModel):
    """The fields of the group "objective" of ``--help``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["sft", "dpo", "reward", "embedding"] = Field(
        default="sft",
        description="what is learned. sft = to predict the next token; dpo = to prefer the chosen answer to the "
        "rejected one, by direct preference optimization; reward = a score for answers, from the same pairs; "
        "embedding = vectors of texts, from queries and passages. Each has its own records",
    )
    dpo_beta: Number | None = Field(
        default=None,
        gt=0,
        description="dpo: how strongly the model is held to the one that the run starts with (default: "
        f"{DEFAULT_DPO_BETA})",
    )
    dpo_loss: Literal["sigmoid", "ipo"] | None = Field(
        default=None, description="dpo: the loss of a pair, of DPO or of IPO (default: sigmoid)"
    )
    dpo_label_smoothing: Number | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        description="dpo: assumed share of pairs whose answers are exchanged, for the loss sigmoid (default: 0)",
    )
    center_rewards_coefficient: Number | None = Field(
        default=None,
        gt=0,
        description="reward: weight of the squared sum of the two scores of a pair, which centres scores at 0 "
        "(default: none)",
    )
    pooling: Literal["mean", "last"] | None = Field(
        default=None,
        description="embedding: the vector of a text is the mean of its tokens, or its last (default: mean)",
    )
    temperature: Number | None = Field(
        default=None,
        gt=0,
        description=f"embedding: divides the cosine similarities in the loss (default: {DEFAULT_TEMPERATURE})",
    )

    @property
    def beta(self) -> float:
        """``dpo_beta``, or its default."""
        return DEFAULT_DPO_BETA if self.dpo_beta is None else self.dpo_beta

    @property
    def similarity_temperature(self) -> float:
        """``temperature``, or its default."""
        return DEFAULT_TEMPERATURE if self.temperature is None else self.temperature

    @property
    def vector_pooling(self) -> Literal["mean", "last"]:
        """``pooling``, or its default."""
        return "mean" if self.pooling is None else self.pooling

    @property
    def loss_unit(self) -> str:
        """What the loss is measured in."""
        return "per pair" if self.dpo_loss == "ipo" else LOSS_UNITS[self.objective]

    @property
    def generates_text(self) -> bool:
        """Whether the trained model generates text."""
        return self.objective in ("sft", "dpo")

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        for name, objective in OF_OBJECTIVE.items():
            if getattr(self, name) is not None and self.objective != objective:
                raise _idle(name, self.objective)
        for idle in _IDLE:
            if self.objective in idle.objectives and getattr(self, idle.name, idle.values[0]) not in idle.values:
                raise _idle(idle.name, self.objective)
        for name, value, instead in _UNSUPPORTED:
            if self.objective != "sft" and getattr(self, name, None) == value:
                names = {"first": name, "second": "objective", "value": self.objective}
                raise PydanticCustomError(
                    "unsupported",
                    "{first} {asked} is not supported with {second} {value}: use auto or {instead}",
                    names | {"asked": value, "instead": instead},
                )
        for name, shown in _SFT_ALONE.items():
            if self.objective != "sft" and getattr(self, name, None) is not None:
                names = {"first": shown, "second": "objective", "value": self.objective}
                raise PydanticCustomError(
                    "unsupported", "{first} is not supported with {second} {value}: leave it out", names
                )
        if self.dpo_loss == "ipo" and self.dpo_label_smoothing is not None:
            names = {"first": "dpo_label_smoothing", "second": "dpo_loss", "value": "ipo"}
            raise PydanticCustomError("idle", "{first} does nothing with {second} {value}: remove it", names)
        return self


def _idle(name: str, objective: str) -> PydanticCustomError:
    names = {"first": name, "second": "objective", "value": objective}
    return PydanticCustomError("idle", "{first} does nothing with {second} {value}: remove it", names)
