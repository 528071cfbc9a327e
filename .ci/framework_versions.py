"""Run the tests with the lowest and with the newest supported dependencies, in an environment for each.

    python .ci/framework_versions.py [--set lowest|newest] [--lowest-torch | --bounds] [pytest arguments]

Lowest: the lower bounds of pyproject.toml, exactly and all at once: those of the trainer, the integrations and the
other extras that run without a GPU, with the versions of .ci/lowest.txt for what these need in turn; LOWEST_TESTS run
with them. Newest: the latest releases, without pins, for tests/integrations and the tests of the extra `fp8`. In both,
torch and the test runner have the versions of constraints.txt. torch is not installed again: the environments import
the one of the interpreter that runs this script, if its version is the pinned one.

With --lowest-torch, the lowest set has the lower bound of torch instead. Where the package index has no build of it
for the CPU alone, that installs CUDA too: an environment of 5.7 GB.

The environments are in .venv/versions and are created again by every call.
"""

import argparse
import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv" / "versions"
INTEGRATIONS = ("train", "transformers", "trl", "accelerate", "lightning", "sentence-transformers")
EXTRAS = (*INTEGRATIONS, "quantize", "webdataset", "streaming", "wandb")
# Of the extra `mlflow`, the part that bigbatch calls; `fa4` needs a GPU, `fp8` is in the newest set alone, and `bench`
# and `dev` repeat the others.
MLFLOW = "mlflow-skinny"
LOWEST_TESTS = (  # what calls the dependencies most
    "tests/integrations",
    "tests/lm/config",
    "tests/lm/checkpoint/test_checkpoint.py",
    "tests/lm/data/test_conversations.py",
    "tests/lm/data/test_dataset_source.py",
    "tests/lm/data/token_shards",
    "tests/lm/model/test_adapters.py",
    "tests/lm/model/test_pretrained.py",
    "tests/lm/report",
    "tests/lm/training/test_dashboards.py",
)
LOWEST = ROOT / ".ci" / "lowest.txt"
# torchao is not in `dev`: where it is installed, transformers and peft import it, which takes seconds.
FP8_TESTS = (
    "tests/lm/model/test_fp8.py",
    "tests/lm/model/test_fp8_gradient.py",
    "tests/lm/training/test_fp8_run.py",
)
NEWEST_TESTS = ("tests/integrations", *FP8_TESTS)
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")
LARGE_PARTS_OF_TORCH = ("nvidia-", "triton", "cuda-")
INSTALL_S = 900
TESTS_S = 1800


def lower_bounds() -> dict[str, str]:
    """Return the lower bound of every dependency that is tested, from pyproject.toml.

    Raises:
        SystemExit: A requirement is not of the form name>=version, or has two lower bounds.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    requirements += [line for line in extras["dev"] if line.startswith(MLFLOW)]
    bounds: dict[str, str] = {}
    for line in requirements:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
        if found is None or bounds.setdefault(found[1], found[2]) != found[2]:
            sys.exit(f"{line!r} in pyproject.toml: write name>=version, with the same version in every extra")
    return bounds


def read_versions(path: Path) -> dict[str, str]:
    """Return the version of each package in a file of pins."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[\w.-]+==", line))


def pins() -> dict[str, str]:
    """Return the versions of torch and the test runner in constraints.txt."""
    found = read_versions(ROOT / "constraints.txt")
    return {name: found[name] for name in ("torch", *TEST_TOOLS)}


def lowest_versions() -> dict[str, str]:
    """Return the version of every package of the lowest set but torch.

    Raises:
        SystemExit: The file of these versions does not have a lower bound of pyproject.toml.
    """
    found, bounds = read_versions(LOWEST), lower_bounds()
    for name in sorted(bounds.keys() - {"torch"}):
        if not _equal(found.get(name, ""), bounds[name]):
            sys.exit(
                f"{LOWEST.name} has {name} {found.get(name)}, and its lower bound is {bounds[name]}: make it again."
            )
    return found


