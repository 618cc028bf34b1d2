"""prestartup_script.py: a healthy installed package wins, ours runs where there is none or it is broken, start-up is not delayed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installing import HEALTHY, RAISING, ROOT, TIMES, build

TORCH = "9.9.0"

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


def start(tmp_path: Path, code: str, installed: Path | None = None, pack: Path = ROOT) -> subprocess.CompletedProcess:
    """Run the script of a pack as ComfyUI does, then `code`; with a folder of installed packages."""
    text = RUN.format(user=str(tmp_path / "user"), script=str(pack / "prestartup_script.py")) + code
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


def test_the_finder_is_gone_from_an_installed_package(tmp_path):
    """Its spec and loader are its own, as without the pack."""
    code = (
        "import sageattention as s\nprint(type(s.__loader__).__name__, type(s.__spec__.loader).__name__, s.__spec__.origin == s.__file__)"
    )
    done = start(tmp_path, code, package(tmp_path / "site", HEALTHY))
    assert done.stdout.split() == ["SourceFileLoader", "SourceFileLoader", "True"] and done.stderr == ""


def test_a_copied_spec_works_too(tmp_path):
    """Tools keep specs; a broken copy is found out only when it is executed."""
    code = (
        "import copy\nspec = copy.copy(importlib.util.find_spec('sageattention'))\nspec.loader = copy.copy(spec.loader)\n"
        "print(spec.loader.get_filename('sageattention') == spec.origin)\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\nprint(module.sageattn(1, 2, 3))"
    )
    done = start(tmp_path, code, package(tmp_path / "site", HEALTHY))
    assert done.stdout.split() == ["True", "1"] and done.stderr == ""


BROKEN = {
    "library": "raise OSError('libcudart.so.12: cannot open shared object file')\n",
    "dll": RAISING,
    "kernel image": "raise RuntimeError('no kernel image')\n",
    "syntax": "def sageattn(:\n",
    "exit": "raise SystemExit(3)\n",
    "base class": "class Odd(Exception):\n    def __str__(self):\n        return 'of\\ntwo lines'\nraise Odd\n",
    "submodule": "from . import core\nfrom .core import nothing\n",
    "no sageattn": "x = 1\n",
}


@pytest.mark.parametrize("how", BROKEN)
def test_ours_runs_where_an_installed_one_cannot_be_imported(tmp_path, how):
    site = package(tmp_path / "site", BROKEN[how])
    (site / "sageattention" / "core.py").write_text("x = 1\n")
    code = (
        "import sageattention, sageattention.variants\nprint(sageattention.__file__, sageattention.variants.__file__, sep='\\n')\n"
        "print([n for n in sys.modules if n == 'sageattention.core' and 'site' in str(sys.modules[n].__file__)])\n"
        "del sys.modules['sageattention']\nimport sageattention\nprint(sageattention.__file__)"
    )
    done = start(tmp_path, code, site)
    assert done.returncode == 0, done.stderr
    ours = str(ROOT / "sageattention" / "__init__.py")
    assert done.stdout.splitlines() == [ours, str(ROOT / "sageattention" / "variants.py"), "[]", ours]
    (line,) = done.stderr.strip().splitlines()
    assert str(site / "sageattention") in line and "--replace" in line and line.isascii()


def test_from_imports_get_ours_too(tmp_path):
    """The forms of ComfyUI and of other packs."""
    code = "from sageattention import sageattn\nprint(sageattn.__module__)\nimport sageattention as s\nprint(s.sageattn is sageattn)"
    done = start(tmp_path, code, package(tmp_path / "site", RAISING))
    assert done.stdout.split() == ["sageattention.api", "True"], done.stderr


def test_where_ours_is_broken_too_it_is_an_import_error(tmp_path):
    """Which ComfyUI forgives without the flag."""
    pack = tmp_path / "pack"
    package(pack, "raise OSError('also ours')\n")
    shutil.copy(ROOT / "prestartup_script.py", pack)
    code = "try:\n    import sageattention\nexcept ImportError as e:\n    print(e.name, e)"
    done = start(tmp_path, code, package(tmp_path / "site", RAISING), pack)
    assert done.stdout.startswith("sageattention sageattention can't be imported, neither from") and "also ours" in done.stdout
    shutil.rmtree(pack / "sageattention")
    done = start(tmp_path, without_ours(code), None, pack)
    assert done.stdout.startswith("sageattention No module named"), done.stderr


@pytest.mark.parametrize("also", ["nothing else", "an installed one"])
def test_a_pack_folder_of_that_name_does_not_shadow_the_package(tmp_path, also):
    """The registry's folder name is `sageattention`, and some packs put custom_nodes on sys.path."""
    nodes = tmp_path / "custom_nodes"
    pack = nodes / "sageattention"
    package(pack, HEALTHY)
    (pack / "__init__.py").write_text("raise RuntimeError('the pack was imported as the package')\n")
    shutil.copy(ROOT / "prestartup_script.py", pack)
    site = package(tmp_path / "site", HEALTHY) if also == "an installed one" else None
    code = f"sys.path.insert(0, {str(nodes)!r})\nimport sageattention\nprint(sageattention.__file__)"
    done = start(tmp_path, code if site else without_ours(code), site, pack)
    assert done.stdout.strip() == str((site or pack) / "sageattention" / "__init__.py"), done.stderr


