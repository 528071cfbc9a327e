"""Find a tensor of one micro-batch that another one uses: what a module kept for later was overwritten meanwhile.

    self.kept = x → norm, where the next micro-batch sets self.kept as well → self.kept        is not x any more

A micro-batch may use what an earlier one made, such as a cache: then it did not make its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import Tensor

from bigbatch.batching.batch_types import children
from bigbatch.errors import InputError


@dataclass
class MadeTensors:
    """Which micro-batch made each tensor, in the forwards of one window."""

    _makers: dict[int, tuple["ref[Tensor]", int]] = field(default_factory=dict)  # by id, which may be used again

    def by(self, number: int) -> "TensorsOfOne":
        """Return the view of one micro-batch.

        Args:
            number: Counted from 0.
        """
        return TensorsOfOne(number, self._makers)


@dataclass(frozen=True)
class TensorsOfOne:
    """What one micro-batch makes and uses.

    Args:
        number: Of the micro-batch.
        makers: Of all tensors, with weak references to them.
    """

    number: int
    makers: dict[int, tuple["ref[Tensor]", int]]

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check what a function of torch is called with.

        Raises:
            InputError: A later micro-batch made one of the tensors.
        """
        for tensor in _tensors((*args, *kwargs.values()) if kwargs else args):
            known = self.makers.get(id(tensor))
            if known is not None and known[1] > self.number and known[0]() is tensor:
                raise used_by_other(self.number, known[1])

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what a function returned, unless it is one of its arguments, changed in place."""
        for tensor in _tensors((result,)):
            if not any(tensor is used for used in _tensors((*args, *kwargs.values()))):
                self.makers[id(tensor)] = ref(tensor), self.number

    def add_inputs(self, microbatch: Any) -> None:
        """Note the tensors of the micro-batch, except those that an earlier one received, too."""
        for tensor in _contents(microbatch):
            known = self.makers.get(id(tensor))
            if known is None or known[0]() is not tensor:
                self.makers[id(tensor)] = ref(tensor), self.number


def used_by_other(user: int, maker: int | None = None) -> InputError:
    """Return the error about a micro-batch that uses a tensor of another one.

    Args:
        user: Its number, from 0.
        maker: The number of the other one; None if it is not known.
    """
    made = "another one" if maker is None else f"micro-batch {maker + 1}"
    return InputError(
        f"micro-batch {user + 1} uses a tensor that {made} made: a module, a hook or loss_fn keeps tensors outside of "
        'the forward, such as self.features, and with batch_norm="exact" the other micro-batches overwrite them while '
        "this one waits at a norm. Pass such tensors as arguments and return values, or leave batch_norm= out."
    )


def _contents(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for _, child in children(value) or ():
        yield from _contents(child)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)
