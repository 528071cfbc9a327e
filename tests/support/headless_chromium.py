"""A headless Chromium, controlled through a pipe: no driver, no port, no library.

with Browser(find_chromium()) as browser:
    with browser.page(path, dark=True, width=375) as page:
        page.value("document.title"), page.requests, page.console_errors
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT_S = 60.0


def find_chromium() -> str | None:
    """Return the path of Chromium, or None if it is not installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def find_wide_font() -> Path | None:
    """Return a bold monospaced font of this machine, whose letters are wider than those of most; None without one."""
    if (program := shutil.which("fc-list")) is None:
        return None
    found = subprocess.run(
        [program, ":spacing=100:bold:scalable=true", "file"], capture_output=True, text=True, check=True
    )
    files = sorted(line.strip().rstrip(":") for line in found.stdout.splitlines())
    return Path(files[0]) if files else None


class Browser:
    """A Chromium process.

    Args:
        program: Its path.
        font: The only font that it has; by default those of the machine.
    """

    def __init__(self, program: str, *, font: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-pipe", "--hide-scrollbars",
            f"--user-data-dir={self._folder.name}",
        ]  # fmt: skip
        # Chromium reads commands from descriptor 3 and answers on 4; copies from 10 on cannot be one of these.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        actions = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (0, 1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, end, n) for end, n in zip(ends, (3, 4), strict=True)]
        environment = dict(os.environ)
        if font is not None:
            environment["FONTCONFIG_FILE"] = str(_fonts_with_only(font, Path(self._folder.name)))
        self._process = os.posix_spawn(program, [program, *flags, "about:blank"], environment, file_actions=actions)
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._rest = b""
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, AssertionError):
            self.call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        os.waitpid(self._process, 0)
        self._folder.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                answer: dict[str, Any] = message["result"]
                return answer
            self._events.append(message)

    def wait_for(self, method: str, session: str) -> None:
        """Wait until the page has emitted an event."""
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self._events):
            self._events.append(self._receive())

    def events(self, session: str, *methods: str) -> list[dict[str, Any]]:
        """Return the events received from a page."""
        return [
            event["params"]
            for event in self._events
            if event.get("sessionId") == session and event.get("method") in methods
        ]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], LIMIT_S)
            assert ready, f"Chromium sent nothing for {LIMIT_S:.0f} seconds"
            data = os.read(self._from, 2**20)
            assert data, "Chromium exited"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    @contextmanager
    def page(self, path: Path, *, dark: bool = False, width: int = 1200, print_media: bool = False) -> Iterator["Page"]:
        """Open a file in a new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, media="print" if print_media else "screen", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call("Page.navigate", session, url=path.absolute().as_uri())
        self.wait_for("Page.loadEventFired", session)
        yield Page(self, session)
        self.call("Target.closeTarget", targetId=target)


def _fonts_with_only(font: Path, folder: Path) -> Path:
    """Write a configuration of fontconfig with one font for every name."""
    fonts = folder / "fonts"
    fonts.mkdir()
    (fonts / font.name).symlink_to(font)
    path = folder / "fonts.conf"
    path.write_text(
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">'
        f"<fontconfig><dir>{fonts}</dir><cachedir>{folder / 'font-cache'}</cachedir></fontconfig>",
        encoding="utf-8",
    )
    return path


class Page:
    """A tab with an open file."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression in the page."""
        found = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move_to(self, x: float, y: float) -> None:
        """Move the pointer."""
        self._browser.call("Input.dispatchMouseEvent", self._session, type="mouseMoved", x=x, y=y)

    @property
    def requests(self) -> list[str]:
        """URLs of all requests."""
        return [event["request"]["url"] for event in self._browser.events(self._session, "Network.requestWillBeSent")]

    @property
    def console_errors(self) -> list[str]:
        """Console errors and warnings, and uncaught exceptions, as JSON."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event) for event in self._browser.events(self._session, *names)]

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        shot = self._browser.call("Page.captureScreenshot", self._session, format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
