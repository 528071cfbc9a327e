"""Fingerprints of updates: what they detect, where two files first differ, and damaged files."""

import json
from pathlib import Path

import pytest
import torch

from bigbatch.errors import InputError
from bigbatch.lm.runs.fingerprints import begin_fingerprints, first_difference, read_fingerprints
from bigbatch.lm.training.fingerprints import as_text, checksums

NAMES = ["first.weight", "second.weight"]


def write(run: Path, rows: list[tuple[int, list[int] | None, list[int]]]) -> Path:
    run.mkdir(exist_ok=True)
    begin_fingerprints(run, NAMES, {"num_threads": 1}, done=0)
    with (run / "fingerprints.jsonl").open("a") as file:
        for step, gradients, parameters in rows:
            text = None if gradients is None else as_text(gradients)
            file.write(json.dumps({"step": step, "gradients": text, "parameters": as_text(parameters)}) + "\n")
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_each_bit_and_each_swap(dtype: torch.dtype):
    tensor = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    (before,) = checksums([tensor])
    assert checksums([tensor.clone()]) == [before]
    integers = tensor.view(torch.int16) if dtype is torch.bfloat16 else tensor.view(torch.int32)
    for place in range(40):
        integers[place] ^= 1
        assert checksums([tensor]) != [before]
        integers[place] ^= 1
    assert checksums([tensor.flip(0)]) != [before]
    assert checksums([-torch.zeros(3)]) != checksums([torch.zeros(3)])


def test_checksum_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = checksums([tensor])
    monkeypatch.setattr("bigbatch.lm.training.fingerprints.CHUNK", 64)
    assert checksums([tensor]) == before


def test_first_difference_names_update_and_parameter(tmp_path: Path):
    one = read_fingerprints(write(tmp_path / "one", [(1, [1, 2], [3, 4]), (2, [5, 6], [7, 8]), (3, [1, 1], [1, 1])]))
    gradient = read_fingerprints(write(tmp_path / "a", [(1, [1, 2], [3, 4]), (2, [5, 9], [7, 9])]))
    parameter = read_fingerprints(write(tmp_path / "b", [(1, [1, 2], [9, 4]), (2, [5, 9], [7, 8])]))
    skipped = read_fingerprints(write(tmp_path / "c", [(1, None, [3, 4])]))
    assert first_difference(one, one) is None
    found = [first_difference(one, other) for other in (gradient, parameter, skipped)]
    assert [(each.step, each.is_gradient, each.names) for each in found if each is not None] == [
        (2, True, ("second.weight",)),
        (1, False, ("first.weight",)),
        (1, True, tuple(NAMES)),
    ]


def test_resumed_run_drops_later_lines(tmp_path: Path):
    run = write(tmp_path / "run", [(1, [1, 2], [3, 4]), (2, None, [7, 8]), (3, [1, 1], [1, 1])])
    with (run / "fingerprints.jsonl").open("a") as file:
        file.write('{"step": 4, "gradi')  # killed while it was written
    begin_fingerprints(run, NAMES, {"num_threads": 1}, done=2)
    assert sorted(read_fingerprints(run).parameters) == [1, 2]
    assert read_fingerprints(run).gradients[2] is None


@pytest.mark.parametrize("line", ["x", "[]", '{"step": 1}', '{"step": 1, "gradients": null, "parameters": "00"}'])
def test_damaged_file_is_refused(tmp_path: Path, line: str):
    run = write(tmp_path / "run", [])
    with (run / "fingerprints.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"fingerprints\.jsonl is damaged"):
        read_fingerprints(run)


def test_other_model_is_refused(tmp_path: Path):
    one = write(tmp_path / "one", [(1, [1, 2], [3, 4])])
    other = tmp_path / "other"
    other.mkdir()
    begin_fingerprints(other, ["third.weight"], {}, done=0)
    with pytest.raises(InputError) as refused:
        first_difference(read_fingerprints(one), read_fingerprints(other))
    assert str(refused.value) == (
        "the runs train different parameters, of which first.weight is the first: compare runs of one model."
    )
