"""dev.py: when it sets up its environment, what it runs, how it fails – without downloading anything."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / "dev.py"


@pytest.fixture
def dev(monkeypatch, tmp_path):
    """dev.py as a module whose environment is in a temporary folder; `dev.commands` records what it would run."""
    spec = importlib.util.spec_from_file_location("dev_under_test", DEV)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp")
    monkeypatch.setattr(module, "CLIENTS", tmp_path / ".clients")
    module.commands, module.codes = [], {}

    def call(command, **options):
        module.commands.append(command)
        if "venv" in command:
            module.venv_python().parent.mkdir(parents=True)
            module.venv_python().write_text("")
        return next((code for word, code in module.codes.items() if word in command), 0)

    monkeypatch.setattr(module.subprocess, "call", call)
    return module


def ran(dev, word: str) -> list[list[str]]:
    return [command for command in dev.commands if word in command]


def test_first_run_installs_and_the_second_does_not(dev):
    python = dev.environment()
    assert python == str(dev.venv_python())
    assert len(ran(dev, "venv")) == 1
    assert str(dev.REQUIREMENTS) in ran(dev, "pip")[0]
    dev.commands.clear()
    assert dev.environment() == python
    assert dev.commands == []


def test_the_tests_get_the_programs_that_call_the_package_once(dev, monkeypatch):
    dev.codes["--target"] = 1  # no network
    assert dev.test(False, []) == 0 and not dev.CLIENTS.exists()
    del dev.codes["--target"]
    dev.CLIENTS.mkdir()
    dev.commands.clear()
    monkeypatch.setattr(dev.shutil, "rmtree", lambda *args, **kwargs: None)
    for _ in range(2):
        assert dev.test(False, ["-x"]) == 0
    assert len(ran(dev, "--target")) == 1 and "--no-deps" in ran(dev, "--target")[0]
    dev.commands.clear()
    assert dev.test(True, []) == 0 and not ran(dev, "pip")


def test_changed_requirements_install_again_into_the_same_environment(dev, monkeypatch, tmp_path):
    dev.environment()
    dev.commands.clear()
    other = tmp_path / "requirements.txt"
    other.write_text("torch==9.9\n")
    monkeypatch.setattr(dev, "REQUIREMENTS", other)
    dev.environment()
    assert not ran(dev, "venv")
    assert ran(dev, "pip")


def test_a_failed_installation_is_tried_again(dev):
    dev.codes["pip"] = 1
    with pytest.raises(dev.Failed, match="installing the pinned packages failed"):
        dev.environment()
    dev.codes.clear()
    dev.commands.clear()
    dev.environment()
    assert ran(dev, "pip")


def test_without_ensurepip_it_says_what_to_install(dev, monkeypatch):
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    with pytest.raises(dev.Failed, match="python3-venv"):
        dev.environment()


def test_without_ensurepip_it_uses_uv(dev, monkeypatch):
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dev.shutil, "which", lambda name: "/usr/bin/uv")
    dev.environment()
    assert dev.commands[0][:2] == ["uv", "venv"]


def test_here_installs_nothing_and_passes_arguments_on(dev, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dev.py", "test", "--here", "-n", "0", "-k", "inputs"])
    assert dev.main() == 0
    assert dev.commands == [[sys.executable, "-m", "pytest", "-n", "0", "-k", "inputs"]]


CLANG_FORMAT = "import clang_format; clang_format.clang_format()"


def test_lint_fails_where_one_of_its_checks_does(dev, monkeypatch):
    """And runs them all, mypy on the pack under a name that is a module's."""
    monkeypatch.setattr(sys, "argv", ["dev.py", "lint", "--here"])
    for code, failing in ((0, "nothing"), (1, "ruff"), (1, "installer"), (1, "-Werror")):
        dev.commands.clear()
        dev.codes.clear()
        dev.codes[failing] = 1
        assert dev.main() == code and [command[2] for command in dev.commands] == ["ruff", "mypy", "mypy", CLANG_FORMAT]
    assert any(source.endswith("attend_mma.cuh") for source in dev.commands[3])
    assert dev.commands[1][-1].endswith(str(Path("pack", "nodes")))


def test_tests_share_the_cores_where_xdist_is_there(dev, monkeypatch):
    monkeypatch.setattr(dev.os, "cpu_count", lambda: 2)
    dev.test(True, ["-x"])
    assert dev.commands[-1] == [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-x"]
    dev.codes["-c"] = 1  # the probe for xdist finds nothing
    dev.test(True, ["-x"])
    assert dev.commands[-1] == [sys.executable, "-m", "pytest", "-x"]


def test_the_exit_code_is_the_commands(dev, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dev.py", "test", "--here"])
    dev.codes["pytest"] = 5
    assert dev.main() == 5


def test_comfyui_python(dev, monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(dev.Failed, match="COMFYUI_PYTHON"):
        dev.comfyui_python(str(tmp_path), here=False)
    assert dev.comfyui_python(str(tmp_path), here=True) == sys.executable
    own = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert dev.comfyui_python(str(tmp_path), here=False) == str(own)
    monkeypatch.setenv("COMFYUI_PYTHON", "chosen")
    assert dev.comfyui_python(str(tmp_path), here=True) == "chosen"


def test_an_old_python_is_told(dev, monkeypatch):
    monkeypatch.setattr(dev, "OLDEST", (9, 9))
    with pytest.raises(dev.Failed, match=r"needs Python 9\.9"):
        dev.main()


@pytest.mark.parametrize("of", ["dev", "clients"])
def test_every_requirement_is_pinned(of):
    lines = [line.split("#")[0].strip() for line in (ROOT / f"requirements-{of}.txt").read_text().splitlines()]
    required = [line for line in lines if line and not line.startswith("-")]
    assert required and not [line for line in required if not re.fullmatch(r"[\w.\[\]-]+==[\w.+!]+( *;.*)?", line)]


def test_demo_samples_and_pictures(tmp_path):
    pytest.importorskip("PIL")
    # Not "1": Triton's interpreter, which test_triton.py exercises, would take most of the time
    env = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "tests" / "showcase.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference × 16" in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert 'src="http' not in page and "href=" not in page


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "ok"),
        ({"error": 0.0}, "nothing was quantised"),
        ({"error": 0.5}, "above its bound"),
        ({"ran": {"reference": 15}, "fallbacks": {"why": 1}}, "expected reference × 16"),
    ],
)
def test_demo_verdicts(change, word):
    torch = pytest.importorskip("torch")
    import showcase

    good = {"name": "reference", "latent": torch.zeros(3, 2, 2), "seconds": 0.1, "error": 0.005, "bound": 0.011}
    run = showcase.Run(**(good | {"expected_calls": 16, "ran": {"reference": 16}} | change))
    assert word in run.verdict
