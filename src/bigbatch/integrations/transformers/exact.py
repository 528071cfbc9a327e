"""Make the updates of a Trainer exact: `exact` for an instance, `ExactTrainer` for a class."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from transformers import Trainer

from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import InputError
from bigbatch.integrations.transformers.checks import Settings, check_kind, check_trainer, refuse_other_package
from bigbatch.integrations.transformers.trainer_mixin import ExactMixin
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.types import Layout

AnyTrainer = TypeVar("AnyTrainer")


def exact(
    trainer: AnyTrainer,
    *,
    microbatch: int | TokenBudget | Literal["auto"] | None = None,
    memory: str | int | None = None,
    lengths: Callable[[list[Any]], Sequence[int]] | None = None,
    layout: Layout = "padded",
    items: Literal["auto"] | Callable[[Mapping[str, Any]], int | float] = "auto",
    nonfinite: Literal["skip", "raise"] = "skip",
) -> AnyTrainer:
    """Make every update of a Trainer that of its whole batch, whatever the micro-batches.

        trainer = exact(SFTTrainer(...))            # any Trainer or subclass
        trainer.train()
        trainer.bigbatch_report                     # WindowReport of the last update

    An update has ``per_device_train_batch_size · gradient_accumulation_steps`` samples on each rank, as before, and its
    gradient is Σ_i ∇loss_sum_i / Σ_i items_i over the micro-batches i of all ranks. The trainer's own ``compute_loss``
    runs on each of them. Arguments, counters, callbacks, logging, evaluation, checkpoints, optimizer, schedule,
    clipping and mixed precision stay the Trainer's. Works with one process, DDP and FSDP2.

    Samples are collated when their micro-batch runs, in the main process. If an overridden ``get_train_dataloader``
    collates by itself, its batches are the micro-batches. Inside a window ``accelerator.gather*`` and ``reduce`` return
    the values of this rank, so ranks may run different micro-batches; the metrics of TRL are averaged at its end. A
    loss that calls torch.distributed itself needs micro-batches of a fixed number of samples, which the ranks then run
    equally often; it is refused if its value depends on the samples of other ranks. An own ``training_step`` runs once
    a window, and cannot read inputs.

    Args:
        trainer: A `transformers.Trainer`. Its class becomes a subclass; it is changed in place.
        microbatch: Samples of one forward and backward, a `TokenBudget` of tokens, or ``"auto"``; by default the
            ``per_device_train_batch_size``. See `bigbatch.Engine`.
        memory: For ``"auto"``, which it implies, such as ``"24GiB"``.
        lengths: ``lengths(samples) → tokens of each sample``, for a `TokenBudget`, ``"auto"`` and ``report.tokens``.
        layout: ``"packed"`` if the trainer's collator makes one row of a list of samples, without padding.
        items: What the trainer's loss is averaged over: ``items(inputs) → number`` of a collated micro-batch. By
            default it is found on the first window, by comparing gradients of a few samples. Both are checked on all
            samples of windows 1 to 4, 8, 16, 32... by their losses, which takes two forwards of each sample without
            gradients; one that is passed for a loader that collates is not. Terms below 2e-5 of the loss are not seen.
        nonfinite: What a window does if its loss or gradient is not finite. ``"skip"``: no weight and no optimizer
            state changes. With a GradScaler it skips the update, as always; without one there is a warning, and the
            schedule goes on. ``"raise"``: `bigbatch.NonFiniteError`. A window without items warns and changes nothing
            either; with a GradScaler its gradient is 0.

    Returns:
        The trainer.

    Raises:
        InputError: The trainer, its arguments or its loss do not allow exact updates, or the settings are invalid; what
            the first window shows is raised by ``train``. Calling it again is a no-op; with other settings an error,
            unless the first window has failed.
    """
    settings = Settings(microbatch, memory, lengths, layout, items, nonfinite)
    own = check_kind(trainer)
    refuse_other_package(trainer, ExactMixin._bigbatch_package)
    if isinstance(trainer, ExactMixin):
        if settings not in (Settings(), trainer._bigbatch_settings):
            if trainer._bigbatch_windows is None or trainer.bigbatch_report is not None:
                raise InputError(
                    f"exact() was called before on this {class_name(trainer)} with other settings "
                    f"({trainer._bigbatch_settings}): make another trainer, and pass all settings in the first call."
                )
            check_trainer(trainer, settings)  # its first window failed: the message may have asked for this call
            trainer._bigbatch_settings, trainer._bigbatch_windows = settings, None
        return trainer
    if hasattr(trainer, "_bigbatch_weights_items"):
        raise InputError(
            f"weights() was called on this {class_name(trainer)}, whose micro-batches are weighted already: make "
            "another trainer for exact()."
        )
    check_trainer(trainer, settings)
    kind = type(trainer)
    name = f"Exact{kind.__name__}"
    exact_kind = type(name, (ExactMixin, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    own._bigbatch_settings = settings
    trainer.__class__ = exact_kind
    return trainer


class ExactTrainer:
    """Mixin for a subclass of Trainer whose instances are those of `exact`.

        class Mine(ExactTrainer, DPOTrainer):
            exact_settings = {"microbatch": 4}      # optional: the arguments of `exact`

    Attributes:
        exact_settings: Keyword arguments of `exact`.

    Raises:
        InputError: A subclass of Trainer precedes it among the base classes.
    """

    exact_settings: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ExactTrainer)]
        first = next(
            (kind for kind in before if issubclass(kind, Trainer) and not issubclass(kind, ExactTrainer)), None
        )
        if first is not None:
            raise InputError(
                f"{cls.__name__} has {first.__name__} before ExactTrainer among its base classes, whose __init__ would "
                f"not run: write class {cls.__name__}(ExactTrainer, {first.__name__})."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        exact(self, **self.exact_settings)
