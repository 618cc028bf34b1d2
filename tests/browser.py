"""A headless Chromium, driven by ChromeDriver's own protocol (W3C WebDriver), for which nothing has to be installed in Python."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver") or ""
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
# Without the flags of the third line it asks servers of its maker's for updates, many at a time.
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
    "--disable-dev-shm-usage", "--no-first-run", "--lang=en-US",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip


class Browser:
    """One page. `script` runs JavaScript in it, as the body of an async function."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        _ask(f"{self._session}/url", {"url": url})

    def script(self, body: str, *arguments: Any) -> Any:
        """What `body` returns; it finds `arguments` in the list `args`."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (args) => {{ {body} }})([...arguments].slice(0, -1))"
            ".then(value => done({value: value ?? null}), error => done({error: String(error.stack || error)}));"
        )
        found = _ask(f"{self._session}/execute/async", {"script": wrapped, "args": list(arguments)})
        assert "error" not in found, found["error"]
        return found["value"]

    def wait(self, body: str, *arguments: Any, seconds: float = 60) -> Any:
        """`script`, again until it returns something true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.script(body, *arguments)
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"after {seconds:g} s the page still says no: {body}")

    def click(self, x: float, y: float) -> None:
        """A click of the left button, in pixels of the page."""
        steps = [
            {"type": "pointerMove", "x": int(x), "y": int(y)},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        _ask(f"{self._session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": steps}]})

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(_ask(f"{self._session}/screenshot")))

    def errors(self) -> list[str]:
        """Errors in the page's console since this was last asked."""
        entries = _ask(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def browsing(width: int = 1280, height: int = 800) -> Iterator[Browser]:
    """A browser with a window of that size, closed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            root = f"http://127.0.0.1:{port}"
            _wait(root, driver)
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = f"{root}/session/{_ask(f'{root}/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
            # Of a headless window the frame takes part of the height: what counts is the page's.
            view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            _ask(f"{session}/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": view})
            _ask(f"{session}/timeouts", {"script": 60_000, "pageLoad": 120_000})
            try:
                yield Browser(session)
            finally:
                _ask(session, method="DELETE")
        finally:
            driver.terminate()
            driver.wait(30)


def _wait(root: str, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert driver.poll() is None, f"{DRIVER} ended with {driver.returncode}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if _ask(f"{root}/status")["ready"]:
                return
        time.sleep(0.1)
    raise AssertionError(f"{DRIVER} is not ready after 30 s")


def _ask(url: str, data: Any = None, method: str = "") -> Any:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method or ("POST" if body else "GET"))
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {json.load(error)['value']['message']}") from None
