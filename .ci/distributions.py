"""Build the sdist and the wheel of the last commit into dist/, twice, and check both.

    python .ci/distributions.py [--out dist]

    last commit → two exports in different folders → sdist → wheel; sdist, wheel → equal bytes → contents → twine

The first build makes the wheel from the sdist, as pip does; the second makes both from the files, in a longer path,
years later, in another time zone and with another umask. Uncommitted changes are in neither. Every time in the archives
is that of the commit (SOURCE_DATE_EPOCH).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/bigbatch/"
REQUIRED = ("bigbatch/py.typed", "bigbatch/lm/report/readout.js", "bigbatch/lm/report/style.css")
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
BUILD_S = 300
LATER = 4_000_000_000  # seconds since 1970; the second export's files are that new

Files = Mapping[str, bytes]


def git(*arguments: str) -> str:
    """Return the output of a git command about this repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def export(folder: Path) -> Files:
    """Write the files of the last commit into a folder; return their bytes by path."""
    archive = folder.with_suffix(".tar")
    git("archive", f"--output={archive}", "HEAD")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(source: Path, out: Path, *kinds: str, umask: int, time_zone: str) -> None:
    """Run `python -m build` with the installed hatchling, whose version constraints.txt pins.

    Args:
        source: The folder of pyproject.toml.
        out: Receives the distributions.
        kinds: `--sdist`, `--wheel`; without them, the wheel is built from the sdist.
        umask: Of the build.
        time_zone: Of the build, such as UTC.
    """
    environment = os.environ | {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct"), "TZ": time_zone}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(source)]
    done = subprocess.run(
        command, env=environment, umask=umask, check=False, capture_output=True, text=True, timeout=BUILD_S
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nthe distributions cannot be built: see above.")


def change_surroundings(source: Path) -> None:
    """Change what must not matter in a build: the times and the modes of the files."""
    for path in source.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)  # git knows whether a file is executable, and no other mode
        os.utime(path, (LATER, LATER))


def differences(first: Path, second: Path) -> list[str]:
    """Compare the files of two folders; return a sentence for each that is not equal."""
    names = {path.name for folder in (first, second) for path in folder.iterdir()}
    found = []
    for name in sorted(names):
        one, other = (folder / name for folder in (first, second))
        if not (one.exists() and other.exists()):
            found.append(f"{name} exists in one of two builds.")
        elif one.read_bytes() != other.read_bytes():
            found.append(f"{name} differs between two builds of one commit.")
    return found


def wheel_problems(wheel: Path, tracked: Files) -> list[str]:
    """Return a sentence for each file of a wheel that is missing, too many or another than in the repository."""
    expected = {name.removeprefix("src/"): data for name, data in tracked.items() if name.startswith(PACKAGE)}
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    name, version, *_ = wheel.name.split("-")
    metadata = {f"{name}-{version}.dist-info/{file}" for file in METADATA}
    missing = sorted({*expected, *metadata, *REQUIRED} - found.keys())
    return [
        *(f"{wheel.name} lacks {file}." for file in missing),
        *(f"{wheel.name} has {file}, which is no part of the package." for file in sorted(found)
          if file not in expected and file not in metadata),
        *(f"{file} in {wheel.name} differs from the repository." for file in sorted(found.keys() & expected.keys())
          if found[file] != expected[file]),
    ]  # fmt: skip


def sdist_problems(sdist: Path, tracked: Files) -> list[str]:
    """Return a sentence for each file of an sdist that is missing, too many or another than in the repository."""
    top = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        files = [member for member in archive if member.isfile()]
        found = {file.name.removeprefix(f"{top}/"): archive.extractfile(file).read() for file in files}
    return [
        *(f"{sdist.name} lacks {file}." for file in sorted({*tracked, "PKG-INFO"} - found.keys())),
        *(f"{sdist.name} has {file}, which is not in the repository." for file in sorted(found)
          if file not in tracked and file != "PKG-INFO"),
        *(f"{file} in {sdist.name} differs from the repository." for file in sorted(found.keys() & tracked.keys())
          if found[file] != tracked[file]),
    ]  # fmt: skip


def check_metadata(distributions: Sequence[Path]) -> None:
    """Check the metadata and the long description as an index of packages does, with twine."""
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *distributions], check=True)


def main() -> None:
    """Build, check and copy the distributions; exit with the problems if one is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="created again by every call")
    out: Path = parser.parse_args().out
    if git("status", "--porcelain"):
        print("uncommitted changes are not in the distributions", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second", "longer", "path")
        second.parent.mkdir(parents=True)
        tracked = export(first)
        export(second)
        change_surroundings(second)
        built, again = Path(folder, "built"), Path(folder, "again")
        build(first, built, umask=0o022, time_zone="UTC")
        build(second, again, "--sdist", "--wheel", umask=0o077, time_zone="Pacific/Kiritimati")
        wheel, sdist = *built.glob("*.whl"), *built.glob("*.tar.gz")
        problems = [*differences(built, again), *wheel_problems(wheel, tracked), *sdist_problems(sdist, tracked)]
        if problems:
            sys.exit("\n".join(problems))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(built, out)
    check_metadata(sorted(out.iterdir()))
    print(f"{wheel.name} and {sdist.name}: the same bytes from two builds of {git('rev-parse', '--short', 'HEAD')}")


if __name__ == "__main__":
    main()
