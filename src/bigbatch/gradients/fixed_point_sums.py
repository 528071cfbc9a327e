"""Gradient sums whose order does not matter: each gradient is added as integers, and integer addition is associative.

sum_p += trunc(g_p · 2**s_p) in int64    →    reduced over ranks as integers    →    float32(sum_p · 2**-s_p)

The product with a power of two is exact. Besides the sums, the largest |g| of each parameter is kept, which says
afterwards whether the scales s were suitable, and whether a gradient was not finite.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bigbatch.gradients.foreign_writes import SumVersions, WindowHook, on_accumulated
from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES, GradientSums
from bigbatch.gradients.graph_leaves import run_backward
from bigbatch.gradients.sum_store import SumStore

CPU_CHUNK, DEVICE_CHUNK = 2**16, 2**24
"""Elements of a gradient that are converted at once, on the CPU and elsewhere.

On the CPU they stay in the cache: 4 million elements are added in 12 ms instead of 30 (one core, torch 2.11). Elsewhere
the copies need 12 bytes an element.
"""

SMALL = 2**14
"""Gradients with at most this many elements are collected and added together: one kernel each costs the host more."""

MOST_COLLECTED = 2**20
"""Collected gradients are added before the end of the backward if they have more elements than this together."""

MOST_ORDERS = 8
"""Vectors of peaks, one for each sequence of parameters that received gradients, before they become one."""


class FixedPointSums(GradientSums):
    """Gradient sums in int64, for float32 and bfloat16 parameters on one device.

    Until `to_float32`, `tensors` are the integers. A retry of a micro-batch runs its whole backward again, and leaves
    out the parameters that received their gradient before: the bits do not depend on where memory ran out.

    Args:
        parameters: As for `GradientSums`.
        scales: The exponent s of each parameter.
    """

    def __init__(self, parameters: Iterable[Tensor], *, scales: Sequence[int]) -> None:
        super().__init__(parameters)
        self.store = SumStore(are_integers=True)
        self._index = {parameter: index for index, parameter in enumerate(self.parameters)}
        self._complete: frozenset[Tensor] = frozenset()  # have the gradient of the current micro-batch already
        self._small: dict[Tensor, Tensor] = {}  # gradients of the current backward that are added together
        self._num_collected = 0  # elements of these
        self._added: list[tuple[int, Tensor]] = []  # index and largest |g| of the gradients since `_note_peaks`
        self._peaks: dict[tuple[int, ...], Tensor] = {}  # by the indices of the parameters of a backward, in its order
        self.set_scales(scales)

    @property
    def _totals(self) -> dict[Tensor, Tensor]:
        return self.store.float32

    def set_scales(self, scales: Sequence[int]) -> None:
        """Use other scales, before the first backward or after `clear`."""
        self._scales = list(scales)
        self._factors = [2.0**scale for scale in scales]

    @property
    def scales(self) -> Sequence[int]:
        """The exponents in use."""
        return self._scales

    def _hook_trained(self) -> None:
        known = set(self._hooked)
        super()._hook_trained()
        wide = [p for p in self._trained if id(p) not in known and p.dtype not in HALF_PRECISION_DTYPES]
        self._handles += [on_accumulated(p, WindowHook(self._move_to_store, p)) for p in wide]

    def backward(self, loss: Tensor, *, only: Sequence[Tensor] | None = None, retain_graph: bool = False) -> None:
        """Add ∂loss/∂parameters to the sums, as `GradientSums.backward`."""
        if only is not None:
            self._complete = frozenset(self.parameters) - frozenset(only)
        try:
            super().backward(loss, retain_graph=retain_graph)
            self._note_peaks()
        finally:
            if only is not None:
                self._complete = frozenset()

    def _run_backward(self, loss: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool) -> None:
        run_backward(loss, inputs, retain_graph=retain_graph)  # no gradient is changed in place
        self._add_small()

    @contextmanager
    def adding(self) -> Iterator[tuple[Tensor, ...]]:
        """Not supported: backwards of others would leave collected gradients behind."""
        raise NotImplementedError("reproducible sums take backwards by backward() only")
        yield ()

    def _move_to_store(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if self._is_paused or not self._adding or gradient is None:
            super()._move_to_store(parameter)  # refused, or ignored
            return
        if gradient.is_sparse:
            raise TypeError(
                "a gradient is sparse, and reproducible=True sums dense gradients: use embeddings with sparse=False."
            )
        if parameter not in self._complete and (size := gradient.numel()):
            if size > SMALL or parameter in self._small:  # a reentrant checkpoint adds a gradient in parts
                self._add(parameter, gradient.detach())
            else:
                self._small[parameter] = gradient.detach()
                self._num_collected += size
                if self._num_collected > MOST_COLLECTED:
                    self._add_small()
        parameter.grad = None

    def _add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add trunc(gradient · factor). The gradient is not changed: it may be a view of memory that others read."""
        index = self._index[parameter]
        least, most = torch.aminmax(gradient)
        self._added.append((index, torch.maximum(most, least.neg_()).to(torch.float32)))  # NaN if any element is
        factor, total = self._factors[index], self._totals.get(parameter)
        chunk = CPU_CHUNK if gradient.is_cpu else DEVICE_CHUNK
        if gradient.numel() > chunk:
            if is_new := total is None:
                total = torch.empty_like(parameter, dtype=torch.int64, memory_format=torch.contiguous_format)
            self._add_in_chunks(total.view(-1), gradient.reshape(-1), factor, chunk, is_new=is_new)
            self._totals[parameter] = total
            return
        integers = gradient.mul(factor).to(torch.int64, memory_format=torch.contiguous_format)
        if total is None:
            self._totals[parameter] = integers
        else:
            total.add_(integers)

    def _add_in_chunks(self, total: Tensor, gradient: Tensor, factor: float, chunk: int, *, is_new: bool) -> None:
        """Add parts one after the other; nothing is allocated between them, so that all or none are added."""
        scaled = gradient.new_empty(chunk)
        integers = None if is_new else total.new_empty(chunk)
        for start in range(0, gradient.numel(), chunk):
            part, of_total = gradient[start : start + chunk], total[start : start + chunk]
            product = torch.mul(part, factor, out=scaled[: part.numel()])
            if integers is None:
                of_total.copy_(product)
            else:
                of_total.add_(integers[: part.numel()].copy_(product))

    def _add_small(self) -> None:
        """Add the gradients that were collected; to all of their parameters, or to none if memory runs out."""
        if not self._small:
            return
        parameters, gradients = list(self._small), list(self._small.values())
        indices = [self._index[parameter] for parameter in parameters]
        peaks = torch._foreach_norm(gradients, math.inf, dtype=torch.float32)
        self._added += zip(indices, peaks, strict=True)
        products = torch._foreach_mul(gradients, [self._factors[index] for index in indices])
        flat = torch.cat([product.reshape(-1) for product in products])  # in the widest dtype of the gradients
        parts = torch.split(flat.to(torch.int64), [gradient.numel() for gradient in gradients])
        integers = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
        known = [
            (self._totals[parameter], part)
            for parameter, part in zip(parameters, integers, strict=True)
            if parameter in self._totals
        ]
        new = {
            parameter: part.clone()  # not a view: a sum is freed by itself
            for parameter, part in zip(parameters, integers, strict=True)
            if parameter not in self._totals
        }
        if known:
            torch._foreach_add_(*map(list, zip(*known, strict=True)))
        self._totals.update(new)
        self._drop_small()

    def _drop_small(self) -> None:
        self._small.clear()
        self._num_collected = 0

    def _note_peaks(self) -> None:
        if not self._added:
            return
        indices, peaks = zip(*self._added, strict=True)
        found = torch.stack(peaks)
        if indices not in self._peaks and len(self._peaks) == MOST_ORDERS:
            everything = torch.tensor(self.peaks(), dtype=torch.float32, device=found.device)
            self._peaks = {tuple(range(len(self.parameters))): everything}
        if indices in self._peaks:  # also if it is the order of all parameters
            torch.maximum(self._peaks[indices], found, out=self._peaks[indices])  # NaN if either is
        else:
            self._peaks[indices] = found
        self._added.clear()  # last: if memory runs out above, `unchanged_since` notes them

    def peaks(self) -> list[float]:
        """Return the largest |g| of each parameter so far, NaN or infinity if one was; waits for the device."""
        largest = [0.0] * len(self.parameters)
        for indices, peaks in self._peaks.items():
            for index, peak in zip(indices, peaks.tolist(), strict=True):
                largest[index] = max(largest[index], peak) if not math.isnan(peak) else math.nan
        return largest

    def unchanged_since(self, versions: SumVersions) -> list[Tensor]:
        """Return the parameters that did not receive the gradient of a failed backward, as `GradientSums` does."""
        self._drop_small()
        for parameter in self.parameters:
            parameter.grad = None  # written by autograd, but the hook had no memory to add it
        self._note_peaks()
        return super().unchanged_since(versions)

    def fill_missing_with_zeros(self, wanted: Iterable[bool] | None = None) -> None:
        """Create the missing sums, as zeros; arguments as for `GradientSums`."""
        trained = [parameter.requires_grad for parameter in self.parameters]
        for parameter, is_wanted in zip(self.parameters, wanted or trained, strict=True):
            if is_wanted and parameter not in self._totals:
                self._totals[parameter] = torch.zeros_like(
                    parameter, dtype=torch.int64, memory_format=torch.contiguous_format
                )
        self.mark_unmodified()

    def to_float32(self, peaks: Sequence[float]) -> None:
        """Convert the sums, after their reduction over ranks, to float32; once, before the division.

        Args:
            peaks: The largest |g| of each parameter over all ranks; the sum of one that is not finite becomes NaN.
        """
        for parameter in list(self._totals):
            index = self._index[parameter]
            if math.isfinite(peaks[index]):
                wide = self._totals[parameter].to(torch.float64)
                self._totals[parameter] = wide.mul_(2.0 ** -self._scales[index]).to(torch.float32)
            else:
                self._totals[parameter] = torch.full_like(parameter, math.nan, dtype=torch.float32)
        self.mark_unmodified()

    def clear(self) -> None:
        """Drop all sums, magnitudes and gradients."""
        super().clear()
        self._peaks.clear()
        self._added.clear()
        self._drop_small()
