"""Checks of the losses and counts that loss functions return, and the messages about those that are invalid."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

from bigbatch.types import Items

_NUMBER = (int, float, Real)


def describe(value: object) -> str:
    """Return what kind of value this is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def refuse_loss(name: str, loss_sum: object) -> NoReturn:
    """Raise TypeError or ValueError for a loss of a term that is no 0-d tensor."""
    if not isinstance(loss_sum, Tensor):
        raise TypeError(f"the loss of the term {name!r} is {describe(loss_sum)}: it must be a 0-d tensor.")
    raise ValueError(
        f"the loss of the term {name!r} has shape {tuple(loss_sum.shape)}: it must be the 0-d sum of the item losses. "
        "Use reduction='sum', or call .sum() on it."
    )


def as_totals(totals: object) -> Mapping[str, Items]:
    """Return the items of each term, after checking that they are a mapping.

    Raises:
        TypeError: They are not.
    """
    if not isinstance(totals, Mapping):
        raise TypeError(
            f"the items of the terms are {describe(totals)}: count_items= and totals= need a dictionary "
            "{term: items}, such as {'class': 128, 'box': 64}. A loss of one term needs neither."
        )
    return totals


def as_count(name: str, items: object) -> Items:
    """Return items of a term as an ``int`` or ``float``; a tensor on a device stays there, wide enough to be added to.

    Args:
        name: Of the term, for messages.
        items: A number of any width, of NumPy too, or a tensor of one element. Bool counts as 0 or 1.

    Raises:
        TypeError: It is of another kind.
        ValueError: It is no finite count, in a dtype that cannot count, or requires a gradient.
    """
    if isinstance(items, Tensor):
        if items.requires_grad:
            raise ValueError(
                f"the items of the term {name!r} require a gradient, and a divisor is a constant: its gradient would "
                "be missing. Call .detach() on them if they are a constant in your loss, too."
            )
        if items.is_floating_point() and items.dtype.itemsize < 4:
            raise ValueError(
                f"the items of the term {name!r} are in {items.dtype}, which cannot count past "
                f"{2 / torch.finfo(items.dtype).eps:g}. Sum the mask as it is (bool), or in float32."
            )
        if items.numel() != 1:
            raise ValueError(
                f"the items of the term {name!r} have shape {tuple(items.shape)}: they must be one number, the count "
                "of the micro-batch. Call .sum() on the mask."
            )
        if not items.is_cpu and not items.is_complex():  # reading its value would wait for the device
            return items if items.is_floating_point() else items.to(torch.int64)
        items = items.item()
    if not isinstance(items, _NUMBER):
        raise TypeError(f"the items of the term {name!r} are {describe(items)}: they must be a number or a 0-d tensor.")
    count = int(items) if isinstance(items, Integral) else float(items)
    if not 0 <= count < math.inf:
        raise ValueError(f"the items of the term {name!r} are {items}: they must be a finite count, 0 or more.")
    return count
