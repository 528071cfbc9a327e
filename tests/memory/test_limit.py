"""Limits of memory: every spelling means the bytes it says, nonsense is one sentence, and nothing is rounded up."""

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.memory.limit import (
    CONTEXT_BYTES,
    GIB,
    GPU_GIB,
    KIB,
    MARGIN_BYTES,
    MIB,
    MemoryLimit,
    default_limit,
    describe_bytes,
    gpu_limit,
    gpu_memory,
    known_gpu,
    parse_memory,
)

UNITS = {"B": 1, "KiB": KIB, "KB": 10**3, "MiB": MIB, "M": MIB, "MB": 10**6, "Gi": GIB, "G": GIB, "GB": 10**9}
UNITS |= {"TiB": 2**40, "TB": 10**12}

numbers = st.decimals(min_value="0.01", max_value="8000", places=2).map(str)
spellings = st.builds(
    lambda number, gap, unit, fold: f"{number}{gap}{fold(unit)}",
    numbers,
    st.sampled_from(["", " "]),
    st.sampled_from([unit for unit in UNITS if unit != "B"]),
    st.sampled_from([str, str.lower, str.upper]),
)
shares = st.decimals(min_value="0.01", max_value="100", places=2).map(lambda number: f"{number}%")


def complaint(ask: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        ask(*arguments)
    return str(caught.value)


# amounts and shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("24GiB", 24 * GIB),
        (" 24 GiB ", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("24G", 24 * GIB),
        ("24g", 24 * GIB),
        ("24Gi", 24 * GIB),
        ("512MiB", 512 * MIB),
        ("1.5TiB", 3 * 2**39),
        (".5k", 512),
        ("2.MiB", 2 * MIB),
        ("25769803776B", 24 * GIB),
        (24 * GIB, 24 * GIB),
        (KIB, KIB),
    ],
)
def test_amount_is_parsed_to_bytes(asked: str | int, expected: int):
    limit = parse_memory(asked)
    assert (limit.amount_bytes, limit.share) == (expected, None)
    assert limit.to_bytes() == limit.to_bytes(expected) == expected


@given(numbers, st.sampled_from(list(UNITS)))
def test_unit_fractions_are_exact_to_the_byte(number: str, unit: str):
    exact = Fraction(number) * UNITS[unit]
    if exact >= 1:
        assert parse_memory(f"{number}{unit}").to_bytes() == exact // 1


@given(st.one_of(spellings, shares, st.integers(KIB, 2**63 - 1)))
def test_written_limit_parses_back_equal(asked: str | int):
    limit = parse_memory(asked)
    assert parse_memory(str(limit)) == limit
    assert str(limit) == (asked if isinstance(asked, str) else f"{asked}B")


@given(st.one_of(spellings, shares))
def test_letter_case_and_blanks_do_not_matter(asked: str):
    assert parse_memory(f" {asked.swapcase()} ") == parse_memory(asked)


@given(shares, st.integers(0, 2**50))
def test_share_is_rounded_down_and_at_most_all(asked: str, total_bytes: int):
    share = Fraction(asked.rstrip("%")) / 100
    used = parse_memory(asked).to_bytes(total_bytes)
    assert used <= share * total_bytes < used + 1
    assert used <= total_bytes


