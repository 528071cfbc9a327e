"""Random values of new weights, drawn by several threads; the same values for any number of them.

a fill of a whole tensor → deferred: a later one replaces it, any other use of the tensor ends it → blocks, each with a
generator of its own → threads

A layer of torch fills its weights when it is made, and the model fills them once more: only the second is drawn. Both,
by one thread, took 6 of the 28 seconds from the command to the first update of 0.5 billion weights next to an H200.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bigbatch.lm.cpu_cores import cpu_cores

Module = TypeVar("Module", bound=nn.Module)

BLOCK = 2**22
"""Elements that one generator fills: 20 ms of one thread."""

_FILLS: frozenset[Any] = frozenset({torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default})
_READ_NO_VALUES: frozenset[Any] = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})


def filled_in_parallel(make: Callable[[], Module], seed: int, *, num_threads: int | None = None) -> Module:
    """Make a module whose tensors ``normal_`` and ``uniform_`` fill in parallel.

    The values of a tensor that such a function fills as a whole, on the CPU, depend on the seed and on the number of
    tensors filled before it. They do not depend on the threads, nor on the generator of torch, which all other random
    functions use as always.

    Args:
        make: Makes the module. It may read what it has filled by operators of torch, not by ``numpy()`` or
            ``tolist()``, which are none.
        seed: Of the values.
        num_threads: By default the cores that this process may use.
    """
    fills = _DeferredFills(seed)
    with fills:
        module = make()
    fills.run(cpu_cores().usable if num_threads is None else num_threads)
    return module


class _DeferredFills(TorchDispatchMode):
    """Defers fills of whole tensors until their values are used."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._num_drawn = 0
        self._pending: dict[int, Callable[[Tensor, torch.Generator], Tensor]] = {}  # by the address of the storage
        self._tensors: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Defer a fill, and draw what another operator may read."""
        kwargs = kwargs or {}
        if func in _FILLS and kwargs.get("generator") is None and _is_whole(args[0]):
            return self._defer(func, args, kwargs)
        if self._pending and func not in _READ_NO_VALUES:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._draw(value)
        return func(*args, **kwargs)

    def _defer(self, fill: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        tensor: Tensor = args[0]
        address = tensor.data_ptr()
        self._pending[address] = lambda part, generator: fill(part, *args[1:], **{**kwargs, "generator": generator})
        self._tensors[address] = tensor.detach()
        return tensor

    def _draw(self, tensor: Tensor) -> None:
        """Draw the values of a tensor now, if they are pending."""
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return
        address = tensor.untyped_storage().data_ptr()
        if address in self._pending:
            for draw in self._blocks(address):
                draw()

    def _blocks(self, address: int) -> list[Callable[[], None]]:
        """Return the calls that draw the values of a tensor, which is not pending any more."""
        tensor, fill = self._tensors.pop(address).view(-1), self._pending.pop(address)
        number = self._num_drawn
        self._num_drawn += 1
        return [
            partial(_fill_block, part, fill, f"seed {self._seed} tensor {number} block {index}")
            for index, part in enumerate(torch.split(tensor, BLOCK))
        ]

    def run(self, num_threads: int) -> None:
        """Draw all pending values: also of tensors that are no parameters or buffers, which code may hold anywhere."""
        blocks = [block for address in list(self._pending) for block in self._blocks(address)]
        with ThreadPoolExecutor(num_threads, "bigbatch-fills") as pool:
            for done in [pool.submit(block) for block in blocks]:
                done.result()


def _fill_block(part: Tensor, fill: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:8], "big"))
    fill(part, generator)


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor is on the CPU and all of its memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and tensor.nbytes == tensor.untyped_storage().nbytes()
    )
