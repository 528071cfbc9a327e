"""Functions that run piece by piece in threads of their own."""

import gc
import threading
from typing import Any
from weakref import ref

import pytest
import torch

from bigbatch.batch_norm.suspension import Task, TaskEnded, Worker, Workers
from bigbatch.batch_norm.thread_state import ThreadState


def joined(workers: Workers) -> None:
    workers.stop()
    assert threading.active_count() == 1


def test_tasks_run_one_at_a_time() -> None:
    order, workers = list[str](), Workers()

    def make(name: str) -> Task:
        def function(suspend: Any) -> None:
            for step in range(3):
                order.append(f"{name}{step}")
                assert suspend((name, step)) == step * 10
            order.append(f"{name} ends")

        return Task(function)

    tasks = [make(name) for name in "ab"]
    for step in range(3):
        for index, (name, task) in enumerate(zip("ab", tasks, strict=True)):
            assert task.advance(workers[index], (step - 1) * 10 if step else None) == (name, step)
    assert [task.advance(workers[index], 20) for index, task in enumerate(tasks)] == [None, None]
    assert all(task.is_done for task in tasks)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2", "a ends", "b ends"]
    joined(workers)


def test_error_is_raised_by_advance() -> None:
    def function(suspend: Any) -> None:
        suspend("first")
        raise ArithmeticError("broken")

    workers = Workers()
    task = Task(function)
    assert task.advance(workers[0]) == "first"
    with pytest.raises(ArithmeticError, match="broken"):
        task.advance(workers[0])
    assert task.is_done
    joined(workers)


def test_closed_task_unwinds_and_cannot_suspend() -> None:
    unwound, workers = list[str](), Workers()

    def function(suspend: Any) -> None:
        try:
            suspend("first")
        finally:
            unwound.append("once")
            try:
                suspend("second")
            except TaskEnded:
                unwound.append("twice")

    task = Task(function)
    task.advance(workers[0])
    task.close()
    task.close()
    assert unwound == ["once", "twice"]
    joined(workers)


def test_task_that_never_ran_can_be_closed() -> None:
    task = Task(lambda suspend: None)
    task.close()
    assert not task.is_done


def test_worker_runs_one_task_after_another() -> None:
    worker, names = Worker(), list[int]()
    for number in range(3):
        task = Task(lambda suspend, number=number: names.append(threading.get_ident()) or suspend(number))
        assert task.advance(worker) == number
        task.close()
    assert len(set(names)) == 1
    worker.stop()


def test_worker_ends_with_its_last_reference() -> None:
    worker = Worker()
    task = Task(lambda suspend: suspend(1))
    task.advance(worker)
    thread, held = worker._thread, ref(task)
    task.close()
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    del task
    gc.collect()
    assert held() is None


def test_state_of_thread_is_carried() -> None:
    found: dict[str, Any] = {}

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found["mode"] = threading.get_ident()
            return function(*args, **(kwargs or {}))

    def function(_suspend: Any) -> None:
        with state.entered():
            torch.zeros(1)
            found["grad"] = torch.is_grad_enabled()
            found["autocast"] = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            found["device"] = torch.zeros(1).device
            found["multithreading"] = torch._C._is_multithreading_enabled()
            torch.ones(1, requires_grad=True, device="cpu")
        found["after"] = torch.zeros(1).device, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()

    workers = Workers()
    with torch.no_grad(), torch.autocast("cpu", torch.float16), torch.device("meta"), Mode():
        state = ThreadState.now(torch.device("cpu"))
        Task(function).advance(workers[0])
    assert found.pop("mode") != threading.get_ident()
    assert found == {
        "grad": False,
        "autocast": (True, torch.float16),
        "device": torch.device("meta"),
        "multithreading": False,
        "after": (torch.device("cpu"), False, True),
    }
    joined(workers)


def test_hooks_on_saved_tensors_are_carried() -> None:
    packed = list[int]()

    def function(_suspend: Any) -> None:
        with state.entered():
            torch.ones(1, requires_grad=True).exp()

    workers = Workers()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(threading.get_ident()) or t, lambda t: t):
        state = ThreadState.now(torch.device("cpu"))
        assert state.has_saved_tensor_hooks
        Task(function).advance(workers[0])
    assert len(packed) == 1
    assert packed[0] != threading.get_ident()
    joined(workers)
