"""prestartup_script.py: the bundled package is found when none is installed, a broken one is named, and start-up is not delayed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from installing import HEALTHY, RAISING, ROOT

RUN = """
import importlib.util, json, logging, sys, types
logging.basicConfig(format="%(message)s", stream=sys.stderr)
user = types.ModuleType("folder_paths")
user.get_user_directory = lambda: {user!r}
sys.modules["folder_paths"] = user
path = list(sys.path)
spec = importlib.util.spec_from_file_location("prestartup", {script!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert sys.path == path and not {{"torch", "sageattention"}} & set(sys.modules)
"""


def start(tmp_path: Path, code: str, installed: Path | None = None) -> subprocess.CompletedProcess:
    """Run the script as ComfyUI does, then `code`; with a folder of installed packages."""
    text = RUN.format(user=str(tmp_path / "user"), script=str(ROOT / "prestartup_script.py")) + code
    command = [sys.executable, "-c", (f"import sys; sys.path.insert(1, {str(installed)!r})\n" if installed else "") + text]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)


def package(folder: Path, code: str) -> Path:
    (folder / "sageattention").mkdir(parents=True)
    (folder / "sageattention" / "__init__.py").write_text(code)
    return folder


def without_ours(code: str) -> str:
    """In a Python that may have sageattention installed, look only where this test put one."""
    return "sys.path = [p for p in sys.path if 'site-packages' not in p]\n" + code


def test_the_bundled_package_where_none_is_installed(tmp_path):
    done = start(tmp_path, without_ours("import sageattention\nprint(sageattention.__file__)\nimport sageattention.variants"))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "sageattention" / "__init__.py"


def test_an_installed_package_wins(tmp_path):
    done = start(tmp_path, "import sageattention\nprint(sageattention.__file__)", package(tmp_path / "site", HEALTHY))
    assert Path(done.stdout.strip()) == tmp_path / "site" / "sageattention" / "__init__.py"


def test_the_flag_is_never_turned_on(tmp_path):
    before = (
        "import sys, types\nargs = types.SimpleNamespace(use_sage_attention=False)\n"
        "sys.modules['comfy.cli_args'] = types.SimpleNamespace(args=args)\nargv = list(sys.argv)\n"
    )
    text = before + RUN.format(user=str(tmp_path), script=str(ROOT / "prestartup_script.py"))
    done = subprocess.run([sys.executable, "-c", text + "assert (args.use_sage_attention, sys.argv) == (False, argv)"], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_no_other_name_is_found(tmp_path):
    done = start(tmp_path, "import importlib.util as i\nprint([i.find_spec(n) for n in ('nodes', 'kernels', 'sageattention3', 'dev')])")
    assert done.stdout.strip() == "[None, None, None, None]", done.stderr


def _result(tmp_path: Path, site: Path, **changes: object) -> None:
    path = site / "sageattention"
    installed = {"path": str(path), "healthy": False, "cause": "ImportError: DLL load failed", "stamp": path.stat().st_mtime_ns}
    file = tmp_path / "user" / "__sageattention" / "install.json"
    file.parent.mkdir(parents=True)
    data = {"python": sys.executable, "installed": installed}
    data = {**data, **{k: v for k, v in changes.items() if k in data}, "installed": {**installed, **changes}}
    file.write_text(json.dumps(data))


def test_a_known_broken_one_is_named_in_one_line(tmp_path):
    site = package(tmp_path / "site", RAISING)
    _result(tmp_path, site)
    done = start(tmp_path, "", site)
    (line,) = done.stderr.strip().splitlines()
    assert str(site / "sageattention") in line and "DLL load failed" in line and "--replace" in line


@pytest.mark.parametrize("changes", [{"healthy": True}, {"stamp": 1}, {"python": "/another/python"}, {"path": "/nowhere"}])
def test_nothing_is_said_of_another_one(tmp_path, changes):
    site = package(tmp_path / "site", HEALTHY)
    _result(tmp_path, site, **changes)
    assert start(tmp_path, "", site).stderr == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"installed": null}', '{"installed": {}}', "\x00"])
def test_a_damaged_result_is_no_obstacle(tmp_path, text):
    file = tmp_path / "user" / "__sageattention" / "install.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = start(tmp_path, "")
    assert (done.returncode, done.stderr) == (0, "")


def test_below_a_millisecond(tmp_path):
    """In a process that has imported what ComfyUI imports first; the best of some, as the machine may be busy."""
    site = package(tmp_path / "site", RAISING)
    _result(tmp_path, site, healthy=True)
    again = (
        "import time\ntimes = []\nfor _ in range(20):\n    begin = time.perf_counter()\n"
        "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n    times.append(time.perf_counter() - begin)\n"
        "print(min(times))"
    )
    assert float(start(tmp_path, again).stdout) < 1e-3
