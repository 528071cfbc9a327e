"""Write the software bill of materials of the built wheel with its extra `train`, as CycloneDX JSON.

    python .ci/bill_of_materials.py [--dist dist]

    wheel[train] and constraints.txt → an environment with nothing else → cyclonedx-py → dist/bigbatch-VERSION.cdx.json

It lists the versions that the checks run with. Times and serial numbers are left out, so the same environment gives the
same bytes; its platform matters, because torch has other dependencies where it has CUDA.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[1]
INSTALL_S = 1200
SPECIFICATION = SchemaVersion.V1_6


def create_environment(folder: Path, *requirements: str) -> Path:
    """Create an environment without pip, install requirements at the versions of constraints.txt; return its python."""
    venv.create(folder, clear=True, with_pip=False)
    python = folder / "bin" / "python"
    flags = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *flags, *requirements]
    subprocess.run(command, check=True, timeout=INSTALL_S)
    return python


def find_wheel(dist: Path) -> Path:
    """Return the only wheel of a folder.

    Raises:
        SystemExit: It has none, or several.
    """
    wheels = list(dist.glob("bigbatch-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{dist} has {len(wheels)} wheels of bigbatch: run make dist.")
    return wheels[0]


def describe(python: Path, version: str) -> dict[str, Any]:
    """Return the bill of an environment, with bigbatch as its subject."""
    command = ["environment", "--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]
    flags = ["--output-reproducible", "--spec-version", SPECIFICATION.to_version(), "--output-format", "JSON"]
    done = subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", *command, *flags, str(python)], check=True, capture_output=True
    )
    bill: dict[str, Any] = json.loads(done.stdout)
    # pyproject.toml has no version: it is read from the package.
    bill["metadata"]["component"] |= {"version": version, "purl": f"pkg:pypi/bigbatch@{version}"}
    return bill


def problems(text: str) -> list[str]:
    """Return a sentence for each reason why a bill must not be published."""
    found = []
    if (error := JsonStrictValidator(SPECIFICATION).validate_str(text)) is not None:
        found.append(f"the bill is not valid CycloneDX {SPECIFICATION.to_version()}: {error.data.message}")
    bill = json.loads(text)
    names = {component["name"] for component in bill["components"]}
    found += [f"the bill lacks {name}." for name in ("torch", "transformers") if name not in names]
    found += [f"{name} in the bill is no dependency of bigbatch." for name in ("pip", "pytest") if name in names]
    found += [f"{part['name']} has no version." for part in bill["components"] if not part.get("version")]
    if "file://" in text:
        found.append("the bill has the path of a file on this machine.")
    return found


def main() -> None:
    """Write the bill, and exit with the problems if it has one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder of the wheel, for the bill, too")
    dist: Path = parser.parse_args().dist
    wheel = find_wheel(dist)
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        bill = describe(create_environment(Path(folder, "environment"), f"{wheel}[train]"), version)
    text = json.dumps(bill, indent=2, sort_keys=True) + "\n"
    if found := problems(text):
        sys.exit("\n".join(found))
    target = dist / f"bigbatch-{version}.cdx.json"
    target.write_text(text, encoding="utf-8")
    print(f"{target.name}: bigbatch {version} and {len(bill['components'])} other components")


if __name__ == "__main__":
    main()
