"""State of torch that belongs to a thread, carried to the threads of micro-batches."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch


@dataclass(frozen=True)
class ThreadState:
    """State of one thread: gradient mode, autocast, device, stream, modes, hooks on saved tensors, context variables.

    Attributes:
        context: Context variables; to run a function in.
        device: Of the model.
    """

    context: Context
    device: torch.device
    _has_grad: bool
    _autocast: Sequence[tuple[str, bool, torch.dtype, bool]]
    _function_modes: Sequence[Any]
    _dispatch_modes: Sequence[Any]
    _saved_tensor_hooks: Any
    _stream: Any

    @classmethod
    def now(cls, device: torch.device) -> "ThreadState":
        """Return the state of this thread.

        Args:
            device: Of the model.
        """
        kinds = dict.fromkeys(["cpu", device.type])
        cache = torch.is_autocast_cache_enabled()
        return cls(
            copy_context(),
            device,
            torch.is_grad_enabled(),
            [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache) for kind in kinds],
            list(overrides._get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
            list(dispatch._get_current_dispatch_mode_stack()),
            torch._C._autograd._top_saved_tensors_default_hooks(True),
            torch.cuda.current_stream(device) if device.type == "cuda" else None,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Set the state in another thread; also that its backwards run in it, where they may wait.

        By default backwards on CUDA run in one thread of the device: one that waits there would stop all others.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(torch.set_grad_enabled(self._has_grad))
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            for kind, enabled, dtype, cache in self._autocast:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cache))
            for module, modes in ((overrides, self._function_modes), (dispatch, self._dispatch_modes)):
                for mode in modes:
                    stack.enter_context(_pushed(module, mode))
            if self._saved_tensor_hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._saved_tensor_hooks))
            yield

    @property
    def has_saved_tensor_hooks(self) -> bool:
        """Whether other code decides where saved tensors are kept."""
        return self._saved_tensor_hooks is not None


@contextmanager
def _pushed(module: Any, mode: Any) -> Iterator[None]:
    """Make a mode that is active in another thread active in this one, without entering it again."""
    module._push_mode(mode)
    try:
        yield
    finally:
        module._pop_mode()
