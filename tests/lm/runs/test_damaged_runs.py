"""Damaged and foreign run directories: one sentence or the same parameters, and nothing outside is touched.

`python benchmarks/damaged_runs.py --count 500` tries more of the same; see `support.damaged_runs`.
"""

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bigbatch.lm.runs.identity import digest_of, read_identity
from support.damaged_runs import FORGED, KINDS, DamagedRuns, captured, sign, to_legacy
from support.language_models import metrics, save_model_folder
from support.tiers import slow_except

CASES_PER_KIND = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DamagedRuns:
    return DamagedRuns(tmp_path_factory.mktemp("damaged"))


@pytest.fixture
def run(made: DamagedRuns) -> Path:
    """The undamaged run, of which three of four updates are saved."""
    made.fresh()
    return made.run


def resumed(made: DamagedRuns, *more: str) -> str:
    """Resume the run to the parameters of the undamaged one; return what it prints."""
    code, out, error = captured(["resume", str(made.run), *more])
    assert (code, error) == (0, "")
    assert made.parameters() == made.reference
    return out


def refused(made: DamagedRuns, code: int = 2, command: str = "resume") -> str:
    """Run a command that is refused, and changes nothing in the run; return its sentence."""
    before = content_of(made.run)
    found, _, error = captured([command, str(made.run)])
    assert found == code, error
    assert content_of(made.run) == before
    assert error.count("\n") == 1
    return error.removeprefix(f"bigbatch {command}: ").rstrip("\n")


def content_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_bytes()) | values
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_signed(path: Path, **values: Any) -> None:
    """Change a file that holds a digest of itself."""
    edit(path, **values)
    content = json.loads(path.read_bytes())
    del content["digest"]
    edit(path, digest=digest_of(content))


@pytest.mark.parametrize("number", slow_except(range(CASES_PER_KIND), 0))
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_run_never_crashes_hangs_or_differs(made: DamagedRuns, kind: str, number: int) -> None:
    outcome = made.try_damage(kind, Random(f"test {kind} {number}"))
    assert outcome.problems == [], outcome.damage
    if kind not in FORGED:
        assert outcome.resumed in ("identical", "refused", "failed"), outcome.damage


def test_undamaged_run_resumes_bit_identically(made: DamagedRuns, run: Path) -> None:
    assert "skipping" not in resumed(made)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


# another model, other settings, another run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("lr", 0.02, "--lr 0.02, and the run was started with --lr 0.01"),
        ("seed", 7, "--seed 7, and the run was started with --seed 0"),
        ("precision", "bf16", "--precision bf16, and the run was started with --precision float32"),
        ("max_grad_norm", None, "--max-grad-norm None, and the run was started with --max-grad-norm 1.0"),
    ],
)
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_edited_learning_setting_is_refused(
    made: DamagedRuns, run: Path, name: str, value: Any, flag: str, has_checkpoint: bool
) -> None:
    edit(run / "config.json", **{name: value})
    if not has_checkpoint:
        shutil.rmtree(run / "checkpoints")
    assert refused(made) == f"{run / 'config.json'} has {flag}. Restore the file, or start a new run."


@pytest.mark.parametrize(("name", "value"), [("keep", 1), ("sample_prompt", "other"), ("validation_every", 3)])
def test_harmless_edit_is_accepted(made: DamagedRuns, run: Path, name: str, value: Any) -> None:
    edit(run / "config.json", **{name: value})
    resumed(made)


def test_allowed_flags_are_accepted_on_resume(made: DamagedRuns, run: Path) -> None:
    resumed(made, "--keep", "1", "--checkpoint-every", "2")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-4"]


@pytest.mark.parametrize(("name", "value", "before"), [("layer_norm_epsilon", 0.1, 1e-5), ("n_head", 4, 2)])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_edited_base_model_is_refused(
    made: DamagedRuns, run: Path, name: str, value: Any, before: Any, has_checkpoint: bool
) -> None:
    edit(made.base / "config.json", **{name: value})
    if not has_checkpoint:
        shutil.rmtree(run / "checkpoints")
    assert refused(made) == (
        f"the configuration of the model {made.base} has changed since {run} was started: {name} is {value} and was "
        f"{before}. Restore it, or start a new run."
    )


