"""Check the settings of `exact`, and the trainer: each refusal names the call to make instead."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.utils import is_sagemaker_dp_enabled, is_sagemaker_mp_enabled

from bigbatch.batching.plan import TokenBudget
from bigbatch.engine.checks import check_layout, check_microbatch
from bigbatch.errors import InputError
from bigbatch.integrations.transformers.unit_refusals import class_name, refuse_coupled_losses
from bigbatch.types import Layout


@dataclass(frozen=True)
class Settings:
    """Arguments of `exact`, checked.

    Raises:
        InputError: One is out of range, or two do not go together.
    """

    microbatch: int | TokenBudget | Literal["auto"] | None = None
    memory: str | int | None = None
    lengths: Callable[[list[Any]], Sequence[int]] | None = None
    layout: Layout = "padded"
    items: Literal["auto"] | Callable[[Mapping[str, Any]], int | float] = "auto"
    nonfinite: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        if self.items != "auto" and not callable(self.items):
            raise InputError(
                f'items is {self.items!r}: it must be "auto", or a function from a collated micro-batch to the number '
                "that the trainer's loss is averaged over."
            )
        if self.nonfinite not in ("skip", "raise"):
            raise InputError(f'nonfinite is {self.nonfinite!r}: it must be "skip" or "raise".')
        try:
            check_layout(self.layout, self.lengths, "the collator of the trainer")
            if self.microbatch is not None:
                check_microbatch(self.microbatch, self.memory, self.lengths)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    @property
    def needs_samples(self) -> bool:
        """Whether micro-batches are to be others than the batches of the loader."""
        return self.microbatch is not None or self.memory is not None

    def microbatch_for(self, train_batch_size: int) -> int | TokenBudget | Literal["auto"]:
        """Return the micro-batch for a trainer with this batch size per device."""
        if self.microbatch is not None:
            return self.microbatch
        return train_batch_size if self.memory is None else "auto"


def check_kind(trainer: object) -> Any:
    """Return an object after checking that it is a Trainer.

    Raises:
        InputError: It is not.
    """
    if not isinstance(trainer, Trainer):
        raise InputError(
            f"trainer is a {type(trainer).__name__}: pass a transformers.Trainer, or an instance of a subclass."
        )
    return trainer


def check_trainer(trainer: Any, settings: Settings) -> None:
    """Check that windows of a trainer can be run by an engine.

    Raises:
        InputError: Something about it makes exact updates impossible.
    """
    check_surroundings(trainer, instead="use weights(trainer, items=...) instead of exact(trainer).")
    count = _own_count(trainer) if settings.items == "auto" else None
    for problem in (_loss(trainer), count):
        if problem is not None:
            raise InputError(f"{type(trainer).__name__} {problem}")
    refuse_coupled_losses(trainer)
    if trainer.is_fsdp_enabled and settings.microbatch_for(1) == "auto":
        raise InputError(
            f"{class_name(trainer)} shards the model with FSDP, whose ranks cannot continue after one of them ran out "
            'of memory: pass microbatch= a number of samples or a TokenBudget instead of memory= or microbatch="auto".'
        )


def check_surroundings(trainer: Any, *, instead: str) -> None:
    """Check that an engine can run windows with the parallelism, the optimizer and the loader of a trainer.

    Args:
        trainer: A Trainer.
        instead: What to do where another library owns the gradients.

    Raises:
        InputError: It cannot.
    """
    for problem in (_parallelism(trainer, instead), _optimizer(trainer), _data(trainer)):
        if problem is not None:
            raise InputError(f"{type(trainer).__name__} {problem}")


def refuse_other_package(trainer: Any, package: str) -> None:
    """Refuse a trainer that the `exact` of another package was called on.

    Raises:
        InputError: It was.
    """
    other = getattr(trainer, "_bigbatch_package", package)
    if other != package:
        raise InputError(
            f"exact() of bigbatch.integrations.{other} was called on this {class_name(trainer)}, and that of "
            f"bigbatch.integrations.{package} computes its windows in another way: leave this call out, or make "
            "another trainer for it."
        )


def _parallelism(trainer: Any, weights: str) -> str | None:
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_deepspeed_enabled:
        return f"trains with DeepSpeed, which owns the backward and the gradients: {weights}"
    if accelerator.distributed_type.value == "MEGATRON_LM":
        return f"trains with Megatron-LM, which owns the backward and the gradients: {weights}"
    if is_sagemaker_mp_enabled() or is_sagemaker_dp_enabled():
        return f"trains with SageMaker's own parallelism, which owns the backward: {weights}"
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        return f"trains with FSDP of torch_xla, which owns the gradients: {weights}"
    if args.n_gpu > 1:
        return (
            f"would wrap the model in DataParallel over {args.n_gpu} GPUs: start one process a GPU with torchrun, or "
            "set CUDA_VISIBLE_DEVICES to one."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        return (
            'trains with FSDP version 1, which keeps gradients where they cannot be summed: set "fsdp_version": 2 in '
            f"fsdp_config, or {weights}"
        )
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    for kind, size in sizes.items():
        if size > 1:
            return f"splits each sample over {size} ranks ({kind} parallelism): {weights}"
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return f"trains a model that was sharded when it was loaded, with gradient hooks of its own: {weights}"
    return None


def _optimizer(trainer: Any) -> str | None:
    args = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in ("lomo", "adalomo") or "layerwise" in optim:
        return (
            f'updates weights inside the backward (optim="{optim}"), before the gradient of the window is complete: '
            "use another optim."
        )
    if args.torch_empty_cache_steps is not None:
        return (
            f"empties the cache of the device every {args.torch_empty_cache_steps} steps, which a window would do once "
            "for all of its micro-batches: set torch_empty_cache_steps to None; the cache is emptied when memory runs "
            "out."
        )
    return None


def generates_data(trainer: Any) -> bool:
    """Return whether a trainer of TRL makes the data of a window while it prepares the inputs."""
    return any(kind.__module__.startswith("trl.") and "_prepare_inputs" in vars(kind) for kind in type(trainer).__mro__)


def _loss(trainer: Any) -> str | None:
    if generates_data(trainer):
        return (
            "generates its training data in _prepare_inputs, from whole generation batches: use weights(trainer, "
            "items=...) instead of exact(trainer)."
        )
    config = getattr(trainer.model, "config", None)
    coefficient = getattr(trainer, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", 0))
    if coefficient and (getattr(trainer, "aux_loss_enabled", False) or getattr(config, "output_router_logits", False)):
        return (
            f"adds an auxiliary loss of the routers (coefficient {coefficient}), which is computed from whole "
            "micro-batches and so changes with their size: set model.config.output_router_logits = False."
        )
    types = getattr(trainer, "loss_types", None)
    if isinstance(types, list | tuple) and "sft" in types and len(types) > 1:
        return (
            f"adds a mean over tokens to a mean over pairs (loss_type={list(types)}), and a window has one number of "
            'items: use loss types of one unit, such as loss_type=["sigmoid"].'
        )
    return None


def _own_count(trainer: Any) -> str | None:
    kinds = [kind for kind in type(trainer).__mro__ if not kind.__module__.startswith("bigbatch.")]
    for name in ("get_batch_samples", "_get_num_items_in_batch"):
        if next(kind for kind in kinds if name in vars(kind)) is not Trainer:
            return (
                f"counts num_items_in_batch by itself ({name} is overridden), from collated batches that a window does "
                "not have: pass items=, a function from a collated micro-batch to this count."
            )
    return None


def _data(trainer: Any) -> str | None:
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return None
    dispatches = accelerator.dispatch_batches
    if dispatches is None:
        dispatches = isinstance(trainer.train_dataset, IterableDataset)
    if dispatches:
        return (
            f"reads batches on the first of {accelerator.num_processes} ranks and sends slices of their tensors to the "
            'others: set accelerator_config={"dispatch_batches": False}.'
        )
    return None


def uneven_updates(num_samples: int, *, batch_size: int, ranks: int, steps: int, drop_last: bool) -> str | None:
    """Return what is wrong with an epoch whose last batches are not evened out over ranks; None if nothing.

    Args:
        num_samples: Of the dataset.
        batch_size: Per device.
        ranks: Number of ranks.
        steps: Micro-batches in one window.
        drop_last: Whether a last batch that is not full is dropped.
    """
    batches = num_samples // batch_size if drop_last else math.ceil(num_samples / batch_size)
    most, least = (math.ceil((batches // ranks + extra) / steps) for extra in (batches % ranks > 0, 0))
    if most == least:
        return None
    return (
        f'"even_batches": False gives some of {ranks} ranks {most} updates in an epoch and others {least}, and they '
        f"would wait for each other: set it to True, or use a number of samples other than {num_samples}."
    )
