"""Prove on a trainer's own data what its updates are: the stock Trainer's and bigbatch's against the whole batch.

first window → the Trainer's own training steps, the engine of `exact`, the whole batch in one piece → errors
"""

from dataclasses import dataclass
from typing import Any

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.checks import Settings, check_kind, check_trainer, generates_data
from bigbatch.integrations.transformers.traceless import class_of, traceless
from bigbatch.integrations.transformers.trainer_mixin import ExactMixin
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.integrations.transformers.weights import WeightsMixin
from bigbatch.integrations.transformers.window_data import read_windows
from bigbatch.integrations.transformers.window_gradients import WindowErrors, WindowGradients
from bigbatch.integrations.transformers.window_hand_over import batch_norm_sentence
from bigbatch.verification.causes.modules import training_batch_norms


@dataclass(frozen=True)
class TrainerVerification:
    """Result of `verify`; ``print`` formats it as a table.

    Attributes:
        exact: Whether ``relative_error`` is at most ``tolerance`` in every window, and nothing else in the model makes
            updates differ from those of the whole batch.
        stock_error: Relative error of the stock Trainer's gradient in the first window.
        relative_error: That of bigbatch.
        unit: What the loss is averaged over, such as ``"shifted labels"``.
        tolerance: Largest relative error that counts as rounding.
        reference: How the reference was computed.
        trainer: Names of the trainer and its model.
        windows: The first window, and the last one of an epoch if it is shorter.
        causes: What makes updates differ although the gradients agree, in sentences: batch norms in training mode,
            which the comparison runs in eval mode.
    """

    exact: bool
    stock_error: float
    relative_error: float
    unit: str
    tolerance: float
    reference: str
    trainer: str
    windows: tuple[WindowErrors, ...]
    causes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"gradient of {self.trainer}, relative error against {self.reference}",
            f"{'window':>8}{'samples':>9}{'micro-batches':>15}{'stock Trainer':>15}{'bigbatch':>11}",
        ]
        for each in self.windows:
            mark = "" if each.relative_error <= self.tolerance else "  not exact"
            lines.append(
                f"{each.name:>8}{each.num_samples:>9}{each.num_microbatches:>15}{each.stock_error:>15.1e}"
                f"{each.relative_error:>11.1e}{mark}"
            )
        lines.append(f"the loss is averaged over: {self.unit}")
        stock_is_exact = not self.causes and all(each.stock_error <= self.tolerance for each in self.windows)
        stock = "exact on these samples" if stock_is_exact else "NOT exact"
        ours = "exact" if self.exact else "NOT exact"
        lines.append(f"bigbatch: {ours} (tolerance {self.tolerance:.0e}); stock Trainer: {stock}")
        lines += [f"  cause: {cause}" for cause in self.causes]
        return "\n".join(lines)


def verify(trainer: Any) -> TrainerVerification:
    """Compare the gradients of a trainer's first window with that of its whole batch in one piece.

        print(verify(trainer))                      # before or after exact(trainer)

    Runs the Trainer's own ``training_step`` on each micro-batch of the first window, with its divisions; the window as
    `exact` runs it, with the settings it was called with; and the whole batch at once, or one sample at a time if that
    does not fit in memory. The same for the last window of an epoch, if the loader has a shorter one. All run without
    dropout, batch norm statistics, autocast and GradScaler, whose effects are no faults of accumulation. Batch norms
    that train with statistics of a micro-batch are named in the result, which is then not exact. A trainer that
    `weights` was called on is verified in its own loop.

    Restores gradients, buffers, modes, random states, metrics and counters of the trainer; a data set that is a stream
    is read from its start. Needs memory for three gradients besides a micro-batch. Collective over the ranks.

    Args:
        trainer: A `transformers.Trainer`, stock or after `exact` or `weights`, before or during training.

    Returns:
        Errors, and the unit that was found.

    Raises:
        InputError: It is no Trainer, or one that `exact` refuses, or that generates its data, or the unit of its loss
            is not certain.
    """
    check_kind(trainer)
    if getattr(trainer, "_bigbatch_package", "transformers") != "transformers":
        raise InputError(
            f"verify() of bigbatch.integrations.transformers weights micro-batches by their items, and the loss of "
            f"this {class_name(trainer)} couples samples: compare the gradient of an update with that of the "
            "stock trainer."
        )
    settings = getattr(trainer, "_bigbatch_settings", Settings())
    if not isinstance(trainer, WeightsMixin):
        check_trainer(trainer, settings)
    elif generates_data(trainer):
        raise InputError(
            f"{class_name(trainer)} generates the data of a window while it trains, so a window has other data in each "
            "run, and verify() cannot compare two."
        )
    kind = type(trainer)
    stock: type = kind.__bases__[1] if issubclass(kind, ExactMixin | WeightsMixin) else kind
    with traceless(trainer, trainer.compute_loss) as model, class_of(trainer, stock):
        model.train()
        norms = training_batch_norms(model)  # a model may keep them in eval mode
        windows = read_windows(trainer)
        found = [WindowGradients(trainer, model, kind, stock, settings, window).errors() for window in windows]
    errors = tuple(each for each, _, _, _ in found)
    _, unit, reference, tolerance = found[0]
    return TrainerVerification(
        exact=all(each.relative_error <= tolerance for each in errors) and not norms,
        stock_error=errors[0].stock_error,
        relative_error=errors[0].relative_error,
        unit=unit,
        tolerance=tolerance,
        reference=reference,
        trainer=f"{stock.__name__} ({type(model).__name__})",
        windows=errors,
        causes=(batch_norm_sentence(norms),) if norms else (),
    )
