"""Causes inside modules: random numbers, batch statistics, and state that a forward changes and reads."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from bigbatch.verification.causes.case import Case, Cause, Kind, listed, listed_modules
from bigbatch.verification.cut_gradients import relative_difference

MAX_MODULES = 8  # modules with state that are tested one by one


def active_dropouts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dropout modules that draw random numbers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if module.training
        and (
            (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
            or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
        )
    }


def training_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norms that use statistics of the micro-batch, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    }


def dropout_cause(dropouts: dict[str, nn.Module]) -> Cause:
    """Return the cause for active dropouts."""
    return Cause(
        Kind.DROPOUT,
        f"dropout ({listed_modules(dropouts)}): it draws from the global random generator, so each cut has other "
        "masks. Every cut is a valid sample of the same gradient, but the numbers differ.",
    )


def dropout_notes(model: nn.Module) -> tuple[str, ...]:
    """Return what must be said of active dropout in a model whose cuts are exact."""
    if not (dropouts := active_dropouts(model)):
        return ()
    return (
        f"dropout ({listed_modules(dropouts)}) is active, and its masks were the same in every cut, because it draws "
        "its numbers in the order of the samples here. That holds for a single layer of dropout on the CPU; with "
        "several, or on a GPU, each cut has other masks.",
    )


def batch_norm_cause(norms: dict[str, nn.Module]) -> Cause:
    """Return the cause for batch norms in training mode."""
    return Cause(
        Kind.BATCH_NORM,
        f"BatchNorm in training mode ({listed_modules(norms)}): it normalizes by the mean and variance of the "
        'micro-batch, so samples influence each other. Pass batch_norm="exact" to bigbatch.Engine, set it to eval '
        "mode, or use GroupNorm or LayerNorm.",
    )


RANDOM_NUMBERS = Cause(
    Kind.RANDOM_NUMBERS,
    "random numbers in the forward or in the loss: the gradient of the same batch changes with the seed, so each cut "
    "draws other numbers.",
)


def randomness(case: Case) -> Iterator[Cause]:
    """Yield a cause if the gradient depends on the seed, and turn dropout off."""
    if not _depends_on_seed(case):
        return
    dropouts = active_dropouts(case.model)
    for dropout in dropouts.values():
        dropout.eval()
    if dropouts:
        yield dropout_cause(dropouts)
    if _depends_on_seed(case):
        for module in case.model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        yield RANDOM_NUMBERS


def _depends_on_seed(case: Case) -> bool:
    first, second = (case.gradient(case.reference, seed=seed) for seed in (0, 1))
    return not relative_difference(second, first) <= case.tolerance  # not `>`: NaN counts as a difference


def batch_norm(case: Case) -> Iterator[Cause]:
    """Yield a cause if batch norms use statistics of the micro-batch, and switch them to running statistics."""
    if case.cut_gradients.batch_norm is not None:
        return
    norms = training_batch_norms(case.model)
    for norm in norms.values():
        norm.eval()
    if norms:
        yield batch_norm_cause(norms)


def changing_state(case: Case) -> Iterator[Cause]:
    """Yield a cause if later micro-batches read what earlier ones wrote to the modules; reset it from then on."""
    changed: dict[str, tuple[nn.Module, list[str]]] = {}
    for cut in ([range(min(case.cut, case.cut_gradients.samples.num_samples))], case.cut):
        case.terms(cut)  # the whole batch may lead back to the state before it, one micro-batch rarely
        changed |= case.state.changed()
    moving = case.gradient(case.cut)
    untouched = case.cut_gradients

    def changes_gradient(reset: Callable[[], None]) -> bool:
        case.cut_gradients = replace(untouched, reset=reset)
        return relative_difference(case.gradient(case.cut), moving) > case.tolerance

    read: list[str] = []
    if len(changed) <= MAX_MODULES:
        read = [name for name in changed if changes_gradient(case.state.of([name]).restore)]
    if not changed or not changes_gradient(case.state.of(changed).restore):
        if not changes_gradient(untouched.restore):
            case.cut_gradients = untouched
            return
        changed = {}
    places = [_place(name, *changed[name]) for name in (read or changed) if name in changed]
    where = listed(places) or "an object that hangs on a module"
    yield Cause(
        Kind.STATE,
        f"state that changes in the forward ({where}): each micro-batch reads what those before it wrote. Set the "
        "module to eval mode, or update its state once per batch, after the step.",
    )


def _place(name: str, module: nn.Module, tensors: list[str]) -> str:
    kind = "buffer" if tensors[0] in module._buffers else "attribute"
    kind += "s" if len(tensors) > 1 else ""
    return f"{kind} {', '.join(map(repr, tensors))} of {name or 'the model'}: {type(module).__name__}"