def _equal(first: str, second: str) -> bool:
    """Return whether two versions are the same but for zeros at the end."""
    return re.sub(r"(\.0)+$", "", first) == re.sub(r"(\.0)+$", "", second)


def share_torch(environment: Path, version: str) -> None:
    """Make the torch of this interpreter importable in an environment, if it has that version.

    Symbolic links in a directory of their own: pip counts them as installed, and does not remove what is outside of
    the environment.
    """
    try:
        installed = [metadata.distribution("torch")]
    except metadata.PackageNotFoundError:
        return
    if installed[0].version.partition("+")[0] != version:
        return
    for requirement in installed[0].requires or ():
        name = re.split(r"[^\w.-]", requirement)[0]
        if name.startswith(LARGE_PARTS_OF_TORCH):
            try:
                installed.append(metadata.distribution(name))
            except metadata.PackageNotFoundError:
                continue  # for another platform
    shared = environment / "torch"
    shared.mkdir()
    for distribution in installed:
        source = Path(str(distribution.locate_file("")))
        names = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for name in sorted(names):
            if not (shared / name).exists():
                (shared / name).symlink_to(source / name)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "torch.pth").write_text(f"{shared}\n", encoding="utf-8")


def install(name: str, *, lowest_torch: bool) -> Path:
    """Create the environment `lowest` or `newest`, and return its interpreter."""
    environment = ENVIRONMENTS / name
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=False)
    constraints = pins()
    if name == "lowest":
        constraints = lowest_versions() | constraints | ({"torch": lower_bounds()["torch"]} if lowest_torch else {})
    share_torch(environment, constraints["torch"])
    lines = [f"{package}=={version}\n" for package, version in sorted(constraints.items())]
    (environment / "constraints.txt").write_text("".join(lines), encoding="utf-8")
    python = environment / "bin" / "python"
    has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    pip = [sys.executable if has_pip.returncode == 0 else "python3", "-m", "pip", "--python", str(python)]
    extras, more = (EXTRAS, [MLFLOW]) if name == "lowest" else ((*INTEGRATIONS, "fp8"), [])
    packages = ["-e", f"{ROOT}[{','.join(extras)}]", *more, *TEST_TOOLS]
    flags = ["--quiet", "--disable-pip-version-check", "-c", str(environment / "constraints.txt")]
    subprocess.run([*pip, "install", *flags, *packages], check=True, timeout=INSTALL_S)
    return python


def print_versions(name: str, python: Path) -> None:
    """Print the versions of the tested dependencies in an environment, in one line."""
    code = (
        "import importlib.metadata as m; print(*(f'{d.name.lower()} {d.version}' for d in m.distributions()), sep=';')"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    tested = lower_bounds().keys()
    lines = sorted({line for line in done.stdout.strip().split(";") if line.split()[0].replace("_", "-") in tested})
    print(f"{name}: {', '.join(lines)}", flush=True)


def main() -> None:
    """Install the sets, run the tests in each, and exit with 1 if a test failed in one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=("lowest", "newest"), action="append", help="one of the two only")
    parser.add_argument("--lowest-torch", action="store_true", help="test the lower bound of torch, too")
    parser.add_argument("--bounds", action="store_true", help="print the versions that the lowest set begins with")
    arguments, for_pytest = parser.parse_known_args()
    if arguments.bounds:
        print("\n".join(f"{name}=={version}" for name, version in sorted((lower_bounds() | pins()).items())))
        return
    failed = []
    for name in arguments.set or ("lowest", "newest"):
        python = install(name, lowest_torch=arguments.lowest_torch)
        print_versions(name, python)
        command = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not gpu", "-p", "no:cacheprovider"]
        tests = subprocess.run(
            [*command, *(for_pytest or (LOWEST_TESTS if name == "lowest" else NEWEST_TESTS))],
            cwd=ROOT,
            check=False,
            timeout=TESTS_S,
        )
        if tests.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"tests failed with the {' and the '.join(failed)} dependencies")


if __name__ == "__main__":
    main()
