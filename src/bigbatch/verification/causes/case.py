"""The difference between two cuts that is to be explained, and what an explanation is."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from torch import nn

from bigbatch.verification.cut_gradients import Cut, CutGradients, Gradients, TermValues, relative_difference
from bigbatch.verification.module_state import ModuleState

ITEMS_ROUNDING = 1e-5  # items may be weights
NUM_NAMED = 3  # modules that a sentence lists before "and N more"


class Kind(Enum):
    """What makes a gradient depend on the cut."""

    NOT_FINITE = auto()
    DROPOUT = auto()
    RANDOM_NUMBERS = auto()
    BATCH_NORM = auto()
    STATE = auto()
    HOOK = auto()
    ITEMS = auto()
    MEAN = auto()
    TIME_FIRST = auto()
    MIXING_MODULE = auto()
    PAIRS = auto()
    PENALTY = auto()
    OTHER_COUNT = auto()
    AUXILIARY_LOSS = auto()
    COUPLING = auto()
    UNKNOWN = auto()


class Cause(NamedTuple):
    """One cause, with the sentence that explains it to the user."""

    kind: Kind
    sentence: str


@dataclass
class Case:
    """Two cuts of the same samples whose gradients differ, from the same state of the model.

    Attributes:
        cut_gradients: The model, loss and samples.
        reference: Samples per micro-batch of the reference.
        cut: Samples per micro-batch of the other cut.
        tolerance: Largest relative error that counts as rounding.
        state: State of all modules that every evaluation starts from.
        whole: Name of the reference in sentences.
        eliminated: Undoes at the end what was changed to eliminate a cause.
    """

    cut_gradients: CutGradients
    reference: int
    cut: int
    tolerance: float
    state: ModuleState
    whole: str = "the full batch"
    eliminated: ExitStack = field(default_factory=ExitStack)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.cut_gradients.model

    def gradient(self, cut: Cut, *, seed: int = 0, scale: float = 1.0) -> Gradients:
        """Compute the gradient of a cut, as `CutGradients.gradient`, from the state of this case."""
        self.state.restore()
        return self.cut_gradients.gradient(cut, seed=seed, scale=scale)

    def terms(self, cut: Cut, *, seed: int = 0) -> list[TermValues]:
        """Compute the values of each term in each micro-batch, from the state of this case."""
        self.state.restore()
        return self.cut_gradients.terms(cut, seed=seed)

    def error(self, cut: Cut | None = None) -> float:
        """Compute the relative error of a cut, by default the one of this case."""
        return relative_difference(self.gradient(self.cut if cut is None else cut), self.gradient(self.reference))

    def is_explained(self) -> bool:
        """Return whether the cut yields the reference, with the causes that were found eliminated."""
        return self.error() <= self.tolerance


def by_term(microbatches: Sequence[TermValues]) -> dict[str, list[tuple[float, float]]]:
    """Return ``(loss_sum, items)`` of each micro-batch, by term."""
    found: dict[str, list[tuple[float, float]]] = {}
    for terms in microbatches:
        for name, pair in terms.items():
            found.setdefault(name, []).append(pair)
    return found


def totals(microbatches: Sequence[TermValues]) -> dict[str, tuple[float, float]]:
    """Return the sums of losses and of items over micro-batches, by term."""
    found = by_term(microbatches)
    return {name: (math.fsum(s for s, _ in pairs), math.fsum(n for _, n in pairs)) for name, pairs in found.items()}


def is_additive(whole: Sequence[TermValues], parts: Sequence[TermValues], tolerance: float) -> bool:
    """Return whether losses and items of the parts add up to those of the whole, in every term."""
    expected, found = totals(whole), totals(parts)
    sizes = {name: math.fsum(abs(loss) for loss, _ in pairs) for name, pairs in by_term(parts).items()}
    for name in {**expected, **found}:
        (loss, items), (loss_sum, items_sum) = expected.get(name, (0.0, 0.0)), found.get(name, (0.0, 0.0))
        if abs(loss - loss_sum) > tolerance * max(sizes.get(name, 0.0), abs(loss)):
            return False
        if not math.isclose(items, items_sum, rel_tol=ITEMS_ROUNDING):
            return False
    return True


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def listed_modules(modules: Mapping[str, nn.Module]) -> str:
    """Return the first few modules by name and class."""
    return listed([f"{name or 'the model'}: {type(module).__name__}" for name, module in modules.items()])
