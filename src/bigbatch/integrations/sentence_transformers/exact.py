"""Give a SentenceTransformerTrainer the loss of its whole batch, encoded a few samples at a time."""

from typing import Literal, TypeVar

from bigbatch.errors import InputError
from bigbatch.integrations.sentence_transformers.checks import CoupledSettings, check_kind, check_trainer
from bigbatch.integrations.sentence_transformers.trainer_mixin import CoupledMixin
from bigbatch.integrations.transformers.checks import refuse_other_package
from bigbatch.integrations.transformers.unit_refusals import class_name

AnyTrainer = TypeVar("AnyTrainer")


def exact(
    trainer: AnyTrainer, *, microbatch: int | Literal["auto"] | None = None, memory: str | int | None = None
) -> AnyTrainer:
    """Make ``per_device_train_batch_size`` the batch of the loss, whatever the memory.

        args = SentenceTransformerTrainingArguments(..., per_device_train_batch_size=4096)
        trainer = exact(SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss), microbatch=32)
        trainer.train()                             # 4,095 in-batch negatives, in the memory of 32 samples
        trainer.bigbatch_report                     # WindowReport of the last update

    The gradient is that of the trainer's loss on all samples of the batch at once, as by `bigbatch.Coupled`: samples
    are embedded a micro-batch at a time without gradients, the loss is differentiated on all embeddings, and the
    micro-batches are embedded again, with the same random numbers. It costs one more forward. Arguments, samplers,
    prompts, callbacks, logging, evaluation, checkpoints, optimizer, schedule, clipping and mixed precision stay the
    trainer's. Works with one process, DDP and FSDP2; parameters of the loss itself are summed over ranks, too.

    Supported are losses that compute their value from the ``sentence_embedding`` of each column and the labels, each
    column once: MultipleNegativesRankingLoss and its symmetric and cached variants, GISTEmbedLoss, MegaBatchMarginLoss,
    the batch triplet losses, CoSENTLoss, AnglELoss, all losses of pairs and triplets, MatryoshkaLoss around any of
    them, one loss for each dataset, and your own. The embeddings are cut by ``microbatch``, not by the
    ``mini_batch_size`` of cached losses, which still limits the memory of the loss. With ``gather_across_devices=True``
    the batch is that of all ranks, in rank order.

    Samples are collated when their micro-batch runs, in the main process.

    Args:
        trainer: A `SentenceTransformerTrainer`. Its class becomes a subclass; it is changed in place.
        microbatch: Samples that are embedded at once, with all of their columns; or ``"auto"``, the default, chosen
            on the first batch by the memory and the time of some sizes. With dropout, another size draws other masks:
            pass a number for runs that are to be repeated exactly.
        memory: For ``"auto"``, such as ``"24GiB"``; by default what is free. See `bigbatch.Engine`.

    Returns:
        The trainer.

    Raises:
        InputError: The trainer, its arguments or its loss do not allow it, such as ``gradient_accumulation_steps``
            above 1, or the settings are invalid; what the loss reads besides embeddings is raised by ``train``. Calling
            it again is a no-op; with other settings an error.
    """
    settings = CoupledSettings(microbatch, memory)
    own = check_kind(trainer)
    refuse_other_package(trainer, CoupledMixin._bigbatch_package)
    if hasattr(trainer, "_bigbatch_weights_items"):
        raise InputError(
            f"weights() was called on this {class_name(trainer)}, which weights whole batches: make another trainer "
            "for exact()."
        )
    if isinstance(trainer, CoupledMixin):
        if settings not in (CoupledSettings(), trainer._bigbatch_settings):
            raise InputError(
                f"exact() was called before on this {class_name(trainer)} with other settings "
                f"({trainer._bigbatch_settings}): make another trainer, and pass all settings in the first call."
            )
        return trainer
    check_trainer(trainer, settings)
    kind = type(trainer)
    attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    own._bigbatch_settings = settings
    trainer.__class__ = type(f"Exact{kind.__name__}", (CoupledMixin, kind), attributes)
    return trainer
