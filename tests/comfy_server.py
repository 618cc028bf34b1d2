"""Starts a real ComfyUI server that holds the pack, in a base directory of its own, and queues prompts over its HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pack import ROOT

READY_SECONDS, PROMPT_SECONDS = 240, 120
TEXT_EVENT = (3).to_bytes(4, "big")  # of ComfyUI's binary messages
NOT_SHIPPED = shutil.ignore_patterns(".*", "__pycache__", "tests", "csrc", "out", "build", "dist")


class Server:
    """A running server; `log` is what it wrote so far."""

    def __init__(self, url: str, log_file: Path, pack: Path, base: Path) -> None:
        self.url, self.pack, self.base = url, pack, base
        self._log_file = log_file

    @property
    def log(self) -> str:
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def lines(self, prompt: dict[str, Any]) -> list[tuple[str, str]]:
        """Queue a prompt and wait for it; (node, text) of each line that a node was told to show meanwhile, as the front end hears it."""
        return asyncio.run(self._lines(prompt))

    async def _lines(self, prompt: dict[str, Any]) -> list[tuple[str, str]]:
        import aiohttp  # which ComfyUI needs

        heard = []
        async with aiohttp.ClientSession() as session, session.ws_connect(self.url + "/ws") as socket_:
            running = asyncio.get_running_loop().run_in_executor(None, self.outputs, prompt)
            while not running.done():
                with contextlib.suppress(asyncio.TimeoutError):
                    message = await asyncio.wait_for(socket_.receive(), 0.5)
                    if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == TEXT_EVENT:
                        length = int.from_bytes(message.data[4:8], "big")
                        heard.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
            await running
        return heard

    def refusal(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """What the server answers to a prompt that it does not accept: id of a node → its errors."""
        try:
            self.get("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as error:
            assert error.code == 400
            return json.load(error)["node_errors"]
        raise AssertionError("the prompt was accepted")

    def bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def get(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a prompt and wait for it; the `Report` node's findings."""
        return json.loads(self.outputs(prompt)["report"]["text"][0])

    def outputs(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a prompt and wait for it: id of a node → what it shows."""
        prompt_id = self.get("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + PROMPT_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                done = history[prompt_id]
                assert done["status"]["status_str"] == "success", done["status"]
                return done["outputs"]
            time.sleep(0.1)
        raise AssertionError(f"no result after {PROMPT_SECONDS} s:\n{self.log[-3000:]}")


@contextlib.contextmanager
def serving(comfy_path: Path, base: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server in `base` (a new directory), with the pack and the test nodes as custom nodes; stopped at the end."""
    pack = base / "custom_nodes" / "sage-pack"
    shutil.copytree(ROOT, pack, ignore=NOT_SHIPPED)
    shutil.copytree(ROOT / "tests", base / "custom_nodes" / "test-nodes", ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    (base / "custom_nodes" / "test-nodes" / "__init__.py").write_text("from .comfy_test_nodes import NODE_CLASS_MAPPINGS\n")
    for folder in ("models", "output", "input", "temp", "user"):
        (base / folder).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(comfy_path / "main.py"), "--cpu", "--port", str(port), "--disable-api-nodes", "--disable-auto-launch",
               "--base-directory", str(base), "--database-url", "sqlite:///:memory:", *flags]  # fmt: skip
    log_file = base / "log.txt"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command, cwd=base, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        )  # fmt: skip
        try:
            server = Server(f"http://127.0.0.1:{port}", log_file, pack, base)
            _wait(server, process)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{server.log[-3000:]}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            server.get("/system_stats")
            return
        time.sleep(0.25)
    raise AssertionError(f"not ready after {READY_SECONDS} s:\n{server.log[-3000:]}")
