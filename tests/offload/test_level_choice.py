"""The rules by which a level of offload is chosen, and what the choice and its refusal say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.errors import InputError, MemoryLimitError
from bigbatch.offload.level_choice import LevelCase, LevelLimits, OffloadChoice, choose_level, least_limits, over_ranks
from bigbatch.offload.levels import LEVELS, Offload, refuse_auto

GIB = 2**30


def case(level: Offload, gib: float, seconds: float | None = None, *, host: float = 0, least: float = 0) -> LevelCase:
    return LevelCase(level, int((least or gib) * GIB), int(gib * GIB), int(host * GIB), seconds)


def limits(gib: float, host: float = 64) -> LevelLimits:
    return LevelLimits(int(gib * GIB), int(host * GIB))


def cases(*seconds: float | None) -> list[LevelCase]:
    bytes_of = zip(LEVELS, (16, 8, 6, 3), (0, 8, 12, 16), strict=True)
    return [case(level, gib, s, host=host) for (level, gib, host), s in zip(bytes_of, seconds, strict=True)]


@pytest.mark.parametrize(
    ("gib", "host", "expected"),
    [
        (16, 64, "none"),
        (15, 64, "optimizer"),
        (7, 64, "master"),
        (5, 64, "gradients"),
        (16, 0, "none"),
        (15, 8, "optimizer"),
    ],
)
def test_without_times_lowest_level_that_fits_is_chosen(gib: float, host: float, expected: str) -> None:
    assert choose_level(cases(None, None, None, None), limits(gib, host)).level == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0, 0.9, 0.95, 1.0), "optimizer"),
        ((1.0, 1.1, 0.5, 0.6), "master"),
        ((1.0, 1.1, 1.2, 0.5), "gradients"),
        ((1.0, 0.99, 1.2, 1.2), "none"),  # within 2 %
        ((1.0, 0.97, 0.96, 0.96), "optimizer"),  # within 2 % of the fastest
    ],
)
def test_lowest_level_near_fastest_is_chosen(seconds: tuple[float, ...], expected: str) -> None:
    assert choose_level(cases(*seconds), limits(16)).level == expected


def test_fastest_level_that_does_not_fit_is_not_chosen() -> None:
    assert choose_level(cases(0.1, 1.1, 0.9, 2.0), limits(7)).level == "master"
    assert choose_level(cases(0.1, 1.1, 0.9, 0.2), limits(9, host=8)).level == "optimizer"


def test_refusal_has_least_need_of_each_level() -> None:
    found = [case("none", 20, least=16), case("optimizer", 9, host=8), case("gradients", 3, host=16)]
    with pytest.raises(MemoryLimitError) as caught:
        choose_level(found, limits(2), unsupported={"master": "no linear layer"})
    assert str(caught.value) == (
        'offload="auto": no level fits (not supported: master): none needs 16.0 GiB on the card; optimizer needs '
        "9.0 GiB on the card and 8.0 GiB on the host; gradients needs 3.0 GiB on the card and 16.0 GiB on the host, "
        "and 2.0 GiB on the card and 64.0 GiB on the host are usable. Shorten the samples, use activation "
        "checkpointing or fewer trained parameters, or raise the memory limit."
    )


def test_level_that_fits_on_card_alone_is_refused() -> None:
    with pytest.raises(MemoryLimitError, match=r"usable\. Shorten"):
        choose_level(cases(None, None, None, None), limits(15, host=4))


def test_choice_is_one_line_with_reasons() -> None:
    chosen = choose_level(cases(None, 1.25, 1.5, None), limits(9, host=13), unsupported={})
    assert str(chosen) == (
        "offload optimizer: 8.0 GiB of 9.0 GiB on the card, 8.0 GiB on the host, about 1.25 s an update; none needs "
        "16.0 GiB; master fits, about 1.5 s; gradients needs 16.0 GiB on the host"
    )
    lowest = choose_level([case("none", 4), case("optimizer", 3, host=1)], limits(9), unsupported={"master": "…"})
    assert str(lowest) == "offload none: 4.0 GiB of 9.0 GiB on the card; optimizer fits; not supported: master"
    assert str(OffloadChoice("none", "the model is on cpu")) == "offload none: the model is on cpu"


# ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_need_most_that_any_needs() -> None:
    found = over_ranks([cases(1.0, 2.0, None, None), [case("none", 17, 0.5), case("optimizer", 7, 3.0, host=9)]])
    assert found == [case("none", 17, 1.0), case("optimizer", 8, 3.0, host=9)]


def test_times_of_some_ranks_decide() -> None:
    """A rank whose samples are one micro-batch at every level measures nothing."""
    assert over_ranks([[case("none", 1)], [case("none", 1, 2.0)]]) == [case("none", 1, 2.0)]


def test_memory_is_the_least_of_any_rank() -> None:
    assert least_limits([limits(4, 2), limits(3, 5)]) == limits(3, 2)


seconds = st.floats(0.01, 100)
some_cases = st.lists(
    st.builds(LevelCase, st.just("none"), st.just(0), st.integers(0, 100), st.integers(0, 100), seconds),
    min_size=1,
    max_size=4,
).map(lambda found: [LevelCase(level, *list(vars(c).values())[1:]) for level, c in zip(LEVELS, found, strict=False)])


@given(some_cases, st.integers(0, 100), st.integers(0, 100))
def test_chosen_level_fits_and_is_near_fastest(found: list[LevelCase], card: int, host: int) -> None:
    memory = LevelLimits(card, host)
    fitting = [c for c in found if c.card_bytes <= card and c.host_bytes <= host]
    if not fitting:
        with pytest.raises(MemoryLimitError):
            choose_level(found, memory)
        return
    level = choose_level(found, memory).level
    chosen = next(c for c in fitting if c.level == level)
    fastest_s = min(c.window_s for c in fitting if c.window_s is not None)
    assert chosen.window_s is not None
    assert chosen.window_s <= 1.02 * fastest_s
    assert all(c.window_s is not None and c.window_s > 1.02 * fastest_s for c in fitting[: fitting.index(chosen)])


def test_auto_of_accumulator_is_refused() -> None:
    refuse_auto("optimizer")
    with pytest.raises(InputError) as caught:
        refuse_auto("auto")
    assert str(caught.value) == (
        'offload="auto" is chosen for a batch and its loss, and an Accumulator sees only losses that are already '
        "computed: use bigbatch.Engine, which chooses the level before its first window, or pass one of 'none', "
        "'optimizer', 'master', 'gradients'."
    )
