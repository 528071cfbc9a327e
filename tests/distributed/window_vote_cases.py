"""Functions that ranks run in test_window_vote.py: one rank fails, all ranks raise, and the next window is exact."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from support import distributed_windows as cases
from support import full_batch_reference as ref


class OwnError(Exception):
    """The error of the failing rank."""


@dataclass
class WindowOutcome:
    """Outcome of a window on one rank.

    Attributes:
        kind: Class name of the error; empty without one.
        message: Message of the error.
        changed: Names of changed training state.
        next_error: Relative gradient error of the next window against one process.
    """

    kind: str
    message: str
    changed: list[str]
    next_error: float


class StateWatch:
    """Detects changes in the training state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        """Copy all state that an update can change or a window must restore."""
        found: dict[str, Any] = {name: cases.local(p).clone() for name, p in self.model.named_parameters()}
        for index, state in enumerate(self.optimizer.state.values()):
            found |= {f"state {index} {name}": cases.local(copy.deepcopy(value)) for name, value in state.items()}
        return found | cases.sync_flags(self.model)

    def changed(self) -> list[str]:
        """Return the names of changed state, and of parameters that hold a gradient."""
        now = self.look()
        names = [name for name, value in self.before.items() if not _same(value, now[name])]
        return names + [f"grad of {name}" for name, p in self.model.named_parameters() if p.grad is not None]


def _same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


