"""Loss sums and items of a window. The only divisor of the package is computed here.

For one term the gradient is Σ_i ∇s_i / Σ_i n_i: micro-batches are differentiated undivided, and the total is divided
once, when its items are known. A loss of several terms is Σ_t (Σ_i s_ti / N_t): each term is divided by its own total
before it is differentiated, so the totals N_t must be known first.

Long because sums and items are on the host or on devices, and each is read in its own way.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigbatch.gradients.loss_checks import as_count, as_totals, describe, refuse_loss
from bigbatch.types import Items, Terms
from bigbatch.window_report import TermReport

WEIGHTS_ROUNDING = 1e-5  # items may be weights: their sum depends on the order in float32, where counts are exact
_PAIR = (tuple, list)
_ONLY_INT = {int}
SINGLE = "loss"  # name of the term of a loss with only one
_SINGLE_TERM = (SINGLE,)


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
                f"the term {name!r} of the loss is {describe(term)}: return the pair (loss_sum, items), the sum of "
                "the item losses and how many items it runs over, for example "
                "(F.cross_entropy(logits, labels, reduction='sum'), labels.numel())."
            )
        loss_sum, items = term
        if not isinstance(loss_sum, Tensor) or loss_sum.ndim:
            refuse_loss(name, loss_sum)
        if type(items) is not int or items < 0:  # usually valid: a plain count
            count = as_count(name, items)
            if count is not items:
                terms = {**terms, name: (loss_sum, count)}
    return terms


class LossTotals:
    """Loss sums and items of one window, by term: what to differentiate, and what to divide by.

    Args:
        totals: Global items of the whole window by term, if they are known before the first backward.
        prescale: Differentiate a single term divided by a power of two near the items of the first micro-batch, for
            float16: gradients then have the range of a mean loss instead of a sum's. Exact, since powers of two only
            move the exponent.
    """

    def __init__(self, totals: Mapping[str, Items] | None = None, *, prescale: bool = False) -> None:
        self.totals: dict[str, float] | None = None
        if totals is not None:  # counts on a device are read here: the first backward divides by them
            self.totals = {name: _read(as_count(name, items)) for name, items in as_totals(totals).items()}
        self._prescale = prescale
        self._prescaled_by: float | Tensor | None = None
        self.num_recorded = 0
        self._last: Sequence[str] = ()  # terms of the last micro-batch
        self._sums: defaultdict[str, list[float | Tensor]] = defaultdict(list)
        self._items: defaultdict[str, list[Items]] = defaultdict(list)  # as many for each term as sums
        self._global_totals: dict[str, TermReport] | None = None  # over all ranks, once exchanged

    @property
    def uses_plain_sums(self) -> bool:
        """Whether losses are differentiated undivided."""
        return self.totals is None and not self._prescale

    def record_pair(self, result: object) -> Tensor | None:
        """Record what loss functions usually return, a sum and a positive int; return None for anything else.

        As `record` of `as_terms`, in 7 µs instead of 12 (within a window of benchmarks/overhead.py, one CPU core).
        """
        if type(result) is not tuple or len(result) != 2 or self._prescale or self.totals is not None:
            return None
        loss_sum, items = result
        if type(items) is not int or items <= 0 or not isinstance(loss_sum, Tensor) or loss_sum.ndim:
            return None
        if len(self._sums) > (SINGLE in self._sums):
            return None  # of another term before
        self.num_recorded += 1
        self._last = _SINGLE_TERM
        self._items[SINGLE].append(items)
        self._sums[SINGLE].append(loss_sum.item() if loss_sum.is_cpu else loss_sum.detach().clone())
        return loss_sum

    def record(self, terms: Terms) -> Tensor | None:
        """Record one micro-batch; return the 0-d loss to differentiate, or None if there is nothing to differentiate.

        The gradient of every micro-batch counts, also of one with 0 items: a divisor may count something else than the
        items of the sum, such as positives. Only a loss that is NaN with 0 items, a mean over nothing, adds nothing;
        reading that loss waits for its device. A term whose total is 0 cannot be divided, and is left out.

        A count on a device is not read. A loss that is NaN where it is 0 is then left out of the sum of losses, and its
        gradient is added: 0 for ``F.cross_entropy`` without a label that counts, NaN for a division by the count.
        """
        self.num_recorded += 1
        self._last = ()
        if self.totals is None:
            return self._record_single(terms)
        weighted: Tensor | None = None
        for name, (loss_sum, items) in terms.items():
            if name not in self.totals:
                raise ValueError(
                    f"the loss has the term {name!r}, and count_items returned the totals of "
                    f"{', '.join(map(repr, self.totals))}: count it there too."
                )
            counts = self._add_term(name, loss_sum, items)
            if not (total := self.totals[name]):
                self._sums[name][-1] = 0.0
            elif counts:
                part = loss_sum / total
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
        """Record one term of one micro-batch; return whether its gradient counts."""
        items = _host(items) if isinstance(items, Tensor) else items
        # A copy: the caller may change the loss in place.
        value = loss_sum.item() if loss_sum.is_cpu else loss_sum.detach().clone()
        counts = True
        if isinstance(items, Tensor):
            value = loss_sum.detach().to(items.device, copy=True) if loss_sum.is_cpu else value
        elif not items:
            value = loss_sum.item()  # waits for the device, in this case only
            counts = loss_sum.requires_grad and value == value
            value = 0.0 if value != value else value  # NaN
        self._last = (*self._last, name)
        self._items[name].append(items)
        self._sums[name].append(value)
        return counts

    def rollback(self, num_recorded: int) -> None:
        """Remove the micro-batch that was recorded after ``num_recorded`` ones; no-op if there is none."""
        if self.num_recorded == num_recorded:
            return
        self.num_recorded = num_recorded
        for name in self._last:
            self._items[name].pop()
            self._sums[name].pop()

    def local_totals(self) -> dict[str, tuple[float | Tensor, float | Tensor]]:
        """Return local ``(items, loss_sum)`` of each term so far, on their devices, without waiting."""
        local: dict[str, tuple[float | Tensor, float | Tensor]] = {}
        for name in self.totals or list(self._items):
            local[name] = _added(self._items.get(name, [])), _added(self._totals_on_device([name]))
        return local

    def microbatch_items(self) -> list[Items]:
        """Return the items of each micro-batch so far of a loss of one term, on their devices."""
        return list(next(iter(self._items.values()), []))

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
            if isinstance(total, Tensor):
                value = value + 0.0 * total.to(value)
            elif not math.isfinite(total):
                value = value * math.nan
        return value

    def is_finite(self) -> bool:
        """Return whether the loss of every term is finite; waits for the device."""
        if self._global_totals is not None:
            return all(math.isfinite(term.loss) for term in self._global_totals.values() if term.items)
        return all(math.isfinite(float(total)) for total in self._totals_on_device())

    def _totals_on_device(self, names: Iterable[str] | None = None) -> list[float | Tensor]:
        """Return the sum of the losses of some terms, or of all, on the host and on each device."""
        on_host: list[float] = []
        on_device = defaultdict[torch.device, list[tuple[Tensor, Items]]](list)
        for name in self._sums if names is None else names:
            sums = self._sums.get(name, [])
            if set(map(type, sums)) == {float}:  # the usual case on the CPU
                on_host += sums  # type: ignore[arg-type]
                continue
            for loss_sum, items in zip(sums, self._items.get(name, []), strict=True):
                if isinstance(loss_sum, Tensor):
                    on_device[loss_sum.device].append((loss_sum, items))
                else:
                    on_host.append(loss_sum)
        total = sum(on_host)
        return [math.fsum(on_host) if math.isfinite(total) else total, *map(_sum_without_empty, on_device.values())]

    def items(self, name: str | None = None) -> float:
        """Return the items so far of one term, by default of the first; waits for the device if counts are there."""
        if name is None:
            name = next(iter(self.totals or self._items), SINGLE)
        if self._global_totals is not None:
            return self._global_totals[name].items if name in self._global_totals else 0
        counts = self._items.get(name, [])
        if set(map(type, counts)) == _ONLY_INT:  # the usual case
            return sum(counts)  # type: ignore[arg-type]
        on_device = [count.reshape(()) for count in counts if isinstance(count, Tensor)]
        total = sum(count for count in counts if not isinstance(count, Tensor))
        if any(count.is_floating_point() for count in on_device):
            on_device = [_wide(count) for count in on_device]
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
        for name in self._sums:
            items = self.items(name)
            total = sum(map(float, self._totals_on_device([name])))  # waits for the device
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


def _read(items: Items) -> float:
    """Return a count as a number; waits for the device if it is there."""
    count: float = items.item() if isinstance(items, Tensor) else items
    return count


def _host(items: Items) -> Items:
    """Return counts on the CPU as numbers; those on a device as they are."""
    return items.item() if isinstance(items, Tensor) and items.is_cpu else items


def _power_of_two_near(items: Items) -> float | Tensor:
    if isinstance(items, Tensor):
        count = items.detach().float().reshape(())
        return torch.where(count > 0, torch.exp2(torch.ceil(torch.log2(count))), 1.0)
    return 2.0 ** math.ceil(math.log2(items)) if items else 1.0


def _sum_without_empty(recorded: Sequence[tuple[Tensor, Items]]) -> Tensor:
    """Return the sum of losses on one device, without those that are NaN and whose items there are 0."""
    plain = [loss_sum for loss_sum, items in recorded if not isinstance(items, Tensor)]
    counted = [(loss_sum, items) for loss_sum, items in recorded if isinstance(items, Tensor)]
    parts = [torch.stack(plain)] if plain else []
    if counted:
        losses = torch.stack([loss_sum for loss_sum, _ in counted])
        counts = torch.stack([_wide(items).to(losses.device) for _, items in counted])
        parts.append(torch.where((counts == 0) & losses.isnan(), 0.0, losses))
    return torch.cat(parts).sum(dtype=_sum_dtype(parts[0]))


def _wide(count: Tensor) -> Tensor:
    """Return a count as a 0-d tensor in which sums and squares of counts are exact."""
    return count.detach().reshape(()).to(_sum_dtype(count))


def _sum_dtype(loss_sum: Tensor) -> torch.dtype:
    return torch.float32 if loss_sum.device.type == "mps" else torch.float64
