"""An optimizer whose state lives in host memory and passes through the device in its step.

prepare: state ──▶ host memory
step:    pre-hooks → chunk by chunk: host ──▶ device, the optimizer's own step, device ──▶ host → post-hooks
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from bigbatch.offload.arena import Arena, Place, arena_bytes
from bigbatch.offload.chunk_sizes import CHUNK_BYTES, SLOT_FACTOR
from bigbatch.offload.host_sums import HostSums
from bigbatch.offload.host_values import whole_value
from bigbatch.offload.narrow_weights import NarrowWeights
from bigbatch.offload.partial_step import StepSettings, only_parameters, plain_step, without_hooks
from bigbatch.offload.state_chunk import StateChunk, lay_out, make_chunks, streamed_state
from bigbatch.offload.state_loading import load_into_host_memory
from bigbatch.offload.transfers import Transfers, make_transfers

if TYPE_CHECKING:
    from torch.optim import Optimizer

InitState = Callable[["Optimizer", Sequence[Tensor]], object]
"""Creates the missing state of some parameters of an optimizer on their device, if that is possible before a step."""


class StreamedOptimizer:
    """Steps an optimizer chunk by chunk, with the same kernels and the same bits as its own step over all parameters.

        streamed = StreamedOptimizer(optimizer, transfers)
        streamed.prepare(init_state)    # all state is in host memory from here on
        streamed.step()                 # instead of optimizer.step()

    Between steps ``optimizer.state`` refers to host memory, so that a state dict is read without the device.

    Args:
        optimizer: One that `check_streamable` accepts.
        transfers: Copies.
        weights: Those of its parameters that are bfloat16 on the device; none by default.
        sums: Gradient sums in host memory; by default they are on the device.
        chunk_bytes: As for `make_chunks`; 64 MiB by default.

    Attributes:
        optimizer, transfers, weights, sums: As passed.
        chunks: Parts of the parameters, with the state of each in one buffer.
        has_begun: Whether the last step may have changed a parameter.
    """

    def __init__(
        self,
        optimizer: "Optimizer",
        transfers: Transfers | None = None,
        *,
        weights: NarrowWeights | None = None,
        sums: HostSums | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.transfers = transfers or make_transfers(optimizer.param_groups[0]["params"][0].device)
        self.weights = weights or NarrowWeights({})
        self.sums = sums
        self.has_begun = False
        self._chunk_bytes = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        self.chunks: list[StateChunk] = []
        load_into_host_memory(optimizer, self.weights.dtype_of, owner=self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamedOptimizer":
        return StreamedOptimizer(copy.deepcopy(self.optimizer, memo), chunk_bytes=self._chunk_bytes)

    @property
    def host_bytes(self) -> int:
        """Host memory of the state, and of gradient sums that are in host memory."""
        return sum(chunk.host_bytes for chunk in self.chunks)

    @property
    def largest_chunk_bytes(self) -> int:
        """The most state that a part of the step uses."""
        return max((chunk.host_bytes for chunk in self.chunks), default=0)

    @property
    def device_bytes(self) -> int:
        """Memory of the device that a step needs for the state that passes through."""
        return arena_bytes([chunk.host_bytes for chunk in self.chunks], SLOT_FACTOR * self._chunk_bytes)

    def prepare(self, init_state: InitState | None = None) -> None:
        """Move all state to host memory, and create what is missing there; little of it is on the device at a time.

        Args:
            init_state: None to create nothing ahead of the first step.

        Raises:
            InputError: The optimizer has state that cannot be streamed.
            MemoryLimitError: The host has too little memory.
        """
        self._update_chunks()
        for chunk in self.chunks:
            self.weights.add_waiting(chunk)
            if init_state is not None and not all(self.optimizer.state.get(p) for p in chunk.parameters):
                with self.weights.wide(chunk.masters, self.transfers.device):
                    init_state(self.optimizer, chunk.parameters)
            self.weights.add_masters(chunk)
            if not chunk.holds(self.optimizer):
                self._move_to_host(chunk)
            self.weights.narrow(chunk)

    def _update_chunks(self) -> None:
        """Cut the parameters of the optimizer as they are now; chunks that stay the same keep their memory."""
        now = [(id(group), id(parameter)) for group in self.optimizer.param_groups for parameter in group["params"]]
        cut = [(id(chunk.group), id(parameter)) for chunk in self.chunks for parameter in chunk.parameters]
        if now == cut:
            return
        old = {tuple(map(id, chunk.parameters)): chunk for chunk in self.chunks}
        masters = self.masters()
        self.chunks = list(make_chunks(self.optimizer, self._chunk_bytes))
        for chunk in self.chunks:
            if (known := old.get(tuple(map(id, chunk.parameters)))) is not None:
                chunk.entries, chunk.host, chunk.views = known.entries, known.host, known.views
                chunk.sums = known.sums
            chunk.masters = {p: masters.pop(p) for p in chunk.parameters if p in masters}
        for parameter in list(masters):  # no longer in the optimizer
            self.weights.widen(parameter, masters)

    def masters(self) -> dict[Tensor, Tensor]:
        """Return the float32 values of narrow weights, in host memory."""
        return {parameter: master for chunk in self.chunks for parameter, master in chunk.masters.items()}

    def keep_wide(self, parameter: Tensor) -> None:
        """Put the float32 value of a weight back on the device, for good."""
        for chunk in self.chunks:
            if parameter in chunk.masters:
                self.weights.keep_wide(parameter, chunk.masters)

    def _move_to_host(self, chunk: StateChunk) -> None:
        """Copy the state of a chunk, wherever it is, to a new buffer, and refer to it there."""
        state = streamed_state(self.optimizer, chunk)
        entries, num_bytes = lay_out(state)
        host = self.transfers.host_memory(num_bytes)
        views = tuple(entry.host_view(host) for entry in entries)
        with torch.no_grad():
            for view, (parameter, _, value) in zip(views, state, strict=True):
                if value.device == self.transfers.device and value is not whole_value(parameter):
                    self.transfers.to_host(view, value.detach())
                else:  # loaded from a checkpoint, or the value of a weight that was never on the device
                    view.copy_(value.detach())
        self.transfers.finish()
        chunk.entries, chunk.host, chunk.views = entries, host, views
        chunk.show(self.optimizer, chunk.views)

    def step(self) -> None:
        """Step once.

        Raises:
            RuntimeError: A pre-hook changes the arguments of the step, or would not see all gradients; or any error of
                a transfer or of the optimizer. Nothing has changed unless `has_begun`.
        """
        optimizer, self.has_begun = self.optimizer, False
        hooks = [*_global_optimizer_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()]
        has_foreign = not all(hook.__module__.startswith("bigbatch.accumulation.") for hook in hooks)
        if has_foreign and (self.sums is not None or self.masters()):
            unseen = "in host memory" if self.sums is not None else "of weights that are bfloat16 on the device"
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() has a pre-hook, which would not see the gradients {unseen}: remove "
                'the hook, or pass offload="optimizer".'
            )
        for hook in hooks:
            if hook(optimizer, (optimizer,), {}) is not None:
                raise RuntimeError(
                    f"a pre-hook of {type(optimizer).__name__}.step() returns other arguments, and offload= calls "
                    "step() without any: remove the hook."
                )
        self.prepare()
        chunks = [chunk for chunk in self.chunks if any(map(self.weights.has_gradient, chunk.parameters))]
        arena = Arena(self.transfers, [chunk.host_bytes for chunk in chunks], SLOT_FACTOR * self._chunk_bytes)
        try:
            with without_hooks(optimizer):
                self._stream(chunks, arena)
        finally:
            self.transfers.finish()
        if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # as the scheduler's wrapper of step() does
        for hook in [*optimizer._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()]:
            hook(optimizer, (optimizer,), {})

    def _stream(self, chunks: Sequence[StateChunk], arena: Arena) -> None:
        settings = StepSettings(self.optimizer)
        loaded = self._load(chunks[0], arena) if chunks else None
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            early = following is not None and all(arena.is_small(each.host_bytes) for each in (chunk, following))
            next_loaded = self._load(following, arena) if early and following is not None else None
            assert loaded is not None, "loaded in the turn before"
            place, arrived = loaded
            with settings.of(chunk.group):
                self._compute(chunk, place.memory, arrived)
            arena.release(place, self._store(chunk, place.memory))
            if following is not None and next_loaded is None:
                next_loaded = self._load(following, arena)
            loaded = next_loaded
        settings.finish()

    def _load(self, chunk: StateChunk, arena: Arena) -> tuple[Place, Any]:
        """Start to copy a chunk to the device; return its memory there, and what to wait for."""
        place, loaded = arena.place(chunk.host_bytes), None
        state, sums = place.memory[: chunk.num_bytes], place.memory[chunk.num_bytes :]
        if chunk.host is not None and chunk.num_bytes:
            loaded = self.transfers.to_device(state, chunk.host, after=place.after)
        if chunk.sums is not None and len(sums):
            loaded = self.transfers.to_device(sums, chunk.sums.host, after=place.after)
        return place, loaded

    def _compute(self, chunk: StateChunk, memory: Tensor, loaded: Any) -> None:
        """Run the optimizer's step over the parameters of a chunk, with its state on the device."""
        optimizer = self.optimizer
        if loaded is not None:
            self.transfers.use(loaded)
        on_device = [entry.view(memory) for entry in chunk.entries]
        self.has_begun = True
        try:
            sums = None if self.sums is None else self.sums.in_grad(chunk, memory[chunk.num_bytes :], chunk.masters)
            chunk.show(optimizer, on_device)
            with (
                sums or nullcontext() as gradients,
                self.weights.stepping(chunk.masters, gradients),
                only_parameters(optimizer, chunk.group, chunk.parameters),
            ):
                plain_step(optimizer)
            self._write_replaced(chunk, on_device)
        except BaseException:
            chunk.show(optimizer, chunk.views)
            raise

    def _write_replaced(self, chunk: StateChunk, on_device: Sequence[Tensor]) -> None:
        """Copy tensors that the step has put in place of those that it was given into these."""
        for entry, view in zip(chunk.entries, on_device, strict=True):
            value = self.optimizer.state.get(entry.parameter, {}).get(entry.name)  # None for a master weight
            if isinstance(value, Tensor) and value is not view and entry.has_layout_of(value):
                with torch.no_grad():
                    view.copy_(value.detach())
                self.optimizer.state[entry.parameter][entry.name] = view

    def _store(self, chunk: StateChunk, memory: Tensor) -> Any:
        """Start to copy the state of a chunk back to the host; state of another layout gets another buffer.

        Returns:
            What later copies to the memory wait for.
        """
        on_device = {(id(entry.parameter), entry.name) for entry in chunk.entries}
        found = {(id(parameter), name): value for parameter, name, value in streamed_state(self.optimizer, chunk)}
        start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        if found.keys() == on_device and all(start <= value.data_ptr() < end for value in found.values()):
            left = None if chunk.sums is None else self.transfers.computed()
            chunk.show(self.optimizer, chunk.views)
            if chunk.host is not None and chunk.num_bytes:
                left = self.transfers.to_host(chunk.host, memory[: chunk.num_bytes])
        else:  # new state, as in the first step
            left = None if chunk.sums is None else self.transfers.computed()
            self._move_to_host(chunk)
        return left
