"""A linear layer that adds the gradient of its weight to the sum of a window, within the matrix product.

    forward     y = x · copyᵀ + b           copy: the weight in the dtype of x
    backward    ∂loss/∂x = ∂y · copy, and sum += ∂yᵀ · x; autograd receives no gradient of the weight

The weight is an input of the autograd node nevertheless: graphs show which parameters a loss depends on.

Compiled code must be the same for all layers of a model, so that a layer is identified by the value of a tensor, its
key, and the addition is an operator, ``bigbatch::add_weight_gradient``. The key is declared as what it writes to, so
that no compiler drops or repeats it; functional copies of the key have the same value.
"""

import copyreg
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from bigbatch.gradients.weight_products import weight_gradient

_NUMBERS = count()


class WeightSum(Protocol):
    """The sum of one weight, as linear layers see it."""

    __weakref__: Any

    def accepts_gradient(self, inputs: Tensor | None) -> bool:
        """Return whether the running backward is to add to the sum, instead of returning the gradient to autograd."""

    def add(self, output_gradient: Tensor, inputs: Tensor) -> None:
        """Add a gradient, ``output_gradientᵀ · inputs``."""

    def add_rows(self, places: Tensor, rows: Tensor) -> None:
        """Add rows of a gradient at their places."""

    def add_whole(self, gradient: Tensor) -> None:
        """Add a gradient of the weight; it is not written to."""

    def add_compiled(self, output_gradient: Tensor, inputs: Tensor) -> None:
        """Add a gradient in compiled code, which cannot return it to autograd."""


# By the value of their keys: compiled code and its operator reference nothing but tensors.
_SUMS: "WeakValueDictionary[int, WeightSum]" = WeakValueDictionary()


def make_key(weight_sum: WeightSum) -> Tensor:
    """Return a key, int64 and 0-d on the CPU, that refers to a sum for as long as the sum lives."""
    number = next(_NUMBERS)
    _SUMS[number] = weight_sum
    return torch.tensor(number)


def find_sum(key: Tensor) -> WeightSum | None:
    """Return the sum that a key refers to; None if it has been deleted."""
    return _SUMS.get(int(key))


class FusedLinear(nn.Linear):
    """What `install` makes of an ``nn.Linear``: the same parameters, outputs and gradients."""

    _bigbatch_key: Tensor
    _bigbatch_adds: bool  # else autograd receives the gradient of the weight
    _bigbatch_copy: Tensor | None  # of the weight
    _bigbatch_is_tied: bool  # to an embedding
    _bigbatch_weight: Tensor  # that of the sum: torch.func.functional_call replaces the one of the layer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in torch
        """Compute ``input · weightᵀ + bias``."""
        weight, copy = self.weight, self._bigbatch_copy
        bias: Tensor | None = self.bias
        if not torch.is_grad_enabled() or not weight.requires_grad or not _is_plain(input):
            return F.linear(input, weight, bias)
        if weight is not self._bigbatch_weight:
            return F.linear(input, weight, bias)
        kind = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(kind) and torch.float64 not in (dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)  # noqa: A001
            bias = None if bias is None else bias.to(dtype)
        elif dtype != weight.dtype:
            return F.linear(input, weight, bias)  # raises
        if copy is not None and copy.dtype != dtype:
            copy = None
        key = self._bigbatch_key if self._bigbatch_adds or not torch.compiler.is_compiling() else None
        output: Tensor = _Linear.apply(input, weight, copy, bias, key)  # type: ignore[no-untyped-call]
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as the ordinary layer: a copy that is made within a window has no part in its sums."""
        return ordinary_copy(self, nn.Linear)


def ordinary_copy(layer: nn.Module, kind: type[nn.Module]) -> tuple[Any, ...]:
    """Return what ``__reduce_ex__`` of a fused layer returns, to be copied as an ordinary one."""
    state = {name: value for name, value in vars(layer).items() if not name.startswith("_bigbatch_")}
    return copyreg.__newobj__, (kind,), state  # type: ignore[attr-defined]


def is_exactly_linear(module: object) -> bool:
    """Return whether a module is an ``nn.Linear``, fused at the moment or not, and of no other subclass."""
    return type(module) in (nn.Linear, FusedLinear)


def install(
    linear: nn.Linear, key: Tensor, *, adds: bool, copy: Tensor | None, is_tied: bool = False
) -> Callable[[], None]:
    """Make a `FusedLinear` of a layer that is exactly an ``nn.Linear``; return a function that undoes it.

    Args:
        linear: The layer.
        key: Of the sum of its weight.
        adds: Whether compiled code adds to the sum.
        copy: Of the weight, in a narrower dtype.
        is_tied: Whether an embedding has the same weight.
    """
    assert type(linear) is nn.Linear, "subclasses have a forward of their own"
    own = {"_bigbatch_key": key, "_bigbatch_adds": adds, "_bigbatch_copy": copy, "_bigbatch_is_tied": is_tied}
    own |= {"_bigbatch_weight": linear.weight}
    linear.__dict__.update(own)
    linear.__class__ = FusedLinear

    def remove() -> None:
        linear.__class__ = nn.Linear
        for name in own:
            linear.__dict__.pop(name, None)

    return remove


def _is_plain(inputs: Tensor) -> bool:
    """Return whether autograd alone differentiates: no tensor subclass, no transform of `torch.func`."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return False
    if torch.compiler.is_compiling():
        return True
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return type(inputs) in (Tensor, nn.Parameter) and not is_transformed


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, copy: Tensor | None, bias: Tensor | None, key: Tensor | None
    ) -> Tensor:
        operand = weight.to(inputs.dtype) if copy is None else copy
        ctx.save_for_backward(inputs, operand)
        ctx.key, ctx.dtype = key, weight.dtype
        if not torch.compiler.is_compiling():
            ctx.weight = weight
        return F.linear(inputs, operand, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, operand = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # of a gradient that is differentiated again
            operand, key = ctx.weight.to(inputs.dtype), None
        else:
            key = ctx.key
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (rows @ operand).view(inputs.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _add_or_return(key, rows, inputs.reshape(-1, inputs.shape[-1]), ctx.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        return grad_inputs, grad_weight, None, grad_bias, None


def _add_or_return(key: Tensor | None, output_gradient: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Add the gradient of a weight to its sum, and return None; or return it as the ordinary layer does."""
    if key is not None:
        if torch.compiler.is_compiling():
            torch.ops.bigbatch.add_weight_gradient(key, output_gradient, inputs)
            return None
        weight_sum = find_sum(key)
        if weight_sum is not None and weight_sum.accepts_gradient(inputs):
            weight_sum.add(output_gradient, inputs)
            return None
    return weight_gradient(output_gradient, inputs, inputs.dtype).to(dtype)


def _add_compiled(key: Tensor, output_gradient: Tensor, inputs: Tensor) -> None:
    weight_sum = find_sum(key)
    if weight_sum is None:
        raise RuntimeError("the graph of a window was differentiated after its engine was deleted.")
    weight_sum.add_compiled(output_gradient, inputs)


_LIBRARY = torch.library.Library("bigbatch", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("add_weight_gradient(Tensor(a!) key, Tensor output_gradient, Tensor inputs) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.impl("add_weight_gradient", _add_compiled, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("bigbatch::add_weight_gradient", lambda key, output_gradient, inputs: None, lib=_LIBRARY)
