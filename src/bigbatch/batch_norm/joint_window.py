"""Run the micro-batches of a window in turns, so that all of them reach a batch norm before any of them continues.

start each in a thread of its own → suspended at its first norm → statistics of all → continue each to the next norm
→ … → backwards, suspended at each norm → sums of all → … → the end
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from bigbatch.batch_norm.host_tensors import HostTensors
from bigbatch.batch_norm.made_tensors import MadeTensors
from bigbatch.batch_norm.moments import Moments
from bigbatch.batch_norm.norm_buffers import NormBuffers
from bigbatch.batch_norm.random_streams import RandomStreams
from bigbatch.batch_norm.rank_meetings import RankMeeting, RankMeetings, RanksOutOfMemoryError, key_of
from bigbatch.batch_norm.suspension import Workers
from bigbatch.batch_norm.thread_state import ThreadState
from bigbatch.batch_norm.turns import Turn, check_same, combined
from bigbatch.errors import InputError, RankFailedError, first_line
from bigbatch.memory.usage import is_out_of_memory
from bigbatch.signal_deferral import DeferredSignals


class OutOfMemory(NamedTuple):
    """Why a window is to start again, on this rank or on another one."""

    message: str
    is_here: bool


class JointWindow:
    """Runs functions, each forward and backward of one micro-batch, with batch norm over all of them.

        window = JointWindow([model], device)
        with window.open():                          # puts back running statistics if an error leaves it
            failure = window.run(functions)          # None, or an OutOfMemory: buffers are as before then

    Args:
        modules: The model, and others that run: their batch norms.
        device: Of the model.
        ranks: Other ranks whose samples belong to the batch; None for none.
        keeps_on_host: Whether saved tensors are kept on the host; by default on CUDA.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        ranks: RankMeetings | None = None,
        *,
        keeps_on_host: bool | None = None,
    ) -> None:
        self._modules = modules
        self._device = device
        self._keeps_on_host = device.type == "cuda" if keeps_on_host is None else keeps_on_host
        self._ranks = ranks
        self._workers = Workers()
        self._buffers = NormBuffers(())
        self._streams: RandomStreams | None = None
        self._turns: list[Turn] = []
        self._hooks = ExitStack()
        self._current: Turn | None = None
        self._others_wait = False

    def stop(self) -> None:
        """End the threads, which on CUDA are kept for the next window."""
        self._workers.stop()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open a window; if an error leaves it, buffers are put back, and the other ranks fail, too."""
        self._buffers = NormBuffers([buffer for module in self._modules for buffer in module.buffers()])
        self._others_wait = self._ranks is not None
        parameters = [(each._parameters, dict(each._parameters)) for m in self._modules for each in m.modules()]
        try:
            yield
        except BaseException as error:
            self._end(succeeded=False)  # the second time, unless it was interrupted the first time
            self._buffers.rollback()
            for owned, before in parameters:  # torch.func.functional_call puts back those of another micro-batch
                owned.update(before)
            if self._others_wait and self._ranks is not None and not isinstance(error, RankFailedError):
                self._ranks.announce_failure()
            raise
        finally:
            self._buffers = NormBuffers(())
            if self._device.type != "cuda":
                self._workers.stop()

    def note_inputs(self, microbatch: Any) -> None:
        """Note the micro-batch of the function that calls this: others may not use its tensors."""
        if self._current is not None:
            self._current.calls.tensors.add_inputs(microbatch)

    def run(self, functions: Iterable[Callable[[], object]]) -> OutOfMemory | None:
        """Run all functions to their end; return None, or that memory ran out on this rank or another.

        Args:
            functions: The next one is drawn when the last one is suspended or done.

        Raises:
            InputError: The functions, or the ranks, do not run the same batch norms in the same order.
            RankFailedError: Another rank failed.
        """
        self._streams = RandomStreams([self._device] if self._device.type == "cuda" else [])
        failure, succeeded = None, False
        try:
            self._follow_norms()
            self._run(functions, self._streams)
            succeeded = True
        except RanksOutOfMemoryError as error:
            failure = OutOfMemory(str(error), is_here=False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = OutOfMemory(first_line(error), is_here=True)
            if self._ranks is not None:
                self._ranks.announce_out_of_memory()
        finally:
            self._end(succeeded=succeeded)
        self._others_wait = self._others_wait and failure is not None
        return failure

    def _end(self, *, succeeded: bool) -> None:
        """End what runs; if the functions did not all end, buffers and random states are put back."""
        with DeferredSignals() as deferred, deferred:
            self._current = None
            while self._turns:
                self._turns[-1].task.close()
                self._turns.pop()
            self._hooks.close()
            if not succeeded:
                self._buffers.rollback()
                if self._streams is not None:
                    self._streams.rollback()
            self._streams = None

    def _run(self, functions: Iterable[Callable[[], object]], streams: RandomStreams) -> None:
        state = ThreadState.now(self._device)
        made = MadeTensors()
        resident = [tensor for m in self._modules for tensor in (*m.parameters(), *m.buffers())]
        for function in functions:
            is_moved = self._keeps_on_host and not state.has_saved_tensor_hooks
            host = HostTensors(self._device, resident) if is_moved else None
            random = partial(streams.active, streams.add())
            number = len(self._turns)
            self._turns.append(Turn(function, self._workers[number], state, host, random, made.by(number)))
            self._advance(number)
        while (moments := self._meet()) is not None:
            for index in range(len(self._turns)):
                self._advance(index, moments)

    def _advance(self, index: int, reply: Moments | None = None) -> None:
        turn = self._turns[index]
        self._current = turn
        turn.advance(reply)
        self._current = None
        if self._device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # one for each thread, of up to 32 MiB
        if index:
            check_same(self._turns[0].meeting, turn.meeting, index)
        if turn.meeting is not None:
            self._buffers.arrive(turn.meeting, is_first=not index)

    def _meet(self) -> Moments | None:
        """Return the moments, or sums, that all micro-batches wait for; None if they are at the end."""
        own = combined([turn.meeting for turn in self._turns if turn.meeting is not None])
        joint = None if own is None else own.own
        if self._ranks is not None:
            of_ranks = self._ranks.meet(own, has_samples=bool(self._turns))
            if own is None and of_ranks is not None:
                self._update_without_samples(of_ranks)
                return of_ranks.joint
            joint = None if of_ranks is None else of_ranks.joint
        if own is None or joint is None:
            return None
        if not own.is_backward:
            if joint.count < 2:
                raise InputError(
                    f"{own} receives a single value of each channel in the whole batch, which has no variance: pass "
                    "more samples."
                )
            self._buffers.update(own, joint)
        return joint

    def _update_without_samples(self, meeting: RankMeeting) -> None:
        """Update the running statistics of a rank without samples: those of the first rank are sent to the others."""
        if meeting.is_backward or not meeting.is_tracked:
            return
        norm = {key_of(_named(name)): norm for name, norm in self._norms().items()}.get(meeting.key)
        if norm is None:
            raise InputError(
                "this rank has no samples, and another one updates running statistics in an F.batch_norm outside of "
                'the modules of the model, which batch_norm="exact" does not find here: use torch.nn.BatchNorm.'
            )
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        meeting.joint.update(norm.running_mean, norm.running_var, meeting.momentum)

    def _norms(self) -> dict[str, _BatchNorm]:
        """Return all batch norms by name; a name that a second module has, too, with the number of the module."""
        found: dict[str, _BatchNorm] = {}
        for number, module in enumerate(self._modules):
            for name, norm in module.named_modules():
                if isinstance(norm, _BatchNorm) and norm not in found.values():
                    found[f"{name} of module {number + 1}" if name in found else name] = norm
        return found

    def _follow_norms(self) -> None:
        """Note which batch norm runs; `SyncBatchNorm` runs as `BatchNorm`, whose statistics are of all ranks anyway."""
        norms = self._norms()
        for name, norm in norms.items():
            self._hooks.callback(norm.register_forward_pre_hook(partial(self._enter, _named(name))).remove)
            self._hooks.callback(norm.register_forward_hook(self._leave).remove)
            if isinstance(norm, SyncBatchNorm) and "forward" not in vars(norm):
                self._hooks.callback(vars(norm).pop, "forward", None)
                vars(norm)["forward"] = partial(_BatchNorm.forward, norm)
        known = set(norms.values())
        self._hooks.callback(register_module_forward_pre_hook(partial(self._enter_other, known)).remove)
        self._hooks.callback(register_module_forward_hook(partial(self._leave_other, known)).remove)

    def _enter(self, name: str, norm: nn.Module, _inputs: Any) -> None:
        if (turn := self._running_turn()) is not None:
            turn.calls.enter_module(name, norm)

    def _leave(self, *_: Any) -> None:
        if (turn := self._running_turn()) is not None:
            turn.calls.leave_module()

    def _enter_other(self, known: set[_BatchNorm], module: nn.Module, inputs: Any) -> None:
        """Note a batch norm that is not in the modules, such as one that ``loss_fn`` finds in another file."""
        if isinstance(module, _BatchNorm) and module not in known and self._running_turn() is not None:
            self._buffers.add(module.buffers())
            self._enter(f"a batch norm of {module.num_features} channels outside of the model", module, inputs)

    def _leave_other(self, known: set[_BatchNorm], module: nn.Module, *_: Any) -> None:
        if isinstance(module, _BatchNorm) and module not in known:
            self._leave()

    def _running_turn(self) -> Turn | None:
        """Return the micro-batch that calls this; None in other threads, which may run other windows."""
        turn = self._current
        return turn if turn is not None and turn.task.is_in_its_thread else None


def _named(name: str) -> str:
    return f"the batch norm {name!r}" if name else "the batch norm"
