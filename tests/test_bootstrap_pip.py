"""Without pip and ensurepip, `make setup` reads pip from the package index, if its digest is the stated one."""

import functools
import hashlib
import http.server
import importlib.util
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGE = "https://index.example/simple/pip/"
WHEEL = "pip-26.3-py3-none-any.whl"
OTHERWISE = "Install pip or ensurepip for this python3 (Debian and Ubuntu: apt install python3-venv), and repeat."


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    return load_script(".ci/bootstrap_pip.py")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served."""
    folder = tmp_path / "index"
    (folder / "pip").mkdir(parents=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def bundled_wheel() -> Path:
    """Return the wheel of pip that ensurepip of this interpreter has."""
    found = importlib.util.find_spec("ensurepip")
    wheels = [*Path(str(found.origin)).parent.glob("_bundled/pip-*.whl")] if found else []
    if not wheels:
        pytest.skip("this Python has no ensurepip with a wheel of pip")
    return wheels[0]


def publish(folder: Path, wheel: Path, digest: str) -> str:
    """Put a wheel into an index; return its version."""
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    (folder / "pip" / "index.html").write_text(
        f'<a href="../{wheel.name}#sha256={digest}">{wheel.name}</a>', encoding="utf-8"
    )
    return wheel.name.split("-")[1]


def test_version_is_that_of_constraints(bootstrap: ModuleType) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"pip=={bootstrap.pinned_version(pins)}" in pins.splitlines()
    assert bootstrap.pinned_version("pip-requirements-parser==32.0.1\npip==26.3\n") == "26.3"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (f"https://files.example/a/{WHEEL}#sha256=ab", f"https://files.example/a/{WHEEL}"),
        (f"../../files/{WHEEL}#sha256=ab", f"https://index.example/files/{WHEEL}"),
        (f"/f/{WHEEL}?a=1&amp;b=2#sha256=ab", None),  # another name
        (f"https://files.example/{WHEEL}", None),
        ("https://files.example/pip-26.3.1-py3-none-any.whl#sha256=ab", None),
    ],
)
def test_wheel_is_found_by_its_link(bootstrap: ModuleType, link: str, expected: str | None) -> None:
    page = f'<a href="/pip-26.3.tar.gz#sha256=cd">sdist</a><a href="{link}" data-x="">wheel</a>'
    if expected is None:
        with pytest.raises(SystemExit) as raised:
            bootstrap.find_wheel(page, PAGE, "26.3")
        assert str(raised.value) == f"{PAGE} has no {WHEEL} with a SHA-256. {OTHERWISE}"
    else:
        assert bootstrap.find_wheel(page, PAGE, "26.3") == (expected, "ab")


@pytest.mark.slow
def test_pip_is_installed_into_environment_without_it(
    bootstrap: ModuleType, index: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = index
    wheel = bundled_wheel()
    version = publish(folder, wheel, hashlib.sha256(wheel.read_bytes()).hexdigest())
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    bootstrap.install(python, address, version)
    done = subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"pip {version} from {environment}")


def test_wheel_with_another_digest_is_not_run(bootstrap: ModuleType, index: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = index
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"another")
    found = hashlib.sha256(b"another").hexdigest()
    publish(folder, wheel, "0" * 64)
    with pytest.raises(SystemExit) as raised:
        bootstrap.install(tmp_path / "no-such-python", f"{address}/", "26.3")
    sentence = f"{address}/{WHEEL} has the SHA-256 {found}, and the index states {'0' * 64}. {OTHERWISE}"
    assert str(raised.value) == sentence


def test_index_that_does_not_answer_is_one_sentence(bootstrap: ModuleType, index: tuple[Path, str]) -> None:
    _, address = index
    with pytest.raises(SystemExit) as raised:
        bootstrap.install(Path(sys.executable), f"{address}/missing", "26.3")
    assert str(raised.value) == (
        f"pip cannot be read from {address}/missing/pip/: HTTP Error 404: File not found. {OTHERWISE}"
    )


def test_without_index_one_sentence_says_what_to_install(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["bootstrap_pip.py", "python"])
    with pytest.raises(SystemExit) as raised:
        bootstrap.main()
    expected = f"This python3 has neither pip nor ensurepip, and PIP_INDEX_URL names no index. {OTHERWISE}"
    assert str(raised.value) == expected
