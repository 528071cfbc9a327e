"""Check the settings of `exact`, the trainer and its loss: each refusal names the call to make instead."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from torch import nn

from bigbatch.engine.checks import check_microbatch
from bigbatch.errors import InputError
from bigbatch.integrations.transformers.checks import check_surroundings
from bigbatch.integrations.transformers.unit_refusals import class_name

# Losses that are the same on the features of all ranks as on each rank with those of the others gathered.
_GATHERING = (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss)
_GUIDED = (losses.GISTEmbedLoss, losses.CachedGISTEmbedLoss)


@dataclass(frozen=True)
class CoupledSettings:
    """Arguments of `exact`, checked.

    Raises:
        InputError: One is out of range, or the two do not go together.
    """

    microbatch: int | Literal["auto"] | None = None
    memory: str | int | None = None

    def __post_init__(self) -> None:
        kind = type(self.microbatch)
        if self.microbatch not in (None, "auto") and (kind is bool or not isinstance(self.microbatch, int)):
            raise InputError(
                f'microbatch is {self.microbatch!r}: it must be "auto", or a number of samples that are embedded at '
                "once, with all of their columns."
            )
        try:
            check_microbatch(self.size, self.memory, None)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    @property
    def size(self) -> int | Literal["auto"]:
        """The micro-batch of an engine."""
        return "auto" if self.microbatch is None else self.microbatch


def check_kind(trainer: object) -> Any:
    """Return an object after checking that it is a SentenceTransformerTrainer.

    Raises:
        InputError: It is not.
    """
    if not isinstance(trainer, SentenceTransformerTrainer):
        raise InputError(
            f"trainer is a {type(trainer).__name__}: pass a SentenceTransformerTrainer, or an instance of a subclass. "
            "For other trainers, see bigbatch.integrations.transformers and bigbatch.Coupled."
        )
    return trainer


def check_trainer(trainer: Any, settings: CoupledSettings) -> None:
    """Check that the batches of a trainer can be run by an engine.

    Raises:
        InputError: Something about it makes that impossible.
    """
    name = class_name(trainer)
    if trainer.is_in_train:
        raise InputError(
            f"exact() was called while {name}.train() runs, or after it failed: call it before train(), on another "
            "trainer if this one failed."
        )
    check_surroundings(trainer, instead="train with DDP, or FSDP version 2.")
    check_batch(trainer)
    if trainer.is_fsdp_enabled and settings.size == "auto":
        raise InputError(
            f"{name} shards the model with FSDP, whose ranks cannot continue after one of them ran out of memory: pass "
            "microbatch= a number of samples."
        )
    check_losses(trainer)


def check_batch(trainer: Any) -> None:
    """Check that ``per_device_train_batch_size`` is the batch of the loss.

    Raises:
        InputError: Another argument changes it.
    """
    args, size = trainer.args, trainer.args.per_device_train_batch_size
    steps = args.gradient_accumulation_steps
    if steps > 1:
        raise InputError(
            f"gradient_accumulation_steps is {steps}, which can mean {steps} separate losses on {size} samples, or one "
            f"on {size * steps}. exact() computes one: set per_device_train_batch_size={size * steps} and "
            f"gradient_accumulation_steps=1, and exact(trainer, microbatch={size}) needs the memory of {size} samples."
        )
    if args.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size=True makes the batch of the loss smaller when memory runs out: set it to False; "
            "exact() makes the micro-batches smaller instead."
        )
    ranks = trainer.accelerator.num_processes
    if ranks > 1 and trainer.accelerator.split_batches:
        raise InputError(
            f'"split_batches": True in accelerator_config divides each batch of {size} samples among {ranks} ranks: '
            f"set it to False, and per_device_train_batch_size to the samples of one rank."
        )
    if ranks > 1 and not args.dataloader_drop_last:
        raise InputError(
            f"dataloader_drop_last is False, so some of {ranks} ranks may have a smaller last batch, or none, and the "
            "others would wait for them: set it to True."
        )


def losses_of(trainer: Any) -> list[nn.Module]:
    """Return the loss modules of a trainer, one for each dataset or one for all."""
    loss = trainer.loss
    return list(dict.fromkeys(loss.values())) if isinstance(loss, dict) else [loss]


def check_losses(trainer: Any) -> None:
    """Check that the losses of a trainer can be computed from embeddings, as far as their classes show it.

    Raises:
        InputError: One cannot.
    """
    is_made_later = trainer.model_init is not None and not trainer.is_in_train
    model = None if is_made_later else bare_module(trainer.model)
    for loss in losses_of(trainer):
        for module in loss_modules(loss):
            if (problem := _problem(module, model)) is not None:
                raise InputError(f"{type(module).__name__} {problem}")
    gathers(trainer)


def loss_modules(loss: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a loss without those of models."""
    yield loss
    for child in loss.children():
        if not isinstance(bare_module(child), SentenceTransformer):
            yield from loss_modules(child)


