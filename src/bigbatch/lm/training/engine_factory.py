"""The `bigbatch.Engine` of a language model and its peak predictor, for training, planning and benchmarks.

ModelSetup, optimizer, limits → Engine                     model without weights, optimizer → PeakPredictor
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bigbatch.accumulation.update_outcome import GradientHook
from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.batching.plan import TokenBudget
from bigbatch.distributed.gradient_sync import GradientSync, SyncPolicy
from bigbatch.engine.engine import Engine
from bigbatch.engine.tuning import copies_fit
from bigbatch.errors import InputError
from bigbatch.gradients.fusable_layers import copied_bytes
from bigbatch.gradients.sum_store import SumStore
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.pair_batches import NO_INDEX, sample_length
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.model.custom_loss import CustomLoss
from bigbatch.lm.model.setup import ModelOutline, ModelSetup
from bigbatch.lm.training.fingerprints import GradientFingerprints
from bigbatch.lm.training.microbatch_limits import enforce_memory_budget, memory_of, microbatch_of
from bigbatch.lm.training.oom_restart import apply_override
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.offload.levels import Offload
from bigbatch.types import LossFunction


def make_engine(
    model_setup: ModelSetup,
    optimizer: Optimizer,
    *,
    microbatch: int | TokenBudget | Literal["auto"] = "auto",
    memory: str | int | None = None,
    max_grad_norm: float | None = None,
    scheduler: LRScheduler | None = None,
    scaler: torch.amp.GradScaler | None = None,
    sync: GradientSync | SyncPolicy | None = None,
    quantum: int | None = None,
    gradient_hook: GradientHook | None = None,
    offload: Offload = "none",
) -> Engine:
    """Create an engine whose batches are lists of samples: those of a `TokenDataset`, or of a `PairDataset`.

    Args:
        model_setup: Model, loss, layout and collate function.
        optimizer: Of the model's trained parameters.
        microbatch: As for `bigbatch.Engine`, and so are the other arguments.
        memory: Limit of ``"auto"``.
        max_grad_norm: None for no clipping.
        scheduler: Stepped once per update.
        scaler: Of float16.
        sync: How gradients cross ranks; None for a single process.
        quantum: For reproducible updates; else None.
        gradient_hook: As for `bigbatch.Accumulator`.
        offload: As for `bigbatch.Accumulator`.
    """
    balanced = model_setup.balanced
    count_items = None if balanced is None or balanced.scope == "global" else balanced.count_items
    is_custom = isinstance(model_setup.loss_fn, CustomLoss)
    return Engine(
        model_setup.model,
        optimizer,
        model_setup.training_loss,
        microbatch=microbatch,
        memory=memory,
        collate=model_setup.collate,
        lengths=sample_lengths,
        layout=model_setup.layout,
        cuda_graphs=model_setup.uses_cuda_graphs and quantum is None and offload != "gradients",
        count_items=count_items,
        max_grad_norm=max_grad_norm,
        scheduler=scheduler,
        scaler=scaler,
        sync=sync,
        reproducible=quantum is not None,
        quantum=quantum,
        gradient_hook=gradient_hook,
        offload=offload,
        check=is_custom,  # ours is a sum, and messages of the run name dropout
        fuse_gradients=False if is_custom else "auto",
    )


def make_training_engine(
    setup: TrainingSetup,
    optimizer: Optimizer,
    *,
    scheduler: LRScheduler | None = None,
    ranks: RankContext = SINGLE_PROCESS,
    sync: GradientSync | SyncPolicy | None = None,
) -> Engine:
    """Create the engine of a training run, with the limits and the clipping of its configuration.

    Args:
        setup: Model, data and settings.
        optimizer: Of the model, after `RankContext.parallelize`.
        scheduler: Stepped once per update; None for a constant learning rate.
        ranks: The processes of the run. Sharded models are not captured as CUDA graphs.
        sync: As returned by `RankContext.parallelize`.

    Raises:
        InputError: The configured micro-batch or memory is not possible.
    """
    config, model_setup = setup.config, setup.model_setup
    if config.offload == "auto":
        raise InputError(
            "--offload auto is chosen by bigbatch train and bigbatch resume: pass a level here, such as the one that "
            "bigbatch plan --offload auto prints."
        )
    longest = setup.training.longest
    microbatch = microbatch_of(config, longest=longest, ranks=ranks)
    if ranks.are_sharded:
        model_setup = replace(model_setup, uses_cuda_graphs=False)
        if microbatch != "auto":
            microbatch = apply_override(config.out, microbatch, longest=longest)
    if config.offload == "master" and setup.device_spec.precision != "bf16":
        raise InputError(
            f"--offload master needs --precision bf16, and this run computes in {setup.device_spec.precision}: "
            "pass --offload optimizer."
        )
    memory = memory_of(config, setup.device_spec, ranks=ranks)
    if config.reproducible:
        _check_reproducible(model_setup)
        if memory is not None:  # it limits the process: one quantum is in memory at a time, whatever the micro-batch is
            enforce_memory_budget(memory, setup)
            memory = None
    engine = make_engine(
        model_setup,
        optimizer,
        microbatch=microbatch,
        memory=memory,
        max_grad_norm=config.max_grad_norm,
        scheduler=scheduler,
        scaler=setup.device_spec.scaler(),
        sync=sync,
        quantum=config.quantum_in_use,
        gradient_hook=GradientFingerprints() if config.reproducible and ranks.is_first else None,
        offload=config.offload,
    )
    if ranks.are_sharded:
        engine.sync.set_padding_microbatch(_shortest_microbatch(setup))
    return engine


def _check_reproducible(model_setup: ModelSetup) -> None:
    if model_setup.balanced is not None:
        raise InputError(
            "--reproducible is not supported with the load-balancing loss of experts, whose sums over the batch are in "
            "floating point. Pass --router-aux-loss-coef 0."
        )


def make_predictor(
    outline: ModelOutline, config: TrainConfig, *, target: torch.device, usable_bytes: int | None = None
) -> PeakPredictor:
    """Create the memory model of an engine's step, with the optimizer of training, for a model without weights.

    Args:
        outline: The model and its loss.
        config: With every default resolved, the precision included.
        target: Device of the run; it need not exist on this machine.
        usable_bytes: Memory that ``--microbatch auto`` may use; None if it is not known.
    """
    model = outline.model
    optimizer = make_optimizer(model, config, DeviceSpec(target, config.precision))

    def predictor(copies_bytes: int) -> PeakPredictor:
        return PeakPredictor.from_training(
            model,
            optimizer,
            outline.loss_fn,
            device=target,
            copies_bytes=copies_bytes,
            integer_sums=config.reproducible,
        )

    fuses = target.type == "cuda" and config.precision in ("bf16", "fp16", "fp8") and not config.reproducible
    copies_bytes = copied_bytes(model, model.parameters()) if fuses and config.parallel in (None, "ddp") else 0
    found = predictor(copies_bytes)
    if copies_bytes and usable_bytes is not None and config.microbatch == "auto":
        tensors = [*model.parameters(), *model.buffers()]
        static_bytes = sum(tensor.nbytes for tensor in tensors) + SumStore.bytes_of(model.parameters())
        static_bytes += found.state_bytes
        if not copies_fit(copies_bytes, usable_bytes=usable_bytes, static_bytes=static_bytes):
            return predictor(0)
    return found


def make_activation_predictor(model: nn.Module, loss_fn: LossFunction, *, target: torch.device) -> PeakPredictor:
    """Create the memory model of forward and backward without an optimizer, for a model without weights.

    Args:
        model: Or a part of one.
        loss_fn: Of the model.
        target: As for `make_predictor`.
    """
    return PeakPredictor.from_training(model, None, loss_fn, device=target)


def sample_lengths(samples: Sequence[dict[str, Any]]) -> list[int]:
    """Return the tokens of each sample."""
    return [sample_length(sample) for sample in samples]


def _shortest_microbatch(setup: TrainingSetup) -> dict[str, Any]:
    """Return the shortest sample as a micro-batch: the padding micro-batch of a rank that has fewer than the others."""
    training = setup.training
    sample = training[int(training.lengths.argmin())]
    if "index" in sample:
        sample["index"] = torch.tensor(NO_INDEX)
    microbatch = setup.collate([sample])
    return {name: tensor.to(setup.device_spec.device) for name, tensor in microbatch.items()}
