"""Bytes and seconds of the levels of offload, against numbers computed by hand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import GPU_GIB
from bigbatch.offload import arena
from bigbatch.offload.cards import TYPICAL, card, card_of_size
from bigbatch.offload.choice import Candidate, choose, describe_seconds
from bigbatch.offload.chunk_sizes import CHUNK_BYTES, NUM_SUM_SLOTS, SLOT_FACTOR, SUM_SLOT_BYTES
from bigbatch.offload.costs import (
    LinkBytes,
    ModelState,
    UpdateTime,
    WindowWork,
    inputs_bytes,
    placement,
    transfers,
    update_time,
)
from bigbatch.offload.levels import LEVELS, Offload

N, NORMS, LARGEST = 1_000_000_000, 1_000_000, 100_000_000


def adamw(*, num_trained: int = N, kept: int = NORMS, largest: int = LARGEST) -> ModelState:
    """AdamW over float32 weights, which micro-batches use in 16 bits except for those of norms."""
    return ModelState(
        weight_bytes=4 * num_trained,
        frozen_bytes=0,
        sum_bytes=4 * num_trained,
        state_bytes=8 * num_trained,
        narrowed=num_trained - kept,
        num_trained=num_trained,
        largest=largest,
        largest_state_bytes=8 * largest,
    )


def work(**changes: float) -> WindowWork:
    return replace(WindowWork(90_000, 9, 6e9, 1e6, 0.0, 0.0), **changes)


def test_bytes_of_adamw_are_those_by_hand() -> None:
    """16 bytes a weight on the card; 8 and 8; 6 and 12; 2 and 16; norms stay in float32 on the card alone."""
    held = {level: placement(adamw(), level) for level in LEVELS}
    on_card = {level: each.card_bytes for level, each in held.items()}
    assert on_card == {
        "none": 16 * N,
        "optimizer": 8 * N,
        "master": 6 * N + 2 * NORMS,
        "gradients": 2 * N + 2 * NORMS,
    }
    pages = {level: -(-each // 4096) * 4096 for level, each in (
        ("none", 0),
        ("optimizer", 8 * N),
        ("master", 12 * N - 4 * NORMS),
        ("gradients", 16 * N - 4 * NORMS),
    )}  # fmt: skip
    assert {level: each.host_bytes for level, each in held.items()} == pages


def test_update_needs_largest_parameter_twice() -> None:
    """Its state, and temporary tensors of the step as large as that; three chunks of 64 MiB if none is larger."""
    assert placement(adamw(), "none").step_bytes == 0
    assert placement(adamw(), "optimizer").step_bytes == 2 * 8 * LARGEST
    assert placement(adamw(), "master").step_bytes == 2 * 12 * LARGEST
    assert placement(adamw(largest=1000), "optimizer").step_bytes == 4 * CHUNK_BYTES


def test_windows_need_slots_and_gradients_that_wait() -> None:
    """Four slots of 32 MiB, and as much or the largest gradient: in 16 bits, or in float32 if it is not narrowed."""
    slots_bytes = NUM_SUM_SLOTS * SUM_SLOT_BYTES
    assert slots_bytes == 128 * 2**20
    assert [placement(adamw(), level).window_bytes for level in LEVELS] == [0, 0, 0, slots_bytes + 2 * LARGEST]
    assert placement(adamw(kept=N), "gradients").window_bytes == slots_bytes + 4 * LARGEST
    assert placement(adamw(largest=1000), "gradients").window_bytes == 2 * slots_bytes


def test_weights_are_narrow_at_start() -> None:
    """As micro-batches use them, with AdamW's state and float32 values of the largest parameter, or 64 MiB of state."""
    start = {level: placement(adamw(), level).start_bytes for level in LEVELS}
    assert start == {
        "none": 16 * N,
        "optimizer": 4 * N + 8 * LARGEST,
        "master": 2 * N + 2 * NORMS + 12 * LARGEST,
        "gradients": 2 * N + 2 * NORMS + 12 * LARGEST,
    }
    several = 3 * CHUNK_BYTES // 2  # with the float32 values of weights that have 64 MiB of state
    small = adamw(kept=0, largest=1000)
    assert placement(small, "gradients").start_bytes == 2 * N + several
    assert placement(adamw(kept=N), "master").start_bytes == 4 * N + 8 * LARGEST
    adapters = replace(adamw(), frozen_bytes=N, starts_wide=N - NORMS)  # narrowed on the card
    assert placement(adapters, "master").start_bytes == 5 * N + 12 * LARGEST


