"""Exact accumulation with Lightning: the callback `ExactAccumulation`.

    training_step → {"loss": loss_sum, "items": n} → Lightning's backward → all-reduce the count → .grad ×= ranks / Σ n

Lightning comes as two packages with classes of their own, ``lightning.pytorch`` and ``pytorch_lightning``. The callback
is made from the first, or from the second if it alone is installed, and works in a ``Trainer`` of either.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bigbatch.errors import InputError
from bigbatch.integrations.item_totals import (
    AccumulationReport,
    DataRanks,
    ItemTotals,
    checked_pair,
    multiply_gradients,
    unique_parameters,
)
from bigbatch.types import Items

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

_RETURN = (
    'return {"loss": loss_sum, "items": n}, the undivided sum of the item losses and their number. A loss of '
    "engine.loss(batch) needs no ExactAccumulation()."
)
_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_UNSUPPORTED = {
    "DeepSpeedStrategy": "DeepSpeed keeps gradients outside of .grad",
    "FSDPStrategy": "FSDP version 1 keeps gradients outside of .grad (FSDP2 by ModelParallelStrategy is supported)",
    "SingleDeviceXLAStrategy": "XLA runs the update as a graph",
    "XLAStrategy": "XLA reduces gradients after backward",
    "XLAFSDPStrategy": "XLA reduces gradients after backward",
}


class ExactAccumulation(Callback):  # type: ignore[misc]
    """Makes the gradient of each of Lightning's accumulation windows that of the whole batch.

        trainer = L.Trainer(accumulate_grad_batches=4, callbacks=[ExactAccumulation()])

        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            loss_sum = F.mse_loss(self.model(inputs), labels, reduction="sum")
            return {"loss": loss_sum, "items": labels.numel()}

    Before the optimizer's step, ``.grad`` becomes Σ ∇loss_sum / Σ items over the micro-batches of the window and all
    ranks, in a shorter last window too. Everything that follows is Lightning's: clipping, precision, the optimizer,
    schedulers, checkpoints. Callbacks before this one in the list see the undivided gradient in their
    ``on_before_optimizer_step``.

    For automatic optimization on one device, with DDP, and with FSDP2 by ``ModelParallelStrategy``. The ``outputs`` of
    ``on_train_batch_end`` have the items and the loss sum of the micro-batch, which is divided by a power of two with
    ``precision="16-mixed"``. In a window without items the gradient is 0. The learning-rate finder of Lightning removes
    callbacks, and so trains with the mean of each micro-batch.

    Args:
        log: Name under which the loss of each window is logged, its mean over all items and ranks; None to not log it.
            Reading it waits for the device.

    Attributes:
        report: Items and loss of the last window that ended; None before the first.

    Raises:
        InputError: At the start of ``fit``: the module optimizes manually, or the strategy is not supported. In a step:
            ``training_step`` returned something else than a sum and items, or the optimizer runs a window of several
            micro-batches twice.
        TypeError: The loss is no tensor, or the items are no number.
        ValueError: The loss is not 0-d, or NaN with 0 items; or the items are not a finite count of 0 or more.
    """

    def __init__(self, *, log: str | None = None) -> None:
        super().__init__()
        self.log_name = log
        self.report: AccumulationReport | None = None
        self._totals = ItemTotals()
        self._noted: tuple[Tensor, Items] | None = None  # by training_step, before its backward
        self._is_divided = False  # the gradient, since it was last zeroed
        self._unwrap: Callable[[], None] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the trainer and the module, and wrap ``training_step`` until the end of ``fit``."""
        if stage != "fit":
            return
        _check_strategy(trainer.strategy)
        if not pl_module.automatic_optimization:
            raise InputError(
                f"{type(pl_module).__name__} has automatic_optimization=False, where Lightning accumulates nothing: "
                "remove ExactAccumulation(), and call self.manual_backward(engine.loss(batch)) with a bigbatch.Engine."
            )
        if sum(isinstance(callback, ExactAccumulation) for callback in trainer.callbacks) > 1:
            raise InputError("the trainer has more than one ExactAccumulation(), which would divide twice: pass one.")
        self._totals, self._noted, self._is_divided = ItemTotals(), None, False
        self._restore()
        self._unwrap = _wrap_training_step(pl_module, functools.partial(self._note, trainer, pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore ``training_step``."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore ``training_step``."""
        self._restore()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Start a window: the micro-batches so far are dropped with their gradient."""
        self._totals.clear()
        self._is_divided = False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Count the micro-batch whose gradient was added."""
        if self._noted is None:
            return
        if self._is_divided:
            raise InputError(
                f"a micro-batch was added to a gradient that is divided already, in a window of "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: the optimizer runs its closure several "
                "times, or gradients are not zeroed. Set accumulate_grad_batches=1, or use a bigbatch.Engine with the "
                "optimizer, which runs the whole window again."
            )
        self._totals.add(*self._noted)
        self._noted = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Divide the gradient by the items of the window, over all ranks."""
        ranks = _data_ranks(trainer.strategy, pl_module)
        self.report, factor = self._totals.close(ranks, prescale=_has_scaler(trainer))
        self._is_divided = True
        optimized = (group["params"] for group in optimizer.param_groups)
        multiply_gradients(unique_parameters([*optimized, pl_module.parameters()]), factor)
        if self.log_name is not None:
            pl_module.log(self.log_name, self.report.loss)

    def _note(self, trainer: Any, pl_module: Any, output: Any) -> Any:
        """Note loss and items of a micro-batch; return its output with the loss that Lightning is to differentiate."""
        if output is None or not trainer.training:
            return output
        if not isinstance(output, Mapping) or output.get("items") is None:
            what = "a dictionary without 'items'" if isinstance(output, Mapping) else f"a {type(output).__name__}"
            raise InputError(f"training_step of {type(pl_module).__name__} returned {what}: {_RETURN}")
        loss_sum, items = checked_pair(output.get("loss"), output["items"])
        if self not in trainer.callbacks:
            warnings.warn(
                "Lightning runs training_step without its callbacks, as its learning-rate and batch-size finders do: "
                "the gradient of this run is the mean of micro-batch means.",
                stacklevel=2,
            )
            return {**output, "loss": loss_sum / items if items else loss_sum}
        self._noted = loss_sum.detach(), items
        return {**output, "loss": loss_sum * (trainer.accumulate_grad_batches / self._totals.divisor)}

    def _restore(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None


def _wrap_training_step(module: Any, note: Callable[[Any], Any]) -> Callable[[], None]:
    """Pass the output of ``training_step`` through a function; return a function that ends this."""
    found = vars(module).get("training_step")
    original = module.training_step

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return note(original(*args, **kwargs))

    # Lightning reads the signature through one layer of __wrapped__: as it would without this wrapper
    training_step.__wrapped__ = getattr(original, "__wrapped__", original)
    vars(module)["training_step"] = training_step

    def unwrap() -> None:
        if vars(module).get("training_step") is training_step:
            del vars(module)["training_step"]
            if found is not None:
                vars(module)["training_step"] = found

    return unwrap


def _check_strategy(strategy: Any) -> None:
    names = [kind.__name__ for kind in inspect.getmro(type(strategy))]
    known = next((name for name in names if name in _SUPPORTED or name in _UNSUPPORTED), None)
    reason = _UNSUPPORTED.get(known or "", "it is not known to leave averaged gradients in .grad")
    if getattr(strategy, "_model_averaging_period", None) is not None:
        known, reason = None, "with model averaging, ranks do not average gradients"
    if known not in _SUPPORTED:
        raise InputError(
            f"ExactAccumulation() does not support {names[0]}, since {reason}. Count the items of the window ahead, "
            "over all ranks, and return loss_sum * accumulate_grad_batches * world_size / count from training_step."
        )


def _data_ranks(strategy: Any, module: nn.Module) -> DataRanks:
    """Return the ranks over which the strategy averages gradients."""
    names = {kind.__name__ for kind in inspect.getmro(type(strategy))}
    if "ModelParallelStrategy" not in names:
        return DataRanks(getattr(strategy, "world_size", 1), strategy.root_device)
    mesh = strategy.device_mesh["data_parallel"]
    if mesh.size() > 1 and not any(isinstance(layer, FSDPModule) for layer in module.modules()):
        raise InputError(
            f"the {mesh.size()} ranks of the data-parallel mesh do not average gradients: apply fully_shard to the "
            "module, over that mesh, in configure_model."
        )
    return DataRanks(mesh.size(), strategy.root_device, mesh.get_group())


def _has_scaler(trainer: Any) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


__all__ = ["AccumulationReport", "ExactAccumulation"]
