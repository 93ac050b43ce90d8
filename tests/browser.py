"""A headless Chromium, driven through its own debugging protocol over two pipes: no driver, no port, no network.

Source: Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol: JSON messages that end in NUL, read
from file descriptor 3 and written to 4 (--remote-debugging-pipe).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_S = 60.0


class Browser:
    """One page of one browser.

    Args:
        commands, answers: ends of the pipes: what we write to, what we read from.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.buffer = b""
        self.n = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers to a command."""
        self.n += 1
        message = {"id": self.n, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        number = self.n
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        found: dict[str, Any] = answer["result"]
        return found

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + ANSWER_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(until - time.monotonic(), 0))
            part = os.read(self.answers, 1 << 20) if ready else b""
            assert part, "the browser has left" if ready else f"the browser said nothing for {ANSWER_S:g} s"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, url: str) -> None:
        """Load a page and wait until all that it needs is there."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """Return the address of everything that the page asked for since it was opened."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Return what the browser's console says of the page."""
        return [event["params"]["entry"]["text"] for event in self.events if event.get("method") == "Log.entryAdded"]

    def show(self, width_px: int, height_px: int, *, dark: bool = False, media: str = "screen") -> None:
        """Set the window, the colour scheme that the reader prefers, and the medium (screen, print)."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write a picture (PNG) of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser; end it after.

    Args:
        profile: folder of its own, made anew.
    """
    program = next(found for name in NAMES if (found := shutil.which(name)))
    theirs, commands = os.pipe()
    answers, ours = os.pipe()
    # above the numbers that they are to get, so that one dup2 does not overwrite the other's source
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 100) for each in (theirs, ours)]
    for each in (theirs, ours):
        os.close(each)
    words = [
        *(program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
        *("--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"),
        # a root user has no sandbox; the only pages shown here are our own
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]

    def place() -> None:
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    process = subprocess.Popen(
        words,
        preexec_fn=place,
        close_fds=False,  # all but these two close by themselves
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile), "XDG_CONFIG_HOME": str(profile), "XDG_CACHE_HOME": str(profile)},
    )
    for each in high:
        os.close(each)
    try:
        yield Browser(commands, answers)
    finally:
        process.kill()
        process.wait()
        for each in (commands, answers):
            os.close(each)
