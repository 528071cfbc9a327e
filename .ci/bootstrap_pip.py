"""Install pip into an environment where neither its interpreter nor that of the system has it.

    python3 .ci/bootstrap_pip.py .venv/bin/python

Debian and Ubuntu ship a python3 without pip and without ensurepip. The wheel of pip, in the version of constraints.txt,
is read from the package index that PIP_INDEX_URL names, compared with the SHA-256 that the index states, and installs
itself; without PIP_INDEX_URL, one sentence says what to install. With the standard library of Python 3.11 alone.
"""

import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERWISE = "Install pip or ensurepip for this python3 (Debian and Ubuntu: apt install python3-venv), and repeat."
DOWNLOAD_S = 60


def pinned_version(constraints: str) -> str:
    """Return the version of pip in constraints.txt."""
    return re.findall(r"^pip==(\S+)$", constraints, flags=re.MULTILINE)[0]


def find_wheel(page: str, address: str, version: str) -> tuple[str, str]:
    """Return the address and the SHA-256 of the wheel of a version, from pip's page in an index.

    Args:
        page: The page, as HTML.
        address: Of the page; links may be relative.
        version: Of pip.
    """
    name = f"pip-{version}-py3-none-any.whl"
    for link in re.findall(r'href="([^"]+)"', page):
        target, _, digest = urllib.parse.urljoin(address, html.unescape(link)).partition("#sha256=")
        if digest and target.rpartition("/")[2] == name:
            return target, digest
    sys.exit(f"{address} has no {name} with a SHA-256. {OTHERWISE}")


def read(address: str) -> bytes:
    """Return what an address of an index has."""
    request = urllib.request.Request(address, headers={"Accept": "text/html, */*;q=0.1"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_S) as response:
            content: bytes = response.read()
    except OSError as error:  # urllib's errors, too
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        sys.exit(f"pip cannot be read from {address}: {error}. {OTHERWISE}")
    return content


def install(python: Path, index: str, version: str) -> None:
    """Install a version of pip from an index into the environment of an interpreter."""
    address = f"{index.rstrip('/')}/pip/"
    target, expected = find_wheel(read(address).decode("utf-8", "replace"), address, version)
    wheel = read(target)
    if (found := hashlib.sha256(wheel).hexdigest()) != expected:
        sys.exit(f"{target} has the SHA-256 {found}, and the index states {expected}. {OTHERWISE}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, target.rpartition("/")[2])
        path.write_bytes(wheel)
        flags = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
        subprocess.run([python, path / "pip", "install", *flags, path], check=True)


def main() -> None:
    """Install the pinned pip into the environment of the interpreter that is named."""
    if len(sys.argv) != 2:
        sys.exit("Usage: python3 .ci/bootstrap_pip.py .venv/bin/python")
    version = pinned_version((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    if not (index := os.environ.get("PIP_INDEX_URL")):
        sys.exit(f"This python3 has neither pip nor ensurepip, and PIP_INDEX_URL names no index. {OTHERWISE}")
    install(Path(sys.argv[1]), index, version)


if __name__ == "__main__":
    main()