def test_equivalent_limits_compare_equal():
    assert parse_memory("24GiB") == parse_memory("24 g") == parse_memory(24 * GIB)
    assert len({parse_memory("80%"), parse_memory("80.0 %")}) == 1
    assert parse_memory("80%") != parse_memory("81%")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("24", "memory is '24': it needs a unit, such as 24GiB."),
        ("1.5", "memory is '1.5': it needs a unit, such as 1.5GiB."),
        ("25769803776", "memory is '25769803776': it needs a unit, such as 25769803776B."),
        (24, "memory is 24: a number without a unit is in bytes; pass text with a unit, such as '24GiB'."),
        ("0GiB", "memory is '0GiB': it must be more than 0, such as 24GiB or 80%."),
        ("0", "memory is '0': it must be more than 0, such as 24GiB or 80%."),
        (0, "memory is 0: it must be more than 0, such as 24GiB or 80%."),
        (-1, "memory is -1: it must be more than 0, such as 24GiB or 80%."),
        ("-24GiB", "memory is '-24GiB': it must be more than 0, such as 24GiB or 80%."),
        ("-24", "memory is '-24': it must be more than 0, such as 24GiB or 80%."),
        ("0%", "memory is '0%': it must be more than 0, such as 24GiB or 80%."),
        ("-5%", "memory is '-5%': it must be more than 0, such as 24GiB or 80%."),
        ("0.1B", "memory is '0.1B': it must be at least one byte, such as 24GiB."),
        ("101%", "memory is '101%': a share must be at most 100%, such as 80%."),
        ("100.01 %", "memory is '100.01 %': a share must be at most 100%, such as 80%."),
        ("24XB", "memory is '24XB': its unit must be KiB, MiB, GiB, TiB or %, such as 24GiB."),
        ("24 gigabytes", "memory is '24 gigabytes': its unit must be KiB, MiB, GiB, TiB or %, such as 24GiB."),
        ("8388608TiB", "memory is '8388608TiB': it must be less than 8 EiB, such as 24GiB."),
        (2**63, f"memory is {2**63}: it must be less than 8 EiB, such as 24GiB."),
        *(
            (word, f"memory is {word!r}: it must be an amount such as 24GiB or a share such as 80%.")
            for word in ("", "nan", "nanGiB", "inf%", "1e3GiB", "1,5GiB", "24GiB!", "24 GiB 3", "+3GiB", "much", "٣GiB")
        ),
        ("9" * 30 + "B", f"memory is '{'9' * 30}B': it must be an amount such as 24GiB or a share such as 80%."),
        (True, "memory is True: it must be an amount such as 24GiB or a share such as 80%."),
        (2.5, "memory is 2.5: it must be an amount such as 24GiB or a share such as 80%."),
        (None, "memory is None: it must be an amount such as 24GiB or a share such as 80%."),
    ],
)
def test_invalid_limit_is_reported_with_value_and_example(asked: object, expected: str):
    assert complaint(parse_memory, asked) == expected


@given(st.one_of(st.text(), st.from_regex(r"-?[0-9.]{1,6} ?[A-Za-z%]{0,3}", fullmatch=True)))
def test_any_text_is_limit_or_one_sentence(asked: str):
    said = None
    try:
        limit = parse_memory(asked)
    except ValueError as error:
        said = str(error)
    if said is None:
        assert (limit.amount_bytes is None) != (limit.share is None)
    else:
        assert said.startswith(f"memory is {asked!r}: ")
        assert said.endswith(".")


# on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total_bytes", "most"),
    [(192 * GIB - 1, "191.99GiB"), (23 * GIB, "23.00GiB"), (700 * MIB + 1, "700.00MiB"), (1536, "1.50KiB"), (7, "7B")],
)
def test_limit_above_device_is_rejected_with_maximum(total_bytes: int, most: str):
    assert complaint(parse_memory("192GiB").to_bytes, total_bytes) == (
        f"memory 192GiB is more than the {most} that the device has: pass {most} or less, or a share such as 90%."
    )
    assert total_bytes * 99 // 100 <= parse_memory(most).to_bytes(total_bytes) <= total_bytes


def test_share_needs_device():
    assert complaint(parse_memory("80%").to_bytes) == (
        "memory 80% is a share of a device's memory, and no device is known: pass an amount such as 24GiB, or the "
        "name of a GPU, such as --gpu a100-40gb."
    )
    assert parse_memory("192GiB").to_bytes() == 192 * GIB


