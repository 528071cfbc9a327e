"""The wheel with the extra `train`, in an empty environment: a run from its data to its report."""

from pathlib import Path

import pytest

from .conftest import Installation

SETTINGS = ("--data", "small.txt", "--max-length", "32")
MODULES = """
import importlib, pkgutil
import bigbatch
names = [module.name for module in pkgutil.walk_packages(bigbatch.__path__, "bigbatch.", onerror=lambda name: None)]
outside = ("bigbatch.integrations", "bigbatch.__main__", "bigbatch.lm.bench.", "bigbatch.lm.training.adamw_8bit")
names = [name for name in names if not name.startswith(outside)]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and, after the first test that asks for it, a run."""
    folder = tmp_path_factory.mktemp("run")
    lines = (f"the cat number {i} looks at the dog number {i * 7 % 13}\n" for i in range(400))
    (folder / "small.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(train: Installation, folder: Path) -> Path:
    words = ("train", *SETTINGS, "--steps", "3", "--global-batch", "4", "--out", "run")
    train.output("bigbatch", *words, cwd=folder)
    return folder / "run"


def test_import_raises_no_warning(train: Installation) -> None:
    train.output("python", "-W", "error", "-c", "import bigbatch, bigbatch.lm; bigbatch.lm.TrainConfig(steps=3)")


def test_every_module_without_further_extra_imports(train: Installation) -> None:
    assert int(train.output("python", "-c", MODULES)) > 300


def test_run_has_metrics_checkpoints_and_model(run: Path) -> None:
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert list((run / "checkpoints").glob("step-*/manifest.json"))
    assert (run / "model" / "model.safetensors").stat().st_size > 0


def test_verify_finds_every_cut_exact(train: Installation, folder: Path) -> None:
    printed = train.output("bigbatch", "verify", *SETTINGS, "--samples", "4", cwd=folder)
    assert "exact: every cut gives the full-batch gradient" in printed


def test_trained_model_generates(train: Installation, run: Path) -> None:
    assert train.output("bigbatch", "generate", run, "the cat").startswith("the cat")


def test_report_has_style_and_script_of_the_wheel(train: Installation, run: Path) -> None:
    train.output("bigbatch", "report", run)
    (package,) = train.python.parents[1].glob("lib/python*/site-packages/bigbatch")
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ("style.css", "readout.js"):
        assert (package / "lm" / "report" / name).read_text(encoding="utf-8").strip() in page


def test_missing_framework_of_an_integration_is_named(train: Installation) -> None:
    done = train.run("python", "-c", "import bigbatch.integrations.lightning")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'pytorch_lightning'"
