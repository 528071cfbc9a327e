"""The configuration of a training run: one frozen, validated value shared by flags, TOML and ``config.json``.

    flags and TOML → TrainConfig → resolved() → the trainer, and config.json in the run directory

No torch here.

Long because all rules between two settings, and all defaults that follow from others, are in one place.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from bigbatch.lm.config.batch_schedule import read
from bigbatch.lm.config.evaluation_fields import VALIDATIONS_PER_RUN
from bigbatch.lm.config.field_groups import EXCLUSIVE
from bigbatch.lm.config.field_types import join_texts
from bigbatch.lm.config.objective_fields import DEFAULT_LR_DPO, DEFAULT_LR_DPO_LORA
from bigbatch.lm.config.optimization_fields import (
    DEFAULT_LR,
    DEFAULT_LR_LORA,
    DEFAULT_LR_PRETRAINING,
    DEFAULT_LR_TINY,
    WARMUP_PERCENT,
)
from bigbatch.lm.config.optimizer_settings import (
    DECAY_PERCENT,
    FINAL_LR_FACTORS,
    LR_FACTORS,
    SETTINGS,
    unused_settings,
)
from bigbatch.lm.config.precision_rules import check_8bit, check_fp8
from bigbatch.lm.config.reproducible_fields import DEFAULT_QUANTUM
from bigbatch.lm.config.reproducible_rules import check_reproducible
from bigbatch.lm.config.scale_from import BatchScaling
from bigbatch.lm.config.train_fields import (
    DEFAULT_EPOCHS,
    DEFAULT_GLOBAL_BATCH,
    DEFAULT_MAX_LENGTH_TINY,
    DEFAULT_STEPS,
    TrainFields,
)


class TrainConfig(TrainFields):
    """Configuration of one training run; by default the small model on Python's own standard library.

    Where a default depends on other fields, the field is ``None`` until :meth:`resolved` fills it in; the trainer
    resolves the folder, the device and the precision. Unknown names are refused. ``model_dump(mode="json")`` validates
    back to an equal config.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) a value out of range, of the wrong type, or an unknown name.

    """

    def prompt(self, *, is_chat: bool) -> str:
        """Return ``sample_prompt``, or its default for runs that train on chats, or on other texts."""
        default = "Hello" if is_chat else "def "
        return default if self.sample_prompt is None else self.sample_prompt

    @model_validator(mode="after")
    def _check_exclusive(self) -> Self:
        for first, second in EXCLUSIVE:
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise _exclusive(first, second)
        return self

    @model_validator(mode="after")
    def _check_no_effect(self) -> Self:
        if self.router_aux_loss == "microbatch" and self.router_aux_loss_coef == 0:
            names = {"first": "router_aux_loss", "second": "router_aux_loss_coef"}
            raise PydanticCustomError("idle", "{first} does nothing with {second} 0: remove one of them", names)
        if self.warmup_steps is not None and self.steps is not None and self.warmup_steps > self.steps:
            names = {"first": "warmup_steps", "second": "steps"}
            raise PydanticCustomError(
                "idle", "{first} is more than {second}: the learning rate would never reach its peak", names
            )
        return self

    @model_validator(mode="after")
    def _check_reproducible(self) -> Self:
        if not self.reproducible:
            if self.quantum is not None:
                raise _no_effect("quantum", "reproducible")
            return self
        check_reproducible(self)
        return self

    @model_validator(mode="after")
    def _check_captured(self) -> Self:
        if self.compile == "graphs" and self.gradient_checkpointing == "offload":
            names = {"first": "gradient_checkpointing", "second": "compile"}
            raise PydanticCustomError(
                "exclusive", "{first} offload excludes {second} graphs: use layers or none", names
            )
        return self

    @property
    def quantum_in_use(self) -> int | None:
        """Sequences that are computed together; None without ``reproducible``."""
        return (self.quantum or DEFAULT_QUANTUM) if self.reproducible else None

    @property
    def saves_adapters(self) -> bool:
        """Whether the run saves its LoRA adapters; those of the tiny model, which no file holds, are merged into it."""
        return self.lora_rank > 0 and self.model != "tiny"

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data_weights is not None and len(self.data_weights) != len(self.data):
            names = {"first": "data_weights", "second": "data"}
            raise PydanticCustomError(
                "out_of_range",
                "{first} has {weights} and {second} has {sources}: give one weight for each source, in the same order",
                names | {"weights": len(self.data_weights), "sources": len(self.data)},
            )
        if self.no_cache and self.cache is not None:
            names = {"first": "no_cache", "second": "cache"}
            raise PydanticCustomError("exclusive", "{first} and {second} exclude each other: give one of them", names)
        return self

    @model_validator(mode="after")
    def _check_batch_schedule(self) -> Self:
        if self.global_batch_schedule is None:
            if self.rebase_second_moment:
                raise _no_effect("rebase_second_moment", "global_batch_schedule")
            return self
        first = read(self.global_batch_schedule).first
        if first is not None and self.global_batch not in (None, first):
            raise _exclusive("global_batch", "global_batch_schedule")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        given = {name: getattr(self, name) for name in ("beta1", "beta2", "eps", "momentum")}
        for name in unused_settings(self.optimizer, given):
            raise _not_of(name, "optimizer", self.optimizer)
        if self.lr is None and self.optimizer not in LR_FACTORS:
            names = {"first": "optimizer", "second": "lr", "value": self.optimizer}
            raise PydanticCustomError("no_lr", "{first} {value} has no default learning rate: pass {second}", names)
        if self.rebase_second_moment and self.optimizer != "adamw":
            raise _not_of("rebase_second_moment", "optimizer", self.optimizer)
        if self.optimizer == "adamw-8bit":
            check_8bit(self)
        if self.parallel != "ddp" and self.optimizer == "muon":
            names = {"first": "optimizer", "second": "parallel"}
            raise PydanticCustomError(
                "sharded", "{first} muon needs whole matrices, which {second} fsdp and hsdp shard: use ddp", names
            )
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload != "none" and self.parallel != "ddp":
            names = {"first": "offload", "second": "parallel", "value": self.offload}
            raise PydanticCustomError(
                "sharded",
                "{first} {value} is not supported with {second} fsdp and hsdp, which shard the optimizer state: use "
                "ddp, or {first} none",
                names,
            )
        if self.offload != "none" and self.optimizer == "adamw-8bit":
            names = {"first": "offload", "second": "optimizer", "value": self.offload}
            raise PydanticCustomError(
                "unsupported",
                "{first} {value} is not supported with {second} adamw-8bit, whose state is quantized: use adamw",
                names,
            )
        return self

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        if self.quantize is not None and self.model == "tiny":
            names = {"first": "quantize", "second": "model"}
            raise PydanticCustomError(
                "idle", "{first} is for adapters on a model that exists, not for {second} tiny: leave it out", names
            )
        if self.quantize is not None and self.parallel != "ddp":
            names = {"first": "quantize", "second": "parallel"}
            raise PydanticCustomError(
                "sharded",
                "{first} is not supported with {second} fsdp and hsdp, which shard the weights: use ddp",
                names,
            )
        return self

    @model_validator(mode="after")
    def _check_fp8(self) -> Self:
        if self.precision == "fp8":
            check_fp8(self)
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.min_lr is not None and self.schedule == "constant":
            raise _not_of("min_lr", "schedule", self.schedule)
        if self.decay_steps is not None and self.schedule != "wsd":
            raise _not_of("decay_steps", "schedule", self.schedule)
        lr = self.resolved().lr
        if self.min_lr is not None and lr is not None and self.min_lr > lr:
            names = {"first": "min_lr", "second": "lr", "lr": f"{lr:g}", "min_lr": f"{self.min_lr:g}"}
            raise PydanticCustomError("idle", "{first} {min_lr} is more than {second} {lr}: pass less", names)
        return self

    @model_validator(mode="after")
    def _check_lr_rule(self) -> Self:
        if self.lr_rule != "none" and self.scale_from is None:
            raise _no_effect("lr_rule", "scale_from")
        if self.lr_rule != "none" and self.optimizer not in ("adamw", "adamw-8bit", "sgd"):
            raise _not_of("lr_rule", "optimizer", self.optimizer)
        if (why := self.batch_scaling().problem()) is not None:
            names = {"first": "lr_rule", "second": "scale_from"}
            raise PydanticCustomError("out_of_range", "{why}", names | {"why": why})
        return self

    def batch_scaling(self) -> BatchScaling:
        """Return how ``scale_from`` and ``lr_rule`` change the hyperparameters."""
        config = self.resolved()
        batch = config.global_batch or config.global_batch_tokens
        assert batch is not None, "resolved() sets one of the two"
        assert config.lr is not None, "resolved() sets it"
        unit = "tokens" if config.global_batch is None else "sequences"
        return BatchScaling(
            config.lr, batch, unit, config.scale_from, config.lr_rule, config.optimizer, config.optimizer_settings()
        )

    def resolved(self) -> TrainConfig:
        """Return the same run with every default filled in that depends on the fields alone.

        Afterwards ``lr``, ``max_length`` of the tiny model, exactly one of ``global_batch`` and
        ``global_batch_tokens``, exactly one of ``steps`` and ``epochs``, and ``lora_alpha`` (when ``lora_rank`` is not
        0) are numbers, ``keep`` is a number or ``"best"``, and ``microbatch`` is ``"auto"`` or a number unless
        ``token_budget`` is one. Resolving twice
        changes nothing.
        """
        resolved: dict[str, int | float | str] = {}
        if self.max_length is None and self.model == "tiny":
            resolved["max_length"] = DEFAULT_MAX_LENGTH_TINY
        if self.global_batch is None and self.global_batch_tokens is None:
            schedule = None if self.global_batch_schedule is None else read(self.global_batch_schedule)
            resolved["global_batch"] = (
                DEFAULT_GLOBAL_BATCH if schedule is None else schedule.first or DEFAULT_GLOBAL_BATCH
            )
        if self.microbatch is None and self.token_budget is None:
            resolved["microbatch"] = "auto"
        if self.quantum_in_use is not None:
            resolved["quantum"] = self.quantum_in_use
            if self.microbatch in (None, "auto") and self.token_budget is None:
                resolved["microbatch"] = self.quantum_in_use  # nothing depends on it
        if self.steps is None and self.epochs is None:
            if self.data == ("python-stdlib",) and self.model == "tiny":
                resolved["steps"] = DEFAULT_STEPS
            else:
                resolved["epochs"] = DEFAULT_EPOCHS
        if self.lr is None:
            full_lr, lora_lr = DEFAULT_LR, DEFAULT_LR_LORA
            if self.objective == "dpo":
                full_lr, lora_lr = DEFAULT_LR_DPO, DEFAULT_LR_DPO_LORA
            if self.model == "tiny":
                full_lr = DEFAULT_LR_TINY
            full_lr = full_lr if self.model_config_path is None else DEFAULT_LR_PRETRAINING
            resolved["lr"] = LR_FACTORS[self.optimizer] * (lora_lr if self.lora_rank else full_lr)
        if self.keep is None:
            resolved["keep"] = self.resolved_keep
        if self.lora_alpha is None and self.lora_rank:
            resolved["lora_alpha"] = 2.0 * self.lora_rank
        return self.model_copy(update=resolved)

    @property
    def data_text(self) -> str:
        """The data as written on a command line: one name as it is, several separated by spaces."""
        return join_texts(self.data)

    def warmup_steps_of(self, total_steps: int) -> int:
        """Return the warm-up of a run of ``total_steps`` updates: as set, else 10 % of them, rounded down."""
        return total_steps * WARMUP_PERCENT // 100 if self.warmup_steps is None else self.warmup_steps

    def decay_steps_of(self, total_steps: int) -> int:
        """Return the updates of the decay of the schedule wsd: as set, else 20 % of them, and at least 1."""
        return max(1, total_steps * DECAY_PERCENT // 100) if self.decay_steps is None else self.decay_steps

    def final_lr_factor(self) -> float:
        """Return the learning rate of the last update, as a fraction of the peak; 1 for a constant one."""
        if self.min_lr is None:
            return FINAL_LR_FACTORS.get(self.schedule, 1.0)
        lr = self.resolved().lr
        assert lr is not None, "resolved() sets it"
        return self.min_lr / lr

    def optimizer_settings(self) -> dict[str, float]:
        """Return beta1, beta2, eps and momentum, as far as the optimizer has them, with its defaults."""
        given = {name: getattr(self, name) for name in SETTINGS[self.optimizer]}
        return {
            name: default if given[name] is None else given[name] for name, default in SETTINGS[self.optimizer].items()
        }

    def validation_every_of(self, total_steps: int) -> int:
        """Return the updates between two validations of a run of ``total_steps`` updates: at least 1."""
        return max(1, total_steps // VALIDATIONS_PER_RUN) if self.validation_every is None else self.validation_every


def _exclusive(first: str, second: str) -> PydanticCustomError:
    names = {"first": first, "second": second}
    return PydanticCustomError("exclusive", "{first} and {second} exclude each other: give one of them", names)


def _not_of(setting: str, choice: str, value: str) -> PydanticCustomError:
    names = {"first": setting, "second": choice, "value": value}
    return PydanticCustomError("idle", "{first} does nothing with {second} {value}: remove it", names)


def _no_effect(first: str, second: str) -> PydanticCustomError:
    names = {"first": first, "second": second}
    return PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
