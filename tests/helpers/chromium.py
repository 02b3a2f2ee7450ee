"""A real Chromium, driven over a pipe by the DevTools protocol: nothing but the browser is needed.

It is Debian's ``chromium-headless-shell`` or another Chromium on the path; ``why_not`` says what is missing.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_PATIENCE = 120  # seconds that one answer may take: a bound on a hang, not a measure
_FREE = 10  # file descriptors from here on are out of the way of those that Chromium reads: 3 and 4


def program() -> str | None:
    """The first Chromium on the path."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def why_not() -> str | None:
    """Reason why no Chromium can be started here, or None."""
    return None if program() else f"Chromium is not installed (none of {', '.join(PROGRAMS)})"


@dataclass
class Seen:
    """What a page did while it was open.

    Attributes:
        requests: URL of everything that it asked for, itself included.
        messages: what the browser wrote into the console: errors, refusals by the page's policy, exceptions.
    """

    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


class Chromium:
    """One browser with one page; see :func:`browser`."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._buffer = b""
        self._number = 0
        self._session = ""
        self.seen = Seen()

    def start(self) -> None:
        """Open an empty page and listen to it."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")

    def open(self, path: Path) -> Seen:
        """Load a file and wait until everything in it is there."""
        self.seen = Seen()
        answer = self._call("Page.navigate", url=path.resolve().as_uri())
        if "errorText" in answer:
            raise RuntimeError(f"{path} did not load: {answer['errorText']}")
        self.evaluate(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )
        self.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => null)))")
        return self.seen

    def evaluate(self, code: str) -> Any:
        """Run JavaScript in the page, as its inspector would, and return what it gives as JSON."""
        answer = self._call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def window(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the page in pixels, and whether its reader likes the dark."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, x: float = 0, y: float = 0, width: float = 1280, height: float = 1000) -> bytes:
        """Return a part of the page as PNG."""
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        answer = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writes, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._reads], [], [], _PATIENCE)[0]:
                raise RuntimeError(f"Chromium said nothing for {_PATIENCE} s")
            part = os.read(self._reads, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.seen.requests.append(values["request"]["url"])
        elif event.get("method") == "Log.entryAdded":
            self.seen.messages.append(values["entry"]["text"])
        elif event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.seen.messages.append(json.dumps(values)[:2000])


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have numbers that a browser does not use itself."""
    ends = os.pipe()
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FREE) for end in ends)
    for end in ends:
        os.close(end)
    return reads, writes


def _end(child: int) -> None:
    """Wait for the end of a browser; one that does not find it is killed."""
    for _ in range(100):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


@contextmanager
def browser(folder: Path) -> Iterator[Chromium]:
    """Start a browser whose files lie in ``folder``; it is ended on leaving.

    Raises:
        RuntimeError: it does not answer; its log is in ``folder``.
    """
    executable = program()
    assert executable is not None, why_not()
    command = [
        executable,
        "--headless",
        "--no-sandbox",  # of no use in containers, and refused by Chromium for root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--remote-debugging-pipe",
    ]
    theirs_in, ours_out = _pipe()
    ours_in, theirs_out = _pipe()
    log = os.open(folder / "chromium.log", os.O_CREAT | os.O_WRONLY, 0o644)
    actions = [
        (os.POSIX_SPAWN_DUP2, log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
        (os.POSIX_SPAWN_DUP2, theirs_in, 3),
        (os.POSIX_SPAWN_DUP2, theirs_out, 4),
    ]
    child = os.posix_spawn(executable, command, os.environ, file_actions=actions, setpgroup=0)
    for end in (theirs_in, theirs_out, log):
        os.close(end)
    try:
        page = Chromium(ours_in, ours_out)
        page.start()
        yield page
    finally:
        for end in (ours_in, ours_out):  # a browser whose pipe is closed ends, and its children with it
            os.close(end)
        _end(child)
