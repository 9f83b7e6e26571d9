"""A headless Chromium, spoken to over its DevTools pipe:
opens pages, evaluates, takes screenshots, hears every complaint.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """One Chromium process.

    `problems`: console errors and warnings, uncaught exceptions, requests that failed.
    """

    def __init__(self, executable: str, profile: str):
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # Chromium reads descriptor 3 and writes 4: its ends are copied out of the way first.
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser, from_browser)]
        self._process = subprocess.Popen(
            [executable, *FLAGS, f"--user-data-dir={profile}"],
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(copies[0], 3), os.dup2(copies[1], 4)),
        )
        for fd in (to_browser, from_browser, *copies):
            os.close(fd)
        self._unread = b""
        self._number = 0  # of the last command
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._hear(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has gone"
            self._unread += data
        message, self._unread = self._unread.split(b"\0", 1)
        return dict(json.loads(message))

    def _hear(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(f"exception: {details['exceptionDetails']}")
            case "Runtime.consoleAPICalled" if details["type"] in ("error", "warning", "assert"):
                shown = [a.get("value", a.get("description")) for a in details["args"]]
                self.problems.append(f"console {details['type']}: {shown}")
            case "Log.entryAdded" if details["entry"]["level"] in ("error", "warning"):
                entry = details["entry"]
                self.problems.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")
            case "Network.loadingFailed" if not details.get("canceled"):
                self.problems.append(f"not loaded: {details.get('errorText')}")
        self._events.append(event)

    def open(self, url: str, width: int = 1100, height: int = 800, dark: bool = False) -> None:
        """Load a page to its end, pictures included,
        and forget the complaints about the page before.
        """
        self._go("about:blank")  # what the page before still has to say comes now
        self.problems.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._go(url)
        self.evaluate(
            "Promise.all([...document.images].map(image => image.decode().catch(() => 0)))"
        )

    def _go(self, url: str) -> None:
        self._events.clear()
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._hear(self._read())

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = (
            event for event in self._events if event.get("method") == "Network.requestWillBeSent"
        )
        return [event["params"]["request"]["url"] for event in sent]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page as PNG: all of it, or what the window shows."""
        options: dict[str, Any] = {"captureBeyondViewport": whole}
        if whole:
            # A first picture lays the page out beyond the window; then its size is read.
            self.call("Page.captureScreenshot", **options)
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            height = min(size["height"], 12000)
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1}
        picture = self.call("Page.captureScreenshot", **options)["data"]
        path.write_bytes(base64.b64decode(picture))

    def broken_pictures(self) -> list[str]:
        """Pictures of the page that show nothing."""
        script = """[...document.images]
            .filter(i => !(i.complete && i.naturalWidth > 0))
            .map(i => i.src.slice(0, 80))"""
        return list(self.evaluate(script))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for a test, which is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium here (`apt-get install chromium`)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(executable, profile)
        try:
            yield browser
        finally:
            browser.close()
