"""Mark runs of the model whose results are discarded, so that a ``loss_fn`` with side effects can recognize them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# A context variable, because loss_fn has a fixed signature: it follows the call, and other threads do not see it.
_inside_trial: ContextVar[bool] = ContextVar("inside_trial", default=False)


def is_trial() -> bool:
    """Return whether the caller runs inside a trial: a run of the model that is not part of any update.

        def loss_fn(model, batch):
            loss = F.mse_loss(model(batch.x), batch.y, reduction="sum")
            if not bigbatch.is_trial():
                log(loss)
            return loss, batch.y.numel()

    Trials are the runs of ``microbatch="auto"`` and `Engine.tune`, those of `verify` and of the check of the first
    window, and those of a memory prediction, whose tensors have no data. All state of the model is restored after a
    trial; what ``loss_fn`` writes to files, lists or global variables is not. The answer is for the thread that calls
    ``loss_fn``: it is False in other threads, such as those of a DataLoader, or those of autograd on CUDA that
    recompute checkpointed layers.
    """
    return _inside_trial.get()


@contextmanager
def trial() -> Iterator[None]:
    """Make `is_trial` return True inside the context."""
    token = _inside_trial.set(True)
    try:
        yield
    finally:
        _inside_trial.reset(token)
