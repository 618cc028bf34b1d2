"""install.py: every state that it can meet, in real virtual environments."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import installing
import pytest
from comfy_server import NOT_SHIPPED
from installing import RAISING, ROOT, Python, base_python, foreign_wheel, launcher_wheel, make_pack, our_wheel, pack, python, result

__all__ = ["base_python", "pack", "python"]  # fixtures
UV = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))


def test_installs_both_then_has_nothing_to_do(python, pack):
    first = python.install(pack)
    assert (first["outcome"], first["code"], first["launcher"]) == ("installed", 0, {"version": "3.0.0", "why": ""})
    assert python.version() == "3.0.0"
    assert first["installed"]["ours"] and first["python"] == python.exe
    before = {path: path.stat().st_mtime_ns for path in python.site.glob("sageattention*")}
    start = time.monotonic()
    second = python.install(pack)
    assert time.monotonic() - start < 3 * installing.TIMES
    assert (second["outcome"], second["message"]) == ("current", "sageattention 3.0.0 is up to date.")
    assert before == {path: path.stat().st_mtime_ns for path in python.site.glob("sageattention*")}
    assert result(pack)["outcome"] == "current"
    assert not list(python.site.glob(".sageattention*")) and not list(python.site.glob("sageattention*.pth"))


def test_pip_knows_what_was_installed(python, pack):
    python.install(pack)
    shown = python("import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', 'show', '-f', 'sageattention'])").stdout
    assert "Version: 3.0.0" in shown and "__main__.py" in shown
    assert "No broken requirements" in python("import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', 'check'])").stdout
    gone = python.install(pack, "--uninstall")
    assert (gone["outcome"], gone["code"]) == ("uninstalled", 0)
    assert python.version() is None and not list(python.site.glob("sageattention*"))
    assert "Nothing of this pack" in python.install(pack, "--uninstall")["message"]


def test_a_release_is_brought_up_to_the_next(python, pack, tmp_path):
    """Installed by pip, as release 3.0.0 did; then by this one."""
    for wheel in (our_wheel(tmp_path), launcher_wheel(tmp_path)):
        subprocess.run([python.exe, "-m", "pip", "install", "--no-deps", "--no-index", "-q", str(wheel)], check=True)
    next_pack = make_pack(tmp_path / "next", version="3.1.0")
    done = python.install(next_pack)
    assert (done["outcome"], done["launcher"]) == ("installed", {"version": "3.1.0", "why": ""})
    assert python.version() == "3.1.0"
    assert sorted(p.name for p in python.site.glob("sageattention*.dist-info")) == [
        "sageattention-3.1.0.dist-info", "sageattention_launcher-3.1.0.dist-info"]  # fmt: skip
    assert python.install(next_pack)["message"] == "sageattention 3.1.0 is up to date."
    assert python.install(pack)["outcome"] == "kept-newer"


def test_a_release_without_launchers_yet_takes_the_old_one_out(python, tmp_path):
    """The launcher is locked to its version."""
    python.install(make_pack(tmp_path / "first"))
    done = python.install(make_pack(tmp_path / "next", version="3.1.0", launcher=False))
    assert (done["outcome"], done["launcher"]["version"]) == ("installed", None) and "ctypes" in done["launcher"]["why"]
    assert not list(python.site.glob("sageattention_launcher*"))


def test_a_newer_one_of_ours_is_kept_unless_asked(python, pack, tmp_path):
    python.put(our_wheel(tmp_path, "3.10.0"))
    kept = python.install(pack)
    assert kept["outcome"] == "kept-newer" and "3.10.0" in kept["message"]
    assert python.version() == "3.10.0"
    assert python.install(pack, "--replace")["outcome"] == "installed"
    assert python.version() == "3.0.0"


def test_another_build_of_the_same_version_is_replaced(python, pack, tmp_path):
    python.put(our_wheel(tmp_path, note="old = True\n"))
    assert python.install(pack)["outcome"] == "installed"
    assert "old" not in (python.site / "sageattention" / "__init__.py").read_text()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("")], ids=["missing", "truncated"])
def test_a_damaged_one_of_ours_is_repaired(python, pack, damage):
    python.install(pack)
    damage(python.site / "sageattention" / "__main__.py")
    assert python.install(pack)["outcome"] == "installed"
    assert (python.site / "sageattention" / "__main__.py").read_text() == installing.DOCTOR


def test_a_healthy_foreign_one_is_left_alone(python, pack, tmp_path):
    python.put(foreign_wheel(tmp_path))
    left = python.install(pack)
    assert (left["outcome"], left["code"]) == ("kept-foreign", 0)
    assert left["installed"]["healthy"] and "2.2.0+cu130torch2.9" in left["message"]
    assert python.version() == "foreign"
    assert left["launcher"]["version"] == "3.0.0"  # serves the nodes' own package
    python.install(pack, "--uninstall")
    assert python.version() == "foreign"


def test_a_foreign_one_is_imported_once_as_long_as_nothing_changes(python, pack, tmp_path):
    slow = "import pathlib\nwith open(pathlib.Path(__file__).parent / 'count.txt', 'a') as f: f.write('x')\n"
    python.put(foreign_wheel(tmp_path, code=slow + installing.HEALTHY))
    counts = []
    for _ in range(3):
        assert python.install(pack)["outcome"] == "kept-foreign"
        counts.append(len((python.site / "sageattention" / "count.txt").read_text()))
    assert counts[1:] == counts[1:2] * 2


def test_a_talkative_one_is_healthy(python, pack, tmp_path):
    talk = "import atexit\nprint('hello', end='')\natexit.register(print, 'bye')\n"
    python.put(foreign_wheel(tmp_path, code=talk + installing.HEALTHY))
    assert python.install(pack)["outcome"] == "kept-foreign"


@pytest.mark.parametrize(
    ("code", "cause"),
    [(RAISING, "DLL load failed while importing _fused"), ("import os\nos._exit(3)\n", "code 3"), ("import nosuchmodule\n", "nosuchmodule"),
     ("x = 1\n", "sageattn")],
    ids=["dll", "dies", "dependency", "no_sageattn"],
)  # fmt: skip
def test_a_broken_foreign_one_is_named_with_its_cause(python, pack, tmp_path, code, cause):
    python.put(foreign_wheel(tmp_path, code=code))
    told = python.install(pack)
    assert (told["outcome"], told["code"]) == ("broken-foreign", 0)
    assert cause in told["message"] and "--replace" in told["message"] and str(python.site) in told["message"]
    assert cause in told["installed"]["cause"] and told["installed"]["healthy"] is False
    assert (python.site / "sageattention" / "core.py").exists()  # untouched


def test_a_broken_foreign_one_is_replaced_where_asked(python, pack, tmp_path):
    python.put(foreign_wheel(tmp_path, code=RAISING))
    done = python.install(pack, "--replace")
    assert (done["outcome"], done["code"]) == ("installed", 0)
    assert python.version() == "3.0.0"
    assert [p.name for p in python.site.glob("sageattention-*.dist-info")] == ["sageattention-3.0.0.dist-info"]
    assert not (python.site / "sageattention" / "core.py").exists()


@pytest.mark.parametrize("left", ["empty dist-info", "capitals"])
def test_odd_metadata(python, pack, tmp_path, left):
    python.put(foreign_wheel(tmp_path))
    info = python.site / "sageattention-2.2.0+cu130torch2.9.dist-info"
    if left == "empty dist-info":  # what an interrupted pip leaves
        for file in info.iterdir():
            file.unlink()
        told = python.install(pack, "--replace")
        assert (told["outcome"], told["code"]) == ("bundled-only", 1) and "remove it as it came" in told["message"]
        return
    (info / "RECORD").write_text((info / "RECORD").read_text().replace("sageattention-2.2.0", "SageAttention-2.2.0"))
    info.rename(python.site / "SageAttention-2.2.0+cu130torch2.9.dist-info")
    assert python.install(pack, "--replace")["outcome"] == "installed"
    assert not [entry for entry in os.listdir(python.site) if entry.startswith("SageAttention")]


def test_a_damaged_launcher_in_the_pack(python, pack):
    next((pack / "wheels").glob("sageattention_launcher-*.whl")).write_bytes(b"version https://git-lfs.example/spec/v1")
    told = python.install(pack)
    assert (told["outcome"], told["code"], told["launcher"]["version"]) == ("installed", 0, None)
    assert "not the wheel of the index" in told["launcher"]["why"]
    assert python.version() == "3.0.0"


def test_a_folder_without_metadata_is_foreign(python, pack, tmp_path):
    (python.site / "sageattention").mkdir()
    (python.site / "sageattention" / "__init__.py").write_text(installing.HEALTHY)
    kept = python.install(pack)
    assert kept["outcome"] == "kept-foreign" and "without metadata" in kept["message"]
    assert python.install(pack, "--replace")["outcome"] == "installed"
    assert python.version() == "3.0.0"


@pytest.mark.parametrize("options", [{"code": RAISING}, {"doctor": "raise SystemExit(2)\n"}, {"doctor": "print('no json')\n"}])
def test_a_new_one_that_does_not_work_is_rolled_back(python, tmp_path, options):
    python.put(our_wheel(tmp_path, "2.9.0"))
    bad = make_pack(tmp_path / "ComfyUI" / "custom_nodes" / "pack", **options)
    told = python.install(bad)
    assert (told["outcome"], told["code"]) == ("bundled-only", 0)
    assert "taken out again" in told["message"] and "nodes work all the same" in told["message"]
    assert python.version() == "2.9.0"
    assert not list(python.site.glob(".sageattention*")) and not list(python.site.glob("sageattention*.pth"))
    assert python.install(bad, "--replace")["code"] == 1  # was asked for, and failed


def test_a_foreign_one_comes_back_when_the_new_one_does_not_work(python, tmp_path):
    python.put(foreign_wheel(tmp_path))
    bad = make_pack(tmp_path / "ComfyUI" / "custom_nodes" / "pack", code=RAISING)
    assert python.install(bad, "--replace")["outcome"] == "bundled-only"
    assert python.version() == "foreign" and (python.site / "sageattention-2.2.0+cu130torch2.9.dist-info" / "RECORD").exists()


def test_a_launcher_that_does_not_import_is_taken_out_alone(python, pack):
    for old in (pack / "wheels").glob("sageattention_launcher*"):
        old.unlink()
    launcher_wheel(pack / "wheels", code="raise ImportError('undefined symbol: PyFoo')\n")
    installing.build.write_index(pack / "wheels", [])
    told = python.install(pack)
    assert told["outcome"] == "installed" and told["code"] == 0
    assert told["launcher"]["version"] is None and "PyFoo" in told["launcher"]["why"]
    assert python.version() == "3.0.0"


def test_a_stale_launcher_does_not_stay_without_a_successor(python, tmp_path):
    python.put(launcher_wheel(tmp_path, "2.9.0"))
    told = python.install(make_pack(tmp_path / "pack", launcher=False))
    assert told["launcher"]["version"] is None and "ctypes" in told["launcher"]["why"]
    assert not list(python.site.glob("sageattention_launcher*"))


def test_dry_run_and_print_change_nothing(python, pack):
    plan = python.install(pack, "--dry-run")
    assert "Would install sageattention-3.0.0-py3-none-any.whl" in plan["message"]
    commands = python.install(pack, "--print")["message"].splitlines()
    assert commands[0].startswith(f'"{python.exe}"') and "install.py" in commands[0] and "--wheel" in commands[0]
    assert len(commands) == 3 and all(c.startswith(f'"{python.exe}" -m pip') and "--no-deps" in c for c in commands[1:])
    assert not list(python.site.glob("*sageattention*"))
    assert not (pack.parent.parent / "user").exists()


def test_the_printed_commands_install(python, pack):
    for command in python.install(pack, "--print")["message"].splitlines():
        subprocess.run(command if os.name == "nt" else shlex.split(command), check=True, capture_output=True)
    assert python.version() == "3.0.0"
    assert python.install(pack)["message"] == "sageattention 3.0.0 is up to date."


def test_the_pack_itself_stays_as_it_is(python, pack):
    before = sorted(path.relative_to(pack) for path in pack.rglob("*"))
    python.install(pack)
    assert before == sorted(path.relative_to(pack) for path in pack.rglob("*"))


def test_result_goes_where_the_manager_says(python, tmp_path):
    alone = make_pack(tmp_path / "somewhere")
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    python.install(alone, COMFYUI_FOLDERS_BASE_PATH=str(base))
    assert (base / "user" / "__sageattention" / "install.json").is_file()


def _without_privilege() -> tuple[str, ...]:
    """Root may write anywhere, unless it gives up the right to."""
    if os.getuid():
        return ()
    if not shutil.which("setpriv"):
        pytest.skip("running as root, and there is no setpriv to give that up")
    return ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@pytest.mark.skipif(os.name == "nt", reason="permissions of Unix")
def test_read_only_site_packages(python, pack):
    mode = python.site.stat().st_mode
    python.site.chmod(0o555)
    try:
        told = python.install(pack, prefix=_without_privilege())
    finally:
        python.site.chmod(mode)
    assert (told["outcome"], told["code"]) == ("bundled-only", 0)
    assert f"{python.site} can't be written" in told["message"] and "nodes work all the same" in told["message"]


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_other_pythons_with_pip(tmp_path, pack, version):
    base = installing.python_of(version)
    if base is None:
        pytest.skip(f"there is no Python {version} on this machine")
    other = Python(tmp_path / "env", base)
    tag = f"cp{version.replace('.', '')}"
    launcher_wheel(pack / "wheels", tag=f"{tag}-{tag}-{installing.PLATFORM}")
    installing.build.write_index(pack / "wheels", [])
    done = other.install(pack)
    assert (done["outcome"], done["launcher"]) == ("installed", {"version": "3.0.0", "why": ""})
    assert other.version() == "3.0.0" and done["torch"] is None


@pytest.mark.skipif(UV is None, reason="there is no uv on this machine")
def test_neither_pip_nor_uv_is_needed_and_uv_knows_what_was_installed(tmp_path, pack):
    """A Python as uv and Stability Matrix make it."""
    bare = Python(tmp_path / "env", pip=False)
    done = bare.install(pack, PATH=str(tmp_path))
    assert (done["outcome"], done["launcher"]["version"]) == ("installed", "3.0.0"), done
    assert bare.version() == "3.0.0"

    def uv(*arguments: str) -> str:
        command = [UV, "pip", *arguments, "--python", bare.exe]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "sageattention==3.0.0" in uv("freeze") and "sageattention-launcher==3.0.0" in uv("freeze")
    uv("uninstall", "sageattention", "sageattention-launcher")
    assert not list(bare.site.glob("*sageattention*"))
    assert bare.install(pack, PATH=str(tmp_path))["outcome"] == "installed"
    assert bare.install(pack, "--uninstall", PATH=str(tmp_path))["code"] == 0
    assert not list(bare.site.glob("*sageattention*"))


KILLER = """
import os, runpy, signal, sys
left = int(sys.argv[1])
def hook(event, args):
    global left
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and "sageattention" in str(args[0]) and SITE in str(args[0]):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
sys.addaudithook(hook)
sys.argv = ["install.py"]
sys.path[0] = os.getcwd()
runpy.run_path("install.py", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with a signal of Unix")
@pytest.mark.parametrize("old", ["ours", "none"])
def test_killed_at_any_write_leaves_the_old_or_the_new_one(python, tmp_path, old):
    """Every write of install.py under site-packages is a place to die."""
    pack = make_pack(tmp_path / "pack", launcher=False)
    older = our_wheel(tmp_path, "2.9.0")
    script = KILLER.replace("SITE", repr(str(python.site)))
    seen = []
    for place in range(100):
        python.clean()
        if old == "ours":
            python.put(older)
        command = [python.exe, "-c", script, str(place)]
        child = subprocess.run(command, cwd=pack, capture_output=True, text=True, timeout=120)
        seen.append(python.version())
        assert seen[-1] in ("2.9.0" if old == "ours" else None, "3.0.0"), (place, seen)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
        if place % 5 == 0:  # the next run takes back what was left half done, and completes
            assert python.install(pack)["outcome"] in ("installed", "current")
        assert python.version() in (seen[-1], "3.0.0")
    else:
        pytest.fail("install.py never ended")
    assert len(seen) > 8 and seen[0] != "3.0.0" and seen[-1] == "3.0.0"


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_two_at_once(python, pack):
    work = python.site / ".sageattention-install"
    work.mkdir()
    holder = (
        "import fcntl, sys, time\nf = open(sys.argv[1], 'a+b'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(work / "lock")], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        told = python.install(pack)
        child.kill()
    assert told["outcome"] == "bundled-only" and "Another install is running" in told["message"]
    assert python.install(pack)["outcome"] == "installed"


def test_the_real_package(python, tmp_path):
    """The package of this checkout, in a Python without torch; and nothing to do is done in a moment, though all is hashed."""
    pack = tmp_path / "pack"
    shutil.copytree(ROOT, pack, ignore=NOT_SHIPPED)
    version = installing.build.project()["version"]
    done = python.install(pack)
    assert done["outcome"] == "installed", done
    assert python.version() == version
    doctor = subprocess.run([python.exe, "-m", "sageattention", "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert doctor.returncode == 0 and "torch" in doctor.stdout
    start = time.monotonic()
    assert python.install(pack)["outcome"] == "current"
    assert time.monotonic() - start < 3 * installing.TIMES
    image = next((python.site / "sageattention" / "kernels").glob("sm_90a/*.xz"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    assert python.install(pack)["outcome"] == "installed"
    data[len(data) // 2] ^= 1
    assert image.read_bytes() == data


def test_install_py_is_stdlib_only_and_has_no_shell():
    for file in (ROOT / "install.py", *(ROOT / "installer").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        assert names <= {*sys.stdlib_module_names, "installer"}, file
        assert not any(isinstance(n, ast.keyword) and n.arg == "shell" for n in ast.walk(tree))
        assert not any(isinstance(n, ast.Attribute) and n.attr in ("system", "popen") for n in ast.walk(tree))
        assert not any(isinstance(n, ast.ExceptHandler) and n.type is None for n in ast.walk(tree))
    sources = [*(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py", ROOT / "prestartup_script.py"]
    for source in sources:
        found = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        imported = [alias.name for n in found if isinstance(n, (ast.Import, ast.ImportFrom)) for alias in n.names]
        assert not {"install", "installer", "subprocess", "urllib"} & {name.split(".")[0] for name in imported}, source