def test_other_initial_weights_are_refused(made: DamagedRuns, run: Path) -> None:
    save_model_folder(made.base, kind="gpt2", dropout=0.1)  # other random weights
    resumed(made)  # the weights are those of the checkpoint
    made.fresh()
    shutil.rmtree(run / "checkpoints")
    save_model_folder(made.base, kind="gpt2", dropout=0.1)
    assert refused(made) == (
        f"the weights of {made.base} have changed since {run} was started, and it has no checkpoint. Restore them, or "
        "start a new run."
    )


@pytest.mark.parametrize("other", ["twin", "other"])
def test_checkpoint_of_another_run_is_refused(made: DamagedRuns, run: Path, other: str) -> None:
    theirs = made.outside / other
    copied = shutil.copytree(theirs / "checkpoints" / "step-4", run / "checkpoints" / "step-4")
    assert refused(made) == (
        f"{copied} belongs to run {read_identity(theirs).run_id}, and {run} is run {read_identity(run).run_id}. Move "
        "the checkpoint away to resume without it."
    )
    code, out, _ = captured(["checkpoints", str(run)])
    assert code == 0
    assert "NOT whole: it belongs to run " in out
    assert out.endswith("newest whole checkpoint: step-3\n")


def test_run_ids_are_random(made: DamagedRuns, run: Path) -> None:
    ids = {read_identity(path).run_id for path in (run, made.outside / "twin", made.outside / "other")}
    assert len(ids) == 3


@pytest.mark.parametrize("command", ["resume", "checkpoints", "report", "advise"])
def test_newer_layout_is_refused(made: DamagedRuns, run: Path, command: str) -> None:
    edit_signed(run / "run-manifest.json", layout=3, bigbatch="9.9", new_field=1)
    assert refused(made, command=command).startswith(f"{run} has layout 3, written by bigbatch 9.9, and bigbatch ")
    assert refused(made, command=command).endswith(" supports layouts up to 2. Upgrade bigbatch; nothing was changed.")


def test_checkpoint_of_newer_version_is_refused(made: DamagedRuns, run: Path) -> None:
    edit_signed(run / "checkpoints" / "step-3" / "manifest.json", format=2)
    assert refused(made) == (
        f"{run} has a checkpoint of a newer bigbatch (step-3: manifest.json has format 2, and this bigbatch reads "
        "format 1). Upgrade bigbatch; nothing was changed."
    )


def test_changed_identity_is_refused(made: DamagedRuns, run: Path) -> None:
    edit(run / "run-manifest.json", run_id="0" * 32)
    assert refused(made) == (
        f"{run / 'run-manifest.json'} is not what bigbatch wrote: it differs from what was written (SHA-256). Restore "
        "the file."
    )
    edit_signed(run / "run-manifest.json", run_id=5)
    assert refused(made).startswith(f"{run / 'run-manifest.json'} is not what bigbatch wrote: run_id: ")


# layout 1 ----------------------------------------------------------------------------------------------------------


def test_run_of_earlier_layout_resumes(made: DamagedRuns, run: Path) -> None:
    to_legacy(run)
    resumed(made)
    assert not (run / "run-manifest.json").exists()


def test_edited_config_of_earlier_layout_is_refused(made: DamagedRuns, run: Path) -> None:
    to_legacy(run)
    edit(run / "config.json", lr=0.02)
    assert refused(made) == (
        f"{run / 'checkpoints' / 'step-3'} was saved with another config.json than the one in {run}. Restore "
        "config.json, or move the checkpoint away if it was copied from another run."
    )


def test_state_of_earlier_layout_without_cursor_is_skipped(made: DamagedRuns, run: Path) -> None:
    to_legacy(run)
    path = run / "checkpoints" / "step-3" / "state.json"
    values = json.loads(path.read_bytes())
    del values["progress"]["cursor"]
    path.write_text(json.dumps(values), encoding="utf-8")
    sign(path.parent)
    assert f"skipping checkpoint {path.parent}: state.json: progress.cursor: field required\n" in resumed(made)


