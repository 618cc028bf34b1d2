"""What every test run shares: which marked tests can run here, and a torch that is quick on few cores."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import browser
import pytest

collect_ignore = ["../__init__.py"]  # the node pack's entry is ComfyUI's to import, not pytest's
if os.name != "nt":
    collect_ignore.append("install/test_windows.py")  # `dev.py windows` runs it under wine
CLIENTS = Path(os.environ.get("CLIENTS", Path(__file__).resolve().parent.parent / ".clients"))
LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available() or hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # small tensors, or many workers: a second thread costs more in waiting than it computes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that this machine has nothing to run on; `pytest_terminal_summary` says how many."""
    missing = {
        "gpu": "" if _has_gpu() else "need an NVIDIA GPU",
        "alone": "need the machine for themselves (run without -n)" if hasattr(config, "workerinput") else "",
        "comfyui": "" if os.environ.get("COMFYUI_PATH") else "need COMFYUI_PATH",
        "browser": "" if browser.CHROMIUM and browser.DRIVER else "need Chromium and ChromeDriver",
        "comfy_clients": "" if os.environ.get("COMFY_CLIENTS") else "need COMFY_CLIENTS",
        "clients": "" if (CLIENTS / "diffusers").is_dir() else "need the programs of requirements-clients.txt (dev.py test gets them)",
    }
    kept, left_out, counts = [], [], config.stash[LEFT_OUT]
    for item in items:
        why = next((reason for marker, reason in missing.items() if reason and item.get_closest_marker(marker)), "")
        (left_out if why else kept).append(item)
        counts[why] += bool(why)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # under xdist a worker collects, and the main process reports
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    counts = getattr(node, "workeroutput", {}).get("left_out")
    if counts is not None:
        node.config.stash[LEFT_OUT] = Counter(counts)  # every worker collects all


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    told = ", ".join(f"{count:,} {why}" for why, count in config.stash[LEFT_OUT].items() if count)
    if told:
        terminalreporter.write_line(f"left out here: {told}")


# What the package remembers between calls, by module.
MEMOS = {
    "settings": ["read"],
    "device.capability": ["of_device"],
    "planning.calibration": ["of_card"],
    "planning.verdicts": ["_known"],
    "planning.rules": ["table"],
    "planning.plan": ["plan"],
    "planning.sparse_plan": ["sparse_plan"],
    "planning.here": ["_absent", "_told"],
    "verify": ["_given_up"],
    "dispatch": ["_prepared", "_ran"],
    "backends.cuda.workspace": ["launch_plan_of", "resident_plan_of"],
    "backends.cuda.route": ["route_plan_of"],
}


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """No test sees what another one planned: under another environment, another card, or with images missing. A test may forget, too."""
    _forget()
    return _forget


def _forget() -> None:
    copies = [name for name in sys.modules if name == "sageattention" or name.endswith(".sageattention")]  # the pack has one of its own
    for module, names in ((sys.modules.get(f"{copy}.{place}"), names) for copy in copies for place, names in MEMOS.items()):
        for memo in (getattr(module, name) for name in names if module):
            memo.clear() if isinstance(memo, (dict, set)) else memo.cache_clear()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
