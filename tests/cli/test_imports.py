"""What starting the command may load: ``--help`` and complaints come before any heavy library."""

import subprocess
import sys
from functools import cache

import pytest

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "datasets", "safetensors", "peft", "rich")


def loaded_after(code: str, watched: tuple[str, ...]) -> set[str]:
    """Run ``code`` in a fresh interpreter; return which of ``watched`` it left in ``sys.modules``."""
    script = f"import sys\n{code}\nprint('loaded', *[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "loaded"
    return set(last[1:])


@cache
def loaded_by(commands: tuple[str, ...], watched: tuple[str, ...], code: int | None = None) -> dict[str, set[str]]:
    """Run commands one after the other in a fresh interpreter; return what `loaded_after` returns after each.

    Args:
        commands: Command lines, split at spaces; what one has loaded counts for the later ones, too.
        watched: As for `loaded_after`.
        code: Exit code of each command, if it matters.
    """
    script = (
        "import sys\n"
        "from bigbatch.cli import main\n"
        f"for command in {commands!r}:\n"
        "    code = main(command.split())\n"
        f"    print('\\nafter', code, *[name for name in {watched!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("after ")]
    assert code is None or [line[0] for line in lines] == [str(code)] * len(commands)
    return {command: set(names) for command, (_, *names) in zip(commands, lines, strict=True)}


OVERVIEW = ("", "--help", "-h", "--version", "trian")


@pytest.mark.parametrize("command", OVERVIEW)
def test_overview_loads_no_pydantic(command: str):
    assert loaded_by(OVERVIEW, (*HEAVY, "pydantic", "argparse"))[command] == set()


HELP_AND_ERRORS = (
    "train --help",
    "verify --help",
    "generate --help",
    "report --help",
    "report",
    "bench --help",
    "bench --only trianer",
    "train --global-batch 0",
    "train --config /nonexistent.toml",
    "generate",
)


@pytest.mark.parametrize("command", HELP_AND_ERRORS)
def test_help_and_errors_load_no_heavy_library(command: str):
    assert loaded_by(HELP_AND_ERRORS, HEAVY)[command] == set()


def test_unwritable_file_is_reported_before_torch_loads():
    code = "from bigbatch.cli import main; main(['bench', '--save', '/nonexistent/folder/file'])"
    assert loaded_after(code, ("torch", "transformers")) == set()


MISSING_PATHS = (
    "train --model /nonexistent/model",
    "train --model no/such/folder",
    "train --data /nonexistent/data.jsonl",
    "plan --data ./missing.txt",
    "verify --model ./missing",
    "resume /nonexistent/run",
    "resume . --data /nonexistent/data.jsonl --allow-data-change",
    "resume . --validation-data /nonexistent/data.jsonl --allow-data-change",
    "train --data python-stdlib ./missing.txt",
    "train --validation-data ./missing.txt",
    "generate /nonexistent/run",
    "advise /nonexistent/run",
    "checkpoints /nonexistent/run",
    "report /nonexistent/run",
)


@pytest.mark.parametrize("command", MISSING_PATHS)
def test_missing_path_is_reported_before_torch_loads(command: str):
    watched = ("torch", "transformers", "tokenizers", "datasets", "numpy", "pyarrow")
    assert loaded_by(MISSING_PATHS, watched, code=2)[command] == set()


def test_importing_package_loads_no_optional_library():
    watched = ("transformers", "rich", "pydantic", "datasets", "tokenizers", "peft")
    assert loaded_after("import bigbatch", watched) == set()


@pytest.mark.parametrize("words", [["train", "--help"], ["train"], ["verify"], ["generate", "RUN"], ["bench"]])
def test_missing_extra_is_one_sentence(words: list[str]):
    script = f"import sys; sys.modules['pydantic'] = None; from bigbatch.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f'bigbatch {words[0]}: pydantic is not installed: pip install "bigbatch[train]".\n'
    assert done.stdout == ""


def test_importing_trainer_package_loads_no_library():
    assert loaded_after("import bigbatch.lm; dir(bigbatch.lm)", (*HEAVY, "pydantic")) == set()


def test_configuration_loads_no_heavy_library():
    assert loaded_after("import bigbatch.lm; bigbatch.lm.TrainConfig(steps=3)", HEAVY) == set()