@given(st.integers(0, 2**50), st.integers(0, 2**50))
def test_default_keeps_margin_and_is_never_negative(one: int, other: int):
    free_bytes, total_bytes = sorted((one, other))
    limit = default_limit(free_bytes, total_bytes)
    assert 0 <= limit <= free_bytes
    assert limit == 0 or free_bytes - limit == max(total_bytes // 50, MARGIN_BYTES)


def test_margin_is_share_or_amount_by_device_size():
    assert default_limit(100 * GIB, 100 * GIB) == 98 * GIB
    assert default_limit(4 * GIB, 8 * GIB) == 4 * GIB - 256 * MIB
    assert default_limit(200 * MIB, 8 * GIB) == 0


# cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(GPU_GIB))
def test_gpu_has_slightly_less_than_nominal_memory(name: str):
    assert known_gpu(name) == name
    assert 0 < gpu_limit(name) < gpu_memory(name) - CONTEXT_BYTES
    said = name.rpartition("-")[2]
    if said.endswith("gb"):
        nominal = int(said.removesuffix("gb")) * GIB
        assert 0.9 * nominal < gpu_memory(name) < nominal


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("A100-40GB", "a100-40gb"),
        (" a100 40gb", "a100-40gb"),
        ("A100_80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("RTX4090", "rtx-4090"),
        ("h100nvl", "h100-nvl"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A6000", "a6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI250X", "mi250"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("h100-80gb", "h100"),
        ("h100 94gb", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("h200-141gb", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla V100S-PCIE-32GB", "v100-32gb"),
        ("Tesla V100-PCIE-16GB", "v100-16gb"),
        ("NVIDIA GeForce RTX 3060", "rtx-3060-12gb"),
        ("a100", "a100-40gb"),
        ("V100", "v100-16gb"),
        ("t4-16gb", "t4"),
    ],
)
def test_gpu_may_be_named_as_by_its_driver(asked: str, name: str):
    assert known_gpu(asked) == name
    assert gpu_memory(asked) == gpu_memory(name)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("a100-60gb", "gpu is 'a100-60gb': it is not a known GPU; nearest are a100-40gb and a100-80gb."),
        ("NVIDIA H100 SXM5 64GB", "gpu is 'NVIDIA H100 SXM5 64GB': it is not a known GPU; nearest are h100 and "
         "h100-nvl."),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "gpu is 'NVIDIA GeForce RTX 4090 Laptop GPU': it is not a known GPU; "
         "nearest are rtx-4090 and rtx-5090."),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "gpu is 'NVIDIA A100-SXM4-80GB MIG 1g.10gb': it is not a known GPU; "
         "nearest are a100-40gb and a100-80gb."),
        ("NVIDIA L40", "gpu is 'NVIDIA L40': it is not a known GPU; nearest are l4 and l40s."),
        ("NVIDIA GH200 480GB", "gpu is 'NVIDIA GH200 480GB': it is not a known GPU; nearest are h100 and h200."),
        ("rtx-4070", "gpu is 'rtx-4070': it is not a known GPU; nearest are rtx-4080 and rtx-4090."),
        ("h20", "gpu is 'h20': it is not a known GPU; nearest is h200."),
        ("mi300", "gpu is 'mi300': it is not a known GPU; nearest are mi250 and mi300x."),
        ("voodoo", "gpu is 'voodoo': it is not a known GPU; pass its memory instead, such as 24GiB."),
        ("", "gpu is '': it is not a known GPU; pass its memory instead, such as 24GiB."),
    ],
)  # fmt: skip
def test_unknown_gpu_is_reported_with_nearest(asked: str, expected: str):
    assert complaint(gpu_memory, asked) == complaint(gpu_limit, asked) == expected


# for people ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (512 * KIB, "512.0 KiB"),
        (MIB - 1, "1.0 MiB"),
        (972 * MIB, "972.0 MiB"),
        (1023 * MIB + 950 * KIB, "1023.9 MiB"),
        (GIB - MIB // 50, "1.0 GiB"),
        (int(23.44 * GIB), "23.4 GiB"),
        (2048 * GIB, "2048.0 GiB"),
    ],
)
def test_bytes_are_formatted_in_largest_full_unit(num_bytes: int, expected: str):
    assert describe_bytes(num_bytes) == expected


@given(st.integers(KIB, 2**55))
def test_formatted_bytes_are_within_five_percent(num_bytes: int):
    told = parse_memory(describe_bytes(num_bytes)).to_bytes()
    assert abs(told - num_bytes) <= num_bytes / 20 + 1


def test_limits_are_frozen_and_load_no_torch():
    with pytest.raises(AttributeError):
        MemoryLimit("1GiB", GIB, None).text = "2GiB"  # type: ignore[misc]
    code = "import sys, bigbatch.memory.limit; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
