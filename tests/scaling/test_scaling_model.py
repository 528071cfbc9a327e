"""The model of benchmarks/scaling.py, whose equations docs/explanation/scaling.md has."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
lab = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "scaling.py")))
machines = pytest.mark.parametrize("machine", lab.NOMINAL, ids=lambda machine: machine.name)


@machines
@pytest.mark.parametrize("way", lab.WAYS)
def test_one_rank_takes_only_its_compute_time(machine, way):
    assert lab.WAYS[way](machine, 1, 8) == pytest.approx(8 * machine.microbatch_s + machine.update_s)


@machines
@pytest.mark.parametrize("ranks", lab.RANKS[1:])
def test_communication_is_small_from_documented_count_only(machine, ranks):
    count = lab.enough(machine, ranks)
    crossing_s = lab.crossing_s(machine, ranks)
    assert crossing_s < lab.SMALL * lab.bigbatch_s(machine, ranks, count)
    assert crossing_s >= lab.SMALL * lab.bigbatch_s(machine, ranks, count - 1)


@machines
@pytest.mark.parametrize("ranks", lab.RANKS[1:])
@pytest.mark.parametrize("count", lab.COUNTS)
def test_overlap_gains_at_most_backward_copies_and_vote(machine, ranks, count):
    won_s = lab.to_win(machine, ranks, count) * lab.bigbatch_s(machine, ranks, count)
    beside_s = lab.crossing_s(machine, ranks) - lab.Network.all_reduce(
        machine.network, ranks, machine.gradient_bytes, 76
    )
    assert 0 < won_s <= machine.backward_s + beside_s + 1e-12


def test_fit_recovers_latency_and_bandwidth():
    sizes = [1e3, 1e5, 1e6, 1e7]
    latency_s, slope = lab.fit(sizes, [2e-4 + size / 1e9 for size in sizes])
    assert (latency_s, 1 / slope) == pytest.approx((2e-4, 1e9))


def test_document_has_numbers_of_model():
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    for machine in lab.NOMINAL:
        for ranks in (8, 64):
            assert f"{ranks} | {1e3 * lab.crossing_s(machine, ranks):,.0f} | {lab.enough(machine, ranks)} |" in page