# states and lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seal", [False, True])
def test_changed_state_is_skipped_with_reason(made: DamagedRuns, run: Path, seal: bool) -> None:
    path = run / "checkpoints" / "step-3" / "state.json"
    values = json.loads(path.read_bytes())
    values["progress"]["cursor"] = "12"
    path.write_text(json.dumps(values), encoding="utf-8")
    sign(path.parent, seal=seal)
    reason = (
        "state.json: progress.cursor: input should be a valid integer"
        if seal
        else "state.json was changed after it was written"
    )
    printed = resumed(made)
    assert f"skipping checkpoint {path.parent}: {reason}\n" in printed
    assert f"resuming {run} after update 2\n" in printed


def test_tensors_of_another_run_are_skipped(made: DamagedRuns, run: Path) -> None:
    path = run / "checkpoints" / "step-3" / "optimizer.safetensors"
    shutil.copyfile(made.outside / "other" / "checkpoints" / "step-3" / path.name, path)
    sign(path.parent)
    reason = "optimizer.safetensors is not the one that state.json was written with"
    assert f"skipping checkpoint {path.parent}: {reason}\n" in resumed(made)


def test_shortened_metrics_resume_from_older_checkpoint(made: DamagedRuns, run: Path) -> None:
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(rows[:2]))
    printed = resumed(made)
    sizes = [sum(map(len, rows[:number])) for number in (2, 3)]
    assert (
        f"skipping checkpoint {run}/checkpoints/step-3: metrics.jsonl has {sizes[0]:,} bytes and had {sizes[1]:,} when "
        "it was saved\n"
    ) in printed
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


def test_missing_metrics_are_refused(made: DamagedRuns, run: Path) -> None:
    size = sum(map(len, (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]))
    (run / "metrics.jsonl").unlink()
    assert refused(made) == (
        f"{run} has no checkpoint whose lines of metrics are complete (step-3: metrics.jsonl has 0 bytes and had "
        f"{size:,} when it was saved). Restore {run / 'metrics.jsonl'}."
    )


# links and other content -------------------------------------------------------------------------------------------


def test_linked_metrics_are_refused(made: DamagedRuns, run: Path) -> None:
    target = made.outside / "metrics"
    (run / "metrics.jsonl").rename(target)
    (run / "metrics.jsonl").symlink_to(target)
    before = target.read_bytes()
    assert refused(made) == f"{run / 'metrics.jsonl'} cannot be read: it is a link, which is not followed."
    assert target.read_bytes() == before


def test_hard_link_of_metrics_is_replaced(made: DamagedRuns, run: Path) -> None:
    os.link(run / "metrics.jsonl", made.outside / "copy")
    before = (made.outside / "copy").read_bytes()
    resumed(made)
    assert (made.outside / "copy").read_bytes() == before
    assert len(metrics(run)) == 4


@pytest.mark.parametrize("name", ["model", "model.partial", "model.older"])
def test_linked_model_is_replaced(made: DamagedRuns, run: Path, name: str) -> None:
    target = made.outside / "elsewhere"
    shutil.copytree(run / "model", target)
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(target)
    before = content_of(target)
    resumed(made)
    assert content_of(target) == before
    assert (run / "model" / "model.safetensors").is_file()
    assert not (run / "model").is_symlink()


def test_pruning_passes_a_broken_newest_checkpoint(made: DamagedRuns, run: Path) -> None:
    broken = shutil.copytree(run / "checkpoints" / "step-3", run / "checkpoints" / "step-9")
    printed = resumed(made, "--keep", "1")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-4", "step-9"]
    assert printed.count(f"checkpoint {broken} is not valid and does not count as one to keep: ") == 1


def test_notes_in_place_of_a_checkpoint_stay(made: DamagedRuns, run: Path) -> None:
    place = run / "checkpoints" / "step-4"
    place.mkdir()
    (place / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "checkpoints" / "step-2" / "notes.txt").touch()
    printed = resumed(made, "--keep", "1")
    assert f"{place} was not written by this run and is now called step-4.kept\n" in printed
    assert (place.with_name("step-4.kept") / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert f"{place.with_name('step-2')} was not written by this run and is not removed\n" in printed
    assert {path.name for path in place.parent.iterdir()} == {"step-2", "step-4", "step-4.kept"}
