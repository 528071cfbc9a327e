"""A killed and resumed run is bit-identical to an uninterrupted one: see `support.kill_points`.

`python benchmarks/soak.py --kills 200` tries every point and 200 random moments.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.forked_processes import ForkedProcess, module
from support.tiers import slow


class Server:
    """The process whose children are killed."""

    def __init__(self, folder: Path) -> None:
        source, target = os.pipe()
        self._process = ForkedProcess(module, "support.kill_points", str(folder), stdin=source)
        os.close(source)
        self._questions = os.fdopen(target, "w", encoding="utf-8")

    def kill_and_resume(self, kind: str, *kills: dict[str, Any]) -> tuple[int, list[str]]:
        """How often a run died, and what differs from the one that never did."""
        self._questions.write(json.dumps({"kind": kind, "kills": kills}) + "\n")
        self._questions.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["died"], answer["differs"]

    def close(self) -> None:
        self._questions.close()
        with self._process:
            self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


def at(point: str, number: int = 1) -> dict[str, Any]:
    return {"point": point, "number": number}


# A pass has five windows, of three micro-batches each; checkpoints are made after the updates 3, 6, 9 and 10.
@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("before training", 1),
        slow("before micro-batch", 5),  # before the first checkpoint
        slow("after backward", 14),  # in the last window of a pass
        slow("before optimizer", 9),
        slow("after optimizer", 5),  # at the very end of a pass
        slow("after scheduler", 4),
        ("middle of metrics.jsonl", 7),
        slow("before validation", 2),
        slow("after sample", 1),
        slow("before fsync", 20),
        ("after rename", 2),
        slow("before unlink", 3),  # while an older checkpoint is removed
        slow("after optimizer", 10),  # the last update
        ("before model", 1),  # after the last checkpoint
    ],
)
def test_run_killed_anywhere_equals_uninterrupted_run(server: Server, point: str, number: int) -> None:
    assert server.kill_and_resume("plain", at(point, number)) == (1, [])


@pytest.mark.parametrize(
    ("kind", "point", "number"),
    [
        ("async", "after fsync", 12),
        ("lora", "before scheduler", 8),
        slow("lora", "before adapter", 1),  # after the last checkpoint
        slow("lora", "before fsync", 43),  # while the adapters are saved
        slow("qlora", "after scheduler", 8),
        slow("qlora", "before adapter", 1),
        slow("bf16-weights", "before optimizer", 8),
        slow("auto", "before optimizer", 8),
        slow("offload", "before training", 1),  # the state of the start is resumed
        ("offload", "before validation", 2),  # which is the first thing that the resumed run computes
        slow("offload", "after optimizer", 8),
        slow("tokens", "after optimizer", 7),
        slow("mixed", "middle of metrics.jsonl", 7),  # after the smaller source has begun again
        slow("mixed", "before optimizer", 8),
        slow("schedule", "before optimizer", 4),
        slow("schedule", "after optimizer", 6),
        slow("poisoned", "middle of quarantine.jsonl", 3),
        slow("best", "after validation", 4),  # the best, before its checkpoint
        slow("best", "after checkpoint", 5),  # before older ones are removed
        slow("best", "middle of metrics.jsonl", 8),  # after the best
        slow("best", "before model", 1),
        slow("early", "after validation", 5),  # the first without improvement
        slow("early", "after checkpoint", 5),  # the last
        slow("early", "before model", 1),
        slow("dpo", "before training", 1),  # before the reference is stored
        slow("dpo", "before optimizer", 5),
        ("dpo", "before optimizer", 8),
        slow("reward", "after optimizer", 7),
        slow("embedding", "before optimizer", 8),
    ],
)
def test_killed_run_of_any_kind_equals_uninterrupted(server: Server, kind: str, point: str, number: int) -> None:
    assert server.kill_and_resume(kind, at(point, number)) == (1, [])


@pytest.mark.slow
def test_ten_kills_in_one_epoch_leave_result_unchanged(server: Server) -> None:
    before_it_is_saved = [
        at("before training"),
        at("after micro-batch", 2),
        at("before optimizer"),
        at("middle of metrics.jsonl", 2),
        at("before checkpoint"),
        at("after checkpoint"),
    ]
    after_update_3 = [at("before truncate"), at("after backward"), at("after optimizer"), at("before metrics.jsonl", 2)]
    assert server.kill_and_resume("plain", *before_it_is_saved, *after_update_3) == (10, [])


def test_kill_at_any_moment_leaves_result_unchanged(server: Server) -> None:
    died, differs = server.kill_and_resume("async", *({"after_s": 0.02 + 0.01 * i} for i in range(5)))
    assert differs == []
    assert died >= 1


@pytest.mark.slow
def test_stops_and_kills_leave_choice_unchanged(server: Server) -> None:
    stops = ({"point": "after optimizer", "number": number, "how": "stop"} for number in (3, 1, 2))
    assert server.kill_and_resume("best", *stops, at("after validation", 2)) == (4, [])
    stop = {"point": "after optimizer", "number": 5, "how": "stop"}
    assert server.kill_and_resume("early", stop) == (1, [])