@given(st.integers(1, 10**10), st.floats(0, 1), st.floats(0, 1), st.sampled_from(LEVELS))
def test_start_needs_no_more_than_an_update(trained: int, kept: float, largest: float, level: Offload) -> None:
    state = adamw(num_trained=trained, kept=int(trained * kept), largest=max(1, int(trained * largest)))
    found = placement(state, level)
    assert found.start_bytes <= found.card_bytes + found.step_bytes


@pytest.mark.parametrize("largest", [1000, 12_000_000, LARGEST])
def test_buffers_are_those_of_the_arena(largest: int) -> None:
    sizes = [8 * largest, CHUNK_BYTES, CHUNK_BYTES // 2]
    found = placement(adamw(largest=largest), "optimizer").step_bytes
    assert found == arena.arena_bytes(sizes, SLOT_FACTOR * CHUNK_BYTES) + max(sizes)


def test_link_bytes_are_those_by_hand() -> None:
    """Both ways: 8 bytes a weight, 12 with master weights; sums arrive twice; in a micro-batch they move both ways."""
    wide = 12 * N - 4 * NORMS
    assert transfers(adamw(), "none") == LinkBytes(0, 0)
    assert transfers(adamw(), "optimizer") == LinkBytes(8 * N, 8 * N)
    assert transfers(adamw(), "master") == LinkBytes(wide, wide)
    assert transfers(adamw(), "gradients") == LinkBytes(wide + 8 * N, wide, 4 * N, 4 * N)


def test_seconds_are_those_by_hand() -> None:
    """An H200: 778 TFLOP/s, 4.3 TB/s, and 50.3 GB/s in each direction."""
    h200 = card("h200")
    assert h200.products_per_s == pytest.approx(778e12, rel=1e-3)
    assert h200.memory_rate == pytest.approx(4.3e12, rel=1e-3)
    found = update_time(adamw(), "none", work(), h200)
    assert found.compute_s == pytest.approx(90_000 * (6e9 / 778e12 + 1e6 / 4.3e12), rel=1e-3)
    assert found.microbatches_s == pytest.approx(9 * 26e9 / 4.3e12, rel=1e-3)
    assert found.update_s == pytest.approx(32e9 / 4.3e12, rel=1e-3)
    assert found.total_s == found.compute_s + found.microbatches_s + found.update_s
    offloaded = update_time(adamw(), "optimizer", work(), h200)
    assert offloaded.update_s == pytest.approx((8e9 + 2 * CHUNK_BYTES) / 50.3e9, rel=1e-6)
    assert replace(offloaded, update_s=found.update_s) == found


def test_recomputation_takes_a_third_of_the_layers() -> None:
    plain = update_time(adamw(), "none", work(head_operations=3e9), card("h100"))
    full = update_time(adamw(), "none", work(head_operations=3e9, recomputed=1.0), card("h100"))
    layers = update_time(adamw(), "none", work(), card("h100"))
    assert full.compute_s - plain.compute_s == pytest.approx(layers.compute_s / 3)


def test_backward_hides_gradient_sums_as_far_as_it_lasts() -> None:
    """4 GB in each direction in a micro-batch: 80 ms."""
    long, short = work(tokens=9_000_000), work(tokens=9_000)
    assert update_time(adamw(), "gradients", long, card("h200")).link_s == 0
    found = update_time(adamw(), "gradients", short, card("h200"))
    backward_s = found.compute_s * 2 / 3 / 9
    assert found.link_s == pytest.approx(9 * (4 / 50.3 - backward_s), rel=1e-6)
    assert found.microbatches_s == update_time(adamw(), "master", short, card("h200")).microbatches_s
    above_master_s = found.update_s - update_time(adamw(), "master", short, card("h200")).update_s
    assert above_master_s == pytest.approx(2 * 4 / 50.3, rel=1e-6)  # the sums arrive, for their norm and for the update


def test_layers_hide_copies_of_inputs_as_far_as_they_last() -> None:
    """Copies of 3 of 4 layers, 8,192 bytes a token each: 0.49 us in each direction on the link of an H200."""
    moved: dict[str, Any] = {"recomputed": 1.0, "moved_inputs": 3, "input_bytes": 8192}
    copies_s = 3 * 8192 / 50.3e9
    for layer_s in (1e-7, 1.5e-7, 1e-6):
        case = work(layer_operations=4 * 3 * layer_s * 778e12, layer_moves=0, **moved)
        found = update_time(adamw(), "none", case, card("h200"))
        forward_s, backward_s = 3 * layer_s, 9 * layer_s  # of three layers; backward recomputes
        expected = max(0.0, copies_s - forward_s) + max(0.0, copies_s - backward_s)
        assert found.inputs_s == pytest.approx(90_000 * expected, rel=2e-2)
        plain = update_time(adamw(), "none", replace(case, moved_inputs=0), card("h200"))
        assert found == replace(plain, inputs_s=found.inputs_s)
        assert found.total_s == plain.total_s + found.inputs_s


def test_inputs_of_layers_and_gradient_sums_share_the_link() -> None:
    """Of 3 layers, 8,192 bytes a token each, and 4 GB in a micro-batch, in backward."""
    moved: dict[str, Any] = {"recomputed": 1.0, "moved_inputs": 3, "input_bytes": 8192}
    for tokens in (9_000, 900_000):
        plain = update_time(adamw(), "gradients", work(tokens=tokens, recomputed=1.0), card("h200"))
        found = update_time(adamw(), "gradients", work(tokens=tokens, **moved), card("h200"))
        backward_s = plain.compute_s * 3 / 4 / 9
        copies_s = tokens / 9 * 3 * 8192 / 50.3e9
        assert copies_s < backward_s
        assert found.link_s == pytest.approx(9 * max(0.0, 4 / 50.3 + copies_s - backward_s), rel=1e-6)


def test_inputs_of_layers_are_whole_pages() -> None:
    assert inputs_bytes(work(moved_inputs=3, input_bytes=100), 1000) == 3 * 25 * 4096
    assert inputs_bytes(work(input_bytes=100), 1000) == 0


def test_sharded_model_waits_for_other_cards() -> None:
    found = update_time(adamw(), "none", work(tokens=9), card("h100"), fabric_bytes=45 * 10**9)
    assert found.fabric_s == pytest.approx(9 * 0.1 - found.compute_s)


@pytest.mark.parametrize(
    ("width", "layers", "weights", "tokens", "measured_s"),
    [
        (1536, 6, 280_786_944, 16_384, 0.04983),
        (2048, 6, 462_461_952, 16_384, 0.07626),
        (4096, 6, 1_214_373_888, 8_192, 0.09825),
        (4096, 6, 1_214_373_888, 16_384, 0.18886),
    ],
)
def test_seconds_of_layers_are_near_measurements(
    width: int, layers: int, weights: int, tokens: int, measured_s: float
) -> None:
    """Compiled Qwen2 layers on an H200, rows of 1,024 tokens, torch 2.11 and transformers 5.17: within 10 %."""
    state = adamw(num_trained=weights, kept=0)
    attention = 14 * layers * width * 512 / 0.4  # torch's kernel in padded rows reaches more than in packed ones
    found = update_time(
        state, "none", WindowWork(tokens, 1, 6 * weights + attention, 250 * layers * width, 0, 0), card("h200")
    )
    assert found.compute_s + found.microbatches_s == pytest.approx(measured_s, rel=0.1)


# properties --------------------------------------------------------------------------------------------------------

counts = st.integers(1, 10**11)
states = st.builds(
    lambda n, kept, largest, frozen, ratio: replace(
        adamw(num_trained=n, kept=min(kept, n), largest=min(largest, n)),
        frozen_bytes=frozen,
        state_bytes=ratio * n,
        largest_state_bytes=ratio * min(largest, n),
    ),
    counts,
    counts,
    counts,
    counts,
    st.integers(0, 8),
)


@given(states)
def test_higher_level_needs_less_of_card_and_more_of_host(state: ModelState) -> None:
    held = [placement(state, level) for level in LEVELS]
    for lower, higher in pairwise(held):
        assert higher.card_bytes <= lower.card_bytes
        assert higher.host_bytes >= lower.host_bytes


@given(states)
def test_no_state_is_lost_between_card_and_host(state: ModelState) -> None:
    """Everything is in one place; narrow weights on the card are copies of 2 bytes."""
    everything = placement(state, "none").card_bytes
    for level in LEVELS[1:]:
        held = placement(state, level)
        copies = 2 * state.narrowed if level in ("master", "gradients") else 0
        assert 0 <= held.card_bytes + held.host_bytes - copies - everything < 4096


@given(states, st.integers(1, 10**7), st.integers(1, 64), st.sampled_from(sorted(GPU_GIB)))
def test_seconds_grow_with_work_and_are_positive(state: ModelState, tokens: int, cuts: int, name: str) -> None:
    for level in LEVELS:
        less = update_time(state, level, work(tokens=tokens, num_microbatches=cuts), card(name))
        more = update_time(state, level, work(tokens=2 * tokens, num_microbatches=cuts), card(name))
        again = update_time(state, level, work(tokens=tokens, num_microbatches=cuts, recomputed=0.5), card(name))
        rounding = 1 - 1e-12
        assert 0 < rounding * less.total_s <= more.total_s
        assert rounding * less.total_s <= again.total_s
        assert less.update_s == more.update_s


@given(states, st.integers(2, 512))
def test_shards_hold_everything(state: ModelState, num_cards: int) -> None:
    whole, share = placement(state, "none").card_bytes, placement(state.sharded(num_cards), "none").card_bytes
    assert 0 <= num_cards * share - whole <= 5 * num_cards


# choice ------------------------------------------------------------------------------------------------------------


def candidate(level: str, mode: str, card_bytes: int, host_bytes: int, seconds: float) -> Candidate:
    return Candidate(level, mode, 1, card_bytes, host_bytes, UpdateTime(seconds, 0.0, 0.0))  # type: ignore[arg-type]


CANDIDATES = [
    candidate("none", "none", 16 * 2**30, 0, 1.0),
    candidate("none", "full", 10 * 2**30, 0, 1.4),
    candidate("optimizer", "none", 9 * 2**30, 8 * 2**30, 1.2),
    candidate("optimizer", "full", 5 * 2**30, 8 * 2**30, 1.6),
]


@pytest.mark.parametrize(
    ("gib", "host_gib", "expected"),
    [(24, None, 0), (12, None, 2), (12, 4, 1), (9, 8, 2), (6, 8, 3)],
)
def test_fastest_that_fits_is_chosen(gib: int, host_gib: int | None, expected: int) -> None:
    host_bytes = None if host_gib is None else host_gib * 2**30
    assert choose(CANDIDATES, card_bytes=gib * 2**30, host_bytes=host_bytes) is CANDIDATES[expected]


def test_equally_fast_level_is_lower_one() -> None:
    same = [replace(each, time=CANDIDATES[0].time) for each in CANDIDATES]
    assert choose(same, card_bytes=2**40, host_bytes=None) is same[0]


def test_card_too_small_is_refused_with_figures() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        choose(CANDIDATES, card_bytes=4 * 2**30, host_bytes=None)
    assert str(caught.value) == (
        "no level of offload fits: the least, offload optimizer with checkpointing full, needs 5.0 GiB on the card, "
        "and 4.0 GiB are usable."
    )


def test_host_too_small_is_refused_with_figures() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        choose(CANDIDATES, card_bytes=9 * 2**30, host_bytes=2**30)
    assert str(caught.value) == (
        "no level of offload fits: the least that fits on the card, offload optimizer, needs 8.0 GiB of host memory, "
        "and 1.0 GiB are available."
    )


# cards -------------------------------------------------------------------------------------------------------------


def test_every_gpu_has_rates() -> None:
    for name in GPU_GIB:
        found = card(name)
        assert found.name == name
        assert 0 < found.link_rate < found.memory_rate < found.products_per_s
        assert found.fabric_rate >= found.link_rate
        assert ("measured" in str(found)) == (name == "h200")
    assert str(card("t4")) == "t4: 51 TFLOP/s, 0.3 TB/s, link 12 GB/s in each direction (assumed for PCIe 3)"


def test_size_names_typical_card() -> None:
    names = [card_of_size(gib * 2**30).name for gib in (8, 12, 16, 20, 24, 40, 48, 80, 141)]
    small, middle, large = ["rtx-3060-12gb"] * 2, ["rtx-4080", "rtx-4090", "rtx-4090"], ["a100-40gb", "h100", "h100"]
    assert names == [*small, *middle, *large, "h100"]
    assert [round(GPU_GIB[name]) for name in TYPICAL.values()] == [12, 15, 24, 39, 79]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00004, "0.04 ms"),
        (0.0123, "12 ms"),
        (0.0949, "95 ms"),
        (0.0951, "0.1 s"),
        (3.44, "3.4 s"),
        (4e4, "40,000.0 s"),
    ],
)
def test_short_updates_are_described_in_milliseconds(seconds: float, text: str):
    assert describe_seconds(seconds) == text
