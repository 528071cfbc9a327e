"""Loss sums and items of a window. The only divisor of the package is computed here.

For one term the gradient is Σ_i ∇s_i / Σ_i n_i: micro-batches are differentiated undivided, and the total is divided
once, when its items are known. A loss of several terms is Σ_t (Σ_i s_ti / N_t): each term is divided by its own total
before it is differentiated, so the totals N_t must be known first.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES
from bigbatch.types import Items, Terms
from bigbatch.window_report import TermReport

WEIGHTS_ROUNDING = 1e-5  # items may be weights: their sum depends on the order in float32, where counts are exact
_PAIR, _NUMBER = (tuple, list), (int, float, Real)
SINGLE = "loss"  # name of the term of a loss with only one


def as_terms(result: object) -> Terms:
    """Return ``{name: (loss_sum, items)}`` from the result of a loss function, after checking it.

    Args:
        result: ``(loss_sum, items)`` or ``{name: (loss_sum, items)}``.

    Raises:
        TypeError: It is of another form.
        ValueError: A loss is not a 0-d tensor, or items are not one non-negative number.
    """
    single = isinstance(result, tuple) or not isinstance(result, Mapping)
    terms: Mapping[str, Any] = {SINGLE: result} if single else result  # type: ignore[assignment]
    for name, term in terms.items():
        if not isinstance(term, _PAIR) or len(term) != 2:
            raise TypeError(
                f"the term {name!r} of the loss is {_describe(term)}: return the pair (loss_sum, items), the sum of "
                "the item losses and how many items it runs over, for example "
                "(F.cross_entropy(logits, labels, reduction='sum'), labels.numel())."
            )
        loss_sum, items = term
        if not isinstance(loss_sum, Tensor) or loss_sum.ndim:
            _refuse_loss(name, loss_sum)
        if type(items) is not int or items < 0:  # usually valid: a plain count
            _check_items(name, items)
    return terms


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _refuse_loss(name: str, loss_sum: object) -> NoReturn:
    if not isinstance(loss_sum, Tensor):
        raise TypeError(f"the loss of the term {name!r} is {_describe(loss_sum)}: it must be a 0-d tensor.")
    raise ValueError(
        f"the loss of the term {name!r} has shape {tuple(loss_sum.shape)}: it must be the 0-d sum of the item losses. "
        "Use reduction='sum', or call .sum() on it."
    )


def _check_items(name: str, items: object) -> None:
    if isinstance(items, Tensor):
        if items.dtype in HALF_PRECISION_DTYPES:
            raise ValueError(
                f"the items of the term {name!r} are in {items.dtype}, which cannot count past "
                f"{2 / torch.finfo(items.dtype).eps:g}. Sum the mask as it is (bool), or in float32."
            )
        if items.numel() != 1:
            raise ValueError(
                f"the items of the term {name!r} have shape {tuple(items.shape)}: they must be one number, the count "
                "of the micro-batch. Call .sum() on the mask."
            )
        if not items.is_cpu:  # reading its value would wait for the device
            return
        items = items.item()
    if not isinstance(items, _NUMBER):
        raise TypeError(
            f"the items of the term {name!r} are {_describe(items)}: they must be a number or a 0-d tensor."
        )
    if not 0 <= float(items) < math.inf:
        raise ValueError(f"the items of the term {name!r} are {items}: they must be a finite count, 0 or more.")


class LossTotals:
    """Loss sums and items of one window, by term: what to differentiate, and what to divide by.

    Args:
        totals: Global items of the whole window by term, if they are known before the first backward.
        prescale: Differentiate a single term divided by a power of two near the items of the first micro-batch, for
            float16: gradients then have the range of a mean loss instead of a sum's. Exact, since powers of two only
            move the exponent.
    """

    def __init__(self, totals: Mapping[str, Items] | None = None, *, prescale: bool = False) -> None:
        self.totals = None if totals is None else {name: _host(items) for name, items in totals.items()}
        self._prescale = prescale
        self._prescaled_by: float | Tensor | None = None
        self.num_recorded = 0
        self._last: list[tuple[str, bool]] = []  # terms of the last micro-batch, and whether they had items
        self._sums: defaultdict[str, list[float | Tensor]] = defaultdict(list)
        self._items: defaultdict[str, list[Items]] = defaultdict(list)
        self._global_totals: dict[str, TermReport] | None = None  # over all ranks, once exchanged

    @property
    def uses_plain_sums(self) -> bool:
        """Whether losses are differentiated undivided."""
        return self.totals is None and not self._prescale

    def record(self, terms: Terms) -> Tensor | None:
        """Record one micro-batch; return the 0-d loss to differentiate, or None if it has no items."""
        self.num_recorded += 1
        self._last.clear()
        if self.totals is None:
            return self._record_single(terms)
        weighted: Tensor | None = None
        for name, (loss_sum, items) in terms.items():
            if name not in self.totals:
                raise ValueError(
                    f"the loss has the term {name!r}, and count_items returned the totals of "
                    f"{', '.join(map(repr, self.totals))}: count it there too."
                )
            if self._add_term(name, loss_sum, items):
                part = loss_sum / self.totals[name]
                weighted = part if weighted is None else weighted + part
        return weighted

    def _record_single(self, terms: Terms) -> Tensor | None:
        if not terms:
            raise ValueError("the loss has no term: return at least one (loss_sum, items).")
        name, (loss_sum, items) = next(iter(terms.items()))
        if len(terms) > 1 or (self._sums and name not in self._sums):
            names = ", ".join(repr(name) for name in {**self._sums, **terms})
            raise ValueError(
                f"the loss has the terms {names}: several terms need their totals before the first backward. Pass "
                "count_items=, a function that returns {name: items} for these names."
            )
        if not self._add_term(name, loss_sum, items):
            return None
        if self._prescale:
            if self._prescaled_by is None:
                self._prescaled_by = _power_of_two_near(items)
            loss_sum = loss_sum / self._prescaled_by
        return loss_sum

    def _add_term(self, name: str, loss_sum: Tensor, items: Items) -> bool:
        """Record one term of one micro-batch; return whether it may have items."""
        items = _host(items) if isinstance(items, Tensor) else items
        self._items[name].append(items)
        sums = self._sums[name]
        has_items = may_have_items(items)
        self._last.append((name, has_items))
        if not has_items:
            return False
        # A copy: the caller may change the loss in place.
        sums.append(loss_sum.item() if loss_sum.is_cpu else loss_sum.detach().clone())
        return True

    def rollback(self, num_recorded: int) -> None:
        """Remove the micro-batch that was recorded after ``num_recorded`` ones; no-op if there is none."""
        if self.num_recorded == num_recorded:
            return
        self.num_recorded = num_recorded
        for name, has_items in self._last:
            self._items[name].pop()
            if has_items:
                self._sums[name].pop()

    def local_totals(self) -> dict[str, tuple[float | Tensor, float | Tensor]]:
        """Return local ``(items, loss_sum)`` of each term so far, on their devices, without waiting."""
        local: dict[str, tuple[float | Tensor, float | Tensor]] = {}
        for name in self.totals or list(self._items):
            local[name] = _added(self._items.get(name, [])), _added(self._totals_on_device([name]))
        return local

    def items_squared(self) -> float | Tensor:
        """Return Σ n_i² over the micro-batches of a loss of one term, on their device, without waiting."""
        counts = next(iter(self._items.values()), [])
        return _added([float(count * count) if not isinstance(count, Tensor) else count * count for count in counts])

    def undo_prescale(self, gradients: list[Tensor]) -> None:
        """Multiply gradients by what this rank divided its losses by: other ranks use another factor."""
        if self._prescaled_by is not None:
            torch._foreach_mul_(gradients, self._prescaled_by)
            self._prescaled_by = None

    def set_global_totals(self, totals: Sequence[tuple[float, float]]) -> None:
        """Set global ``(items, loss_sum)`` of each term, in the order of the sorted names."""
        names = sorted(self.totals or self._items or [SINGLE])
        assert not totals or len(totals) == len(names), "ranks have the same terms, or one that this rank has not seen"
        self._global_totals = {}
        for name, (count, total) in zip(names, totals, strict=False):
            items = int(count) if float(count).is_integer() else count
            self._global_totals[name] = TermReport(loss=total / items if items else math.nan, items=items)

    def nan_if_loss_not_finite(self, value: Tensor) -> Tensor:
        """Return the value, or NaN if a loss is not finite, without waiting for the device."""
        if self._global_totals is not None:
            return value if self.is_finite() else value * math.nan
        for total in self._totals_on_device():
            value = value + 0.0 * (total.to(value) if isinstance(total, Tensor) else total)
        return value

    def is_finite(self) -> bool:
        """Return whether the loss of every term is finite; waits for the device."""
        if self._global_totals is not None:
            return all(math.isfinite(term.loss) for term in self._global_totals.values() if term.items)
        return all(math.isfinite(float(total)) for total in self._totals_on_device())

    def _totals_on_device(self, names: Iterable[str] | None = None) -> list[float | Tensor]:
        """Return the sum of the losses of some terms, or of all, on the host and on each device."""
        on_host, on_device = 0.0, defaultdict[torch.device, list[Tensor]](list)
        chosen = self._sums if names is None else names
        for loss_sum in chain.from_iterable(self._sums[name] for name in chosen):
            if isinstance(loss_sum, Tensor):
                on_device[loss_sum.device].append(loss_sum)
            else:
                on_host += loss_sum
        return [on_host, *(torch.stack(sums).sum(dtype=_sum_dtype(sums[0])) for sums in on_device.values())]

    def items(self, name: str | None = None) -> float:
        """Return the items so far of one term, by default of the first; waits for the device if counts are there."""
        if name is None:
            name = next(iter(self.totals or self._items), SINGLE)
        if self._global_totals is not None:
            return self._global_totals[name].items if name in self._global_totals else 0
        counts = self._items.get(name, [])
        on_device = [count.reshape(()) for count in counts if isinstance(count, Tensor)]
        total = sum(count for count in counts if not isinstance(count, Tensor))
        if on_device:
            total += torch.stack(on_device).sum().item()  # waits for the device
        return total

    def divisor(self) -> float:
        """Return what the summed gradient must still be divided by; 0 for a window without items.

        Waits for the device if counts are there. Raises ValueError if ``count_items`` returned other totals than those
        of the micro-batches: terms would have been divided by the wrong number.
        """
        if self.totals is None:
            return self.items() / (1.0 if self._prescaled_by is None else float(self._prescaled_by))
        for name, total in self.totals.items():
            seen = self.items(name)
            counts = isinstance(seen, int) and isinstance(total, int)
            if seen != total if counts else not math.isclose(seen, total, rel_tol=WEIGHTS_ROUNDING):
                raise ValueError(
                    f"count_items returned {total} items for the term {name!r}, and the micro-batches had {seen}: the "
                    "two must count the same things, and all micro-batches of the window must run before its step()."
                )
        return 1.0 if any(self.totals.values()) else 0.0

    def terms(self) -> dict[str, TermReport]:
        """Return loss and items of each term over the window; waits for the device."""
        if self._global_totals is not None:
            return dict(self._global_totals)
        reports = {}
        for name, sums in self._sums.items():
            items = self.items(name)
            on_device = [loss_sum for loss_sum in sums if isinstance(loss_sum, Tensor)]
            total = math.fsum(loss_sum for loss_sum in sums if not isinstance(loss_sum, Tensor))
            if on_device:
                total += torch.stack(on_device).sum(dtype=_sum_dtype(on_device[0])).item()  # waits for the device
            reports[name] = TermReport(loss=total / items if items else math.nan, items=items)
        return reports


def may_have_items(items: Items) -> bool:
    """Return whether there may be items: a count on a device is not read."""
    items = _host(items)
    return isinstance(items, Tensor) or items != 0


def _added(values: Iterable[float | Tensor]) -> float | Tensor:
    """Return the sum of numbers and 0-d tensors, in float64."""
    total = math.fsum(value for value in values if not isinstance(value, Tensor))
    on_device = [value.reshape(()).to(torch.float64) for value in values if isinstance(value, Tensor)]
    return total + torch.stack(on_device).sum() if on_device else total


def _host(items: Items) -> Items:
    """Return counts on the CPU as numbers; those on a device as they are."""
    return items.item() if isinstance(items, Tensor) and items.is_cpu else items


def _power_of_two_near(items: Items) -> float | Tensor:
    if isinstance(items, Tensor):
        count = items.detach().float().reshape(())
        return torch.where(count > 0, torch.exp2(torch.ceil(torch.log2(count))), 1.0)
    return 2.0 ** math.ceil(math.log2(items))


def _sum_dtype(loss_sum: Tensor) -> torch.dtype:
    return torch.float32 if loss_sum.device.type == "mps" else torch.float64