def bare_module(module: nn.Module) -> nn.Module:
    """Return a module without the wrappers of DDP and of `torch.compile`."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def _problem(module: nn.Module, model: nn.Module | None) -> str | None:
    """Return why a module of a loss cannot be used with a model; None for a model that is not made yet."""
    if isinstance(module, losses.AdaptiveLayerLoss):  # Matryoshka2dLoss is one
        return (
            "uses the embeddings of all layers, and draws layers in each call: use MatryoshkaLoss or the loss inside "
            "it, or train without exact()."
        )
    if isinstance(module, losses.ContrastiveTensionLoss | losses.ContrastiveTensionLossInBatchNegatives):
        return (
            "trains a second model on the same columns: use MultipleNegativesRankingLoss with each text in two "
            "columns, or train without exact()."
        )
    if isinstance(module, losses.DenoisingAutoEncoderLoss):
        return (
            "is a mean over tokens of a decoder, which does not couple samples: use exact() of "
            "bigbatch.integrations.transformers."
        )
    for name, child in module.named_children():
        is_guide = name == "guide" and isinstance(module, _GUIDED)
        is_model = isinstance(bare_module(child), SentenceTransformer)
        if is_model and not is_guide and model is not None and bare_module(child) is not model:
            return (
                f"has a model of its own ({name}), and exact() embeds with the trainer's: make the loss with the model "
                "that the trainer has, or embed with the other one ahead and pass its embeddings as labels."
            )
    return None


def gathers(trainer: Any) -> bool:
    """Return whether the batch of the loss is that of all ranks.

    Raises:
        InputError: It is only for a part of the loss.
    """
    if trainer.accelerator.num_processes == 1:
        return False
    modules = [module for loss in losses_of(trainer) for module in loss_modules(loss)]
    gathering = [module for module in modules if getattr(module, "gather_across_devices", False)]
    if not gathering:
        return False
    if isinstance(trainer.loss, dict):
        raise InputError(
            f"{type(gathering[0]).__name__} has gather_across_devices=True, and ranks may have batches of different "
            "datasets, with different losses, at the same time: use one loss for all datasets, or "
            "gather_across_devices=False."
        )
    fits = (*_GATHERING, *_GUIDED, losses.MatryoshkaLoss)
    if any(isinstance(module, _GUIDED) and module.contrast_anchors for module in modules):
        raise InputError(
            f"{type(gathering[0]).__name__} with gather_across_devices=True and contrast_anchors=True compares anchors "
            "with those of their own rank only, and candidates with those of all ranks: set contrast_anchors=False."
        )
    for module in modules:
        is_leaf = not list(module.children()) and not isinstance(module, fits)
        has_own_batch = isinstance(module, (*_GATHERING, *_GUIDED)) and not module.gather_across_devices
        draws = isinstance(module, losses.MatryoshkaLoss) and 0 < module.n_dims_per_step < len(module.matryoshka_dims)
        if draws:
            raise InputError(
                f"MatryoshkaLoss with n_dims_per_step={module.n_dims_per_step} draws other dimensions on each rank, "
                "and gather_across_devices=True makes one loss for all of them: set n_dims_per_step=-1."
            )
        if has_own_batch or not (isinstance(module, fits) or is_leaf):
            raise InputError(
                f"{type(gathering[0]).__name__} has gather_across_devices=True inside a loss with "
                f"{type(module).__name__}, which would use the samples of all ranks, too: make "
                "gather_across_devices equal in all parts, and use only losses that have it."
            )
    return True