class Adam(torch.optim.AdamW):
    """AdamW that keeps full copies of its gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.01)
        self.recorder = cases.GradientRecorder(model)

    def step(self, closure: Any = None) -> Any:
        self.recorder.step()
        return super().step(closure)


def engine_outcome(how: str, place: str) -> WindowOutcome:
    """Train one engine window, fail at ``place`` on rank 1 in the next, and train a third."""
    return _outcome(_Engine, how, place)


def loop_outcome(how: str, place: str) -> WindowOutcome:
    """Do the same in an accumulator loop."""
    return _outcome(_Loop, how, place)


def _outcome(kind_of_training: Any, how: str, place: str) -> WindowOutcome:
    model, sync = cases.parallelize(ref.make_model(), how)
    optimizer = Adam(model)
    train = kind_of_training(model, optimizer, sync, place)
    train.window(fails=False)
    watch = StateWatch(model, optimizer)
    kind = message = ""
    try:
        train.window(fails=dist.get_rank() == 1)
    except BaseException as error:  # noqa: BLE001 - checked by the test
        kind, message = type(error).__name__, str(error)
    changed = watch.changed()
    reference = ref.make_model()
    reference.load_state_dict({name: cases.full_tensor(p) for name, p in cases.inner(model).named_parameters()})
    train.window(fails=False)
    expected = ref.full_gradient(reference, ref.ragged_batch(12))
    return WindowOutcome(kind, message, changed, ref.relative_error(optimizer.recorder.seen[-1], expected))


def _own_rows() -> ref.Batch:
    size = dist.get_world_size()
    return cases.select_rows(ref.ragged_batch(12), range(dist.get_rank(), 12, size))


class _Engine:
    def __init__(self, model: nn.Module, optimizer: Adam, sync: Any, place: str) -> None:
        self.place, self.fails, self.calls = place, False, 0
        kind: dict[str, Any] = {"microbatch": 2}
        if place in ("collate", "batch"):
            kind["collate"] = self.collate
        if place == "lengths":
            kind |= {"microbatch": bigbatch.TokenBudget(12), "lengths": self.lengths}
        if place == "count_items":
            kind["count_items"] = self.count_items
        if place.startswith("nonfinite"):
            kind["nonfinite"] = place.rpartition(" ")[2]
        self.engine = bigbatch.Engine(model, optimizer, self.loss_fn, sync=sync, **kind)

    def loss_fn(self, model: nn.Module, batch: ref.Batch) -> Any:
        self.calls += 1
        loss, items = ref.loss_and_items(model, batch)
        if self.fails and self.calls == 2:
            if self.place == "forward":
                raise OwnError("the second micro-batch is bad")
            if self.place == "keyboard":
                raise KeyboardInterrupt
            if self.place.startswith("nonfinite"):
                loss = loss * float("nan")
            if self.place == "shape":
                return loss[None], items
            if self.place == "backward":
                loss.register_hook(_raise)
        return {"loss": (loss, items)} if self.place == "count_items" else (loss, items)

    def collate(self, samples: list[ref.Batch]) -> ref.Batch:
        if self.fails and self.place == "collate":
            raise OwnError("these do not go together")
        return cases.pad(samples)

    def lengths(self, batch: ref.Batch) -> list[int]:
        if self.fails:
            raise OwnError("no lengths")
        return [ref.LENGTH] * len(batch["tokens"])

    def count_items(self, batch: ref.Batch) -> dict[str, int]:
        if self.fails:
            raise OwnError("no counts")
        return {"loss": ref.count(batch)}

    def give_up(self) -> bool:
        if self.fails and self.place == "give_up raises":
            raise OwnError("asked too much")
        return self.fails and self.place == "give_up" and self.calls == 1

    def stopping(self) -> bool:
        if self.fails and self.place == "stopping raises":
            raise OwnError("do not stop me")
        return self.fails and self.place == "stopping"

    def window(self, *, fails: bool) -> None:
        self.fails, self.calls = fails, 0
        rows = _own_rows()
        batch: Any = rows
        if self.place in ("collate", "batch"):
            batch = [cases.select_rows(rows, [row]) for row in range(len(rows["tokens"]))]
        if fails and self.place == "batch":
            batch = 3
        report = self.engine.step(batch, should_abandon=self.give_up, should_stop=self.stopping)
        if report.skipped or (report.ranks and report.ranks.stopping):
            raise OwnError(f"skipped: {report.skipped}, stopping: {report.ranks and report.ranks.stopping}")


def _raise(gradient: Tensor) -> None:
    raise OwnError("half-way through backward")


class _Loop:
    def __init__(self, model: nn.Module, optimizer: Adam, sync: Any, place: str) -> None:
        self.model, self.place = model, place
        self.accumulator = bigbatch.Accumulator(model, optimizer, sync=sync)

    def loader(self, *, fails: bool) -> Iterator[ref.Batch]:
        for index, part in enumerate(ref.cut(_own_rows(), 2)):
            if fails and (self.place, index) in (("first draw", 0), ("later draw", 1)):
                raise OwnError(f"no micro-batch {index}")
            yield part

    def window(self, *, fails: bool) -> None:
        counts: Callable[[Any], Any] | None = None
        if self.place == "count_items":

            def counts(batch: ref.Batch) -> dict[str, int]:
                if fails:
                    raise OwnError("no counts")
                return {"loss": ref.count(batch)}

        windows = self.accumulator.windows(self.loader(fails=fails), num_microbatches=3, count_items=counts)
        for window in windows:
            for index, part in enumerate(window):
                if fails and index == 1:
                    if self.place == "body":
                        raise OwnError("in the body of the loop")
                    if self.place == "break":
                        break
                    if self.place == "keyboard":
                        raise KeyboardInterrupt
                    if self.place == "abort":
                        window.abort()
                        return
                loss, items = ref.loss_and_items(self.model, part)
                window.backward({"loss": (loss, items)})
            if fails and self.place == "late abort":
                window.abort()
                return
            if window.is_open and not (fails and self.place == "no step"):
                window.step()


def abort_in_loop(how: str) -> tuple[list[str], list[dict[str, Tensor]], int]:
    """Abort the second of three windows on rank 1 in one loop; return the state of each and the gradients."""
    model, sync = cases.parallelize(ref.make_model(), how)
    optimizer = cases.GradientRecorder(model)
    accumulator = bigbatch.Accumulator(model, optimizer, sync=sync)
    parts = ref.cut(ref.ragged_batch(12), 1)[dist.get_rank() :: 2]
    ended = []
    for index, window in enumerate(accumulator.windows(parts, num_microbatches=2)):
        for part in window:
            window.backward(ref.loss_and_items(model, part))
        if (index, dist.get_rank()) == (1, 1):
            window.abort()
        try:
            if window.is_open:
                window.step()
            ended.append(window.state.value)
        except bigbatch.RankFailedError:
            ended.append("rank failed")
    return ended, optimizer.seen, accumulator.num_steps


def abort_on_all_ranks(how: str) -> tuple[list[str], float]:
    """Abort a window on all ranks; return what it changed and the error of the next window."""
    model, sync = cases.parallelize(ref.make_model(), how)
    optimizer = Adam(model)
    accumulator = bigbatch.Accumulator(model, optimizer, sync=sync)
    accumulator.prepare()
    watch = StateWatch(model, optimizer)
    parts = ref.cut(_own_rows(), 2)
    windows = accumulator.windows(parts, num_microbatches=3)
    window = next(windows)
    for part in window:
        window.backward(ref.loss_and_items(model, part))
        window.abort()
    assert window.num_microbatches == 1
    changed = watch.changed()
    windows.close()
    for window in accumulator.windows(parts, num_microbatches=3):
        for part in window:
            window.backward(ref.loss_and_items(model, part))
        window.step()
    expected = ref.full_gradient(ref.make_model(), ref.ragged_batch(12))
    return changed, ref.relative_error(optimizer.recorder.seen[-1], expected)