def test_an_empty_folder_of_that_name_is_no_package(tmp_path):
    (tmp_path / "site" / "sageattention").mkdir(parents=True)
    done = start(
        tmp_path, without_ours(f"sys.path.append({str(tmp_path / 'site')!r})\nimport sageattention\nprint(sageattention.__file__)")
    )
    assert done.stdout.strip() == str(ROOT / "sageattention" / "__init__.py"), done.stderr


def test_two_copies_of_the_pack(tmp_path):
    again = f"spec = importlib.util.spec_from_file_location('again', {str(ROOT / 'prestartup_script.py')!r})\n"
    again += "spec.loader.exec_module(importlib.util.module_from_spec(spec))\nimport sageattention\nprint(sageattention.__file__)"
    done = start(tmp_path, again, package(tmp_path / "site", HEALTHY))
    assert done.stdout.strip() == str(tmp_path / "site" / "sageattention" / "__init__.py"), done.stderr
    done = start(tmp_path, again, package(tmp_path / "other", RAISING))
    assert done.stdout.strip() == str(ROOT / "sageattention" / "__init__.py"), done.stderr


METADATA = "import importlib.metadata as m\ndef version():\n    try:\n        return m.version('sageattention')\n"
METADATA += "    except m.PackageNotFoundError:\n        return None\n"


@pytest.mark.parametrize("installed", [None, HEALTHY, RAISING], ids=["none", "healthy", "broken"])
def test_metadata_is_of_the_one_that_runs(tmp_path, installed):
    """diffusers asks for the distribution's version."""
    site = installed and package(tmp_path / "site", installed)
    code = (
        METADATA
        + "print(version())\nimport sageattention\nprint(version(), [d.version for d in m.distributions() if d.name == 'sageattention'])"
    )
    done = (
        start(tmp_path, without_ours(code), None)
        if site is None
        else start(tmp_path, without_ours(f"sys.path.append({str(site)!r})\n" + code))
    )
    ours = build.project()["version"]
    expected = {None: (ours, f"{ours} ['{ours}']"), HEALTHY: ("None", "None []"), RAISING: ("None", f"{ours} ['{ours}']")}[installed]
    assert tuple(done.stdout.splitlines()) == expected, done.stderr


def _result(tmp_path: Path, site: Path, **changes: object) -> None:
    """What install.py leaves where the import of an installed copy ends Python."""
    path = site / "sageattention"
    installed = {"path": str(path), "healthy": False, "fatal": True, "cause": "the import ends Python with code -11",
                 "stamp": path.stat().st_mtime_ns}  # fmt: skip
    info = site / f"torch-{TORCH}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}\n")
    file = tmp_path / "user" / "__sageattention" / "install.json"
    file.parent.mkdir(parents=True)
    data = {"python": sys.executable, "installed": installed, "torch": TORCH}
    data = {**data, **{k: v for k, v in changes.items() if k in data}, "installed": {**installed, **changes}}
    file.write_text(json.dumps(data))


DIES = "import os\nos._exit(3)\n"


def test_one_known_to_end_python_is_not_imported(tmp_path):
    site = package(tmp_path / "site", DIES)
    _result(tmp_path, site)
    done = start(tmp_path, "import sageattention\nprint(sageattention.__file__)", site)
    assert done.stdout.strip() == str(ROOT / "sageattention" / "__init__.py"), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "ends Python with code -11" in line and str(site / "sageattention") in line


@pytest.mark.parametrize(
    "changes",
    [{"fatal": False}, {"stamp": 1}, {"python": "/another/python"}, {"path": "/nowhere"}, {"torch": "1.0"}, {"cause": None}],
)
def test_another_one_is_imported(tmp_path, changes):
    site = package(tmp_path / "site", HEALTHY)
    _result(tmp_path, site, **changes)
    done = start(tmp_path, "import sageattention\nprint(sageattention.__file__)", site)
    assert (done.stdout.strip(), done.stderr) == (str(site / "sageattention" / "__init__.py"), "")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"installed": null}', '{"installed": {}}', "\x00", '{"installed": 3}'])
def test_a_damaged_result_is_no_obstacle(tmp_path, text):
    file = tmp_path / "user" / "__sageattention" / "install.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = start(tmp_path, "import sageattention\nprint(sageattention.__file__)", package(tmp_path / "site", HEALTHY))
    assert (done.returncode, done.stderr) == (0, "") and str(tmp_path) in done.stdout


def test_below_a_millisecond(tmp_path, monkeypatch):
    """From the second start on, whose bytecode is there; the best of some, as the machine may be busy."""
    again = (
        "import time\ntimes = []\nfor _ in range(20):\n    begin = time.perf_counter()\n"
        "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n    times.append(time.perf_counter() - begin)\n"
        "print(min(times))"
    )
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    assert float(start(tmp_path, again).stdout) < 1e-3 * TIMES
