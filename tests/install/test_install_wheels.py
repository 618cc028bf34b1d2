"""The wheels: what the package's and the launchers' hold, that they are reproducible, and that the index is theirs."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import installing
import pytest
from installing import ROOT, launcher_wheel, our_wheel, sha256

from installer import KEYWORD
from installer.wheel import FIXED_TIME, Bundle

build = installing.build


def test_the_packages_wheel_is_reproducible_and_complete(tmp_path):
    first, second = Bundle().bring(tmp_path / "1"), Bundle().bring(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()
    assert first.name == f"sageattention-{build.project()['version']}-py3-none-any.whl"
    with zipfile.ZipFile(first) as wheel:
        names = wheel.namelist()
        assert {entry.date_time for entry in wheel.infolist()} == {FIXED_TIME}
        wheel.extractall(tmp_path / "site")
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sageattention").rglob("*.py")}
    kernels = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "sageattention" / "kernels").rglob("*") if path.suffix in (".xz", ".json")
    }
    assert {name for name in names if ".dist-info/" not in name} == code | kernels
    assert {name.split("/", 1)[1] for name in names if ".dist-info/" in name} == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    (found,) = importlib.metadata.distributions(name="sageattention", path=[str(tmp_path / "site")])
    for file in found.files:
        assert file.size is None or (file.locate().stat().st_size == file.size and sha256(file.locate()) == _hex(file.hash.value))


def test_its_metadata_is_pyprojects(tmp_path):
    """Which install.py reads without a reader of TOML, as Python 3.10 has none."""
    table = build.project()
    metadata = importlib.metadata.Distribution.at(_unpacked(tmp_path)).metadata
    fields = {"Name": "name", "Version": "version", "Summary": "description", "License-Expression": "license",
              "Requires-Python": "requires-python"}  # fmt: skip
    assert {name: metadata[name] for name in fields} == {name: table[key] for name, key in fields.items()}
    assert metadata["Keywords"] == KEYWORD and KEYWORD in table["keywords"] and not table["dependencies"]


def _unpacked(folder):
    with zipfile.ZipFile(Bundle().bring(folder)) as wheel:
        wheel.extractall(folder / "site")
    return next((folder / "site").glob("*.dist-info"))


@pytest.mark.parametrize("client", ["pip", "uv"])
def test_pip_and_uv_install_it(tmp_path, client):
    """By hand, as `--print` shows it."""
    wheel = tmp_path / Path(run([sys.executable, ROOT / "install.py", "--wheel", tmp_path]).strip()).name
    assert build.project()["version"] in wheel.name
    uv = shutil.which("uv", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if client == "uv" and uv is None:
        pytest.skip("there is no uv on this machine")
    command = [sys.executable, "-m", "pip", "install"] if client == "pip" else [uv, "pip", "install", "--python", sys.executable]
    run([*command, "--no-index", "--no-deps", "-q", "--target", tmp_path / "site", wheel])
    (found,) = importlib.metadata.distributions(name="sageattention", path=[str(tmp_path / "site")])
    assert found.version == build.project()["version"] and (tmp_path / "site" / "sageattention" / "kernels" / "manifest.json").is_file()


def run(command) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, encoding="utf-8", cwd=ROOT.parent).stdout


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, ROOT / "install.py", "--wheel", tmp_path / "file" / "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "file" in done.stderr and "Traceback" not in done.stderr


def _hex(value: str) -> str:
    return base64.urlsafe_b64decode(value + "=").hex()


def test_the_index_is_of_one_release_and_small(tmp_path, monkeypatch):
    wheel = our_wheel(tmp_path)
    launcher = launcher_wheel(tmp_path)
    data = json.loads(build.write_index(tmp_path, ["https://example.invalid/v3/"]).read_text())["wheels"]
    assert {entry["file"]: (entry["sha256"], entry["size"]) for entry in data} == {
        path.name: (sha256(path), path.stat().st_size) for path in (wheel, launcher)
    }
    assert data[0]["urls"] == [f"https://example.invalid/v3/{data[0]['file']}"]
    monkeypatch.setattr(build, "LIMIT", 100)
    with pytest.raises(build.BuildError, match="limit"):
        build.write_index(tmp_path, [])
    our_wheel(tmp_path, "3.0.1")
    with pytest.raises(build.BuildError, match="several releases"):
        build.write_index(tmp_path, [])


def test_one_command_replaces_the_folder(tmp_path):
    old, built = launcher_wheel(tmp_path / "out", "2.0.0"), launcher_wheel(tmp_path / "built", build.project()["version"])
    assert build.main(["--no-build", "--add", str(built.parent), "--out", str(old.parent)]) == 0
    assert [path.name for path in old.parent.glob("*.whl")] == [built.name]
    assert build.faults(old.parent) == [] and build.main(["--check", "--out", str(old.parent)]) == 0


def test_check_sees_what_is_wrong(tmp_path):
    wheel = launcher_wheel(tmp_path, build.project()["version"])
    build.write_index(tmp_path, [])
    assert build.faults(tmp_path) == []
    data = wheel.read_bytes()
    wheel.write_bytes(data[:-1])
    assert any("not the wheel" in fault for fault in build.faults(tmp_path))
    wheel.unlink()
    assert any("not there" in fault for fault in build.faults(tmp_path))
    wheel.write_bytes(data)
    our_wheel(tmp_path)
    assert any("not listed" in fault for fault in build.faults(tmp_path))
    old = launcher_wheel(tmp_path / "old", "1.0.0").parent
    build.write_index(old, [])
    assert any("build the wheels again" in fault for fault in build.faults(old)) and build.main(["--check", "--out", str(old)]) == 1


def test_the_folder_of_this_checkout_is_consistent():
    """Its version may be an older one between releases; the publishing workflow checks that too."""
    found = [fault for fault in build.faults(ROOT / "wheels") if "build the wheels again" not in fault]
    assert found == []
    wheels = list((ROOT / "wheels").glob("*.whl"))
    assert wheels and all("launcher" in path.name and path.stat().st_size < 1 << 20 for path in wheels)


@pytest.mark.parametrize("target", build.launcher_cross.TARGETS)
def test_a_launcher_wheel(tmp_path, target):
    missing = [name for name in ("pybind11", "ziglang") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)} (dev.py wheels installs them)")
    wheel = build.build_launcher(sys.executable, target, tmp_path)
    assert wheel.stat().st_size < 1 << 20
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = target.replace("manylinux", r"manylinux_2_(17|28)")
    assert re.fullmatch(rf"sageattention_launcher-[\d.]+-{python}-{python}-{platform}\.whl", wheel.name)
    assert build.build_launcher(sys.executable, target, tmp_path / "again").read_bytes() == wheel.read_bytes()
    (tmp_path / "site").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (file,) = (path for path in (tmp_path / "site").iterdir() if path.is_file())
    module = file.read_bytes()
    assert str(ROOT).encode() not in module and b"/tmp/" not in module
    if target == "win_amd64":
        libraries = set(re.findall(rb"[\w.-]+\.dll", module))
        assert f"python3{sys.version_info[1]}.dll".encode() in libraries
        assert all(re.match(rb"python3\d+|KERNEL32|api-ms-win-crt-", name) for name in libraries), libraries
        return
    libraries = set(re.findall(rb"[\w.+-]+\.so(?:\.\d+)+", module))
    assert not {name for name in libraries if name.startswith((b"libcuda", b"libtorch", b"libpython", b"libstdc++"))} - {b"libcuda.so.1"}
    if target == f"manylinux_{os.uname().machine}":
        code = "import sys; sys.path.insert(0, sys.argv[1])\nimport sageattention_launcher as l; print(l.__version__, l.open('no-such'))"
        assert run([sys.executable, "-c", code, file.parent]).strip() == f"{build.project()['version']} no-such can't be opened"


def test_the_names_that_an_object_file_expects_of_python():
    """Of a COFF file with a short and a long undefined name, one that is defined, and one with an auxiliary record."""

    def symbol(name: bytes, section: int, auxiliary: int = 0) -> bytes:
        return struct.pack("<8sIhHBB", name, 0, section, 0, 2, auxiliary) + bytes(18 * auxiliary)

    long = struct.pack("<II", 0, 4)
    table = symbol(b"Py_Main", 1) + symbol(b".text", 0, 1) + symbol(b"_Py_Id", 0) + symbol(long, 0) + symbol(b"malloc", 0)
    header = struct.pack("<HHIIIHH", 0x8664, 0, 0, 20, len(table) // 18, 0, 0)
    names = b"__imp_PyExc_TypeError\0"
    assert build.launcher_cross.python_symbols(header + table + struct.pack("<I", 4 + len(names)) + names) == ["PyExc_TypeError", "_Py_Id"]


def test_build_errors_are_told(tmp_path, monkeypatch, capsys):
    nobody = tmp_path / "python"
    with pytest.raises(build.BuildError, match="does not answer"):
        build.headers(str(nobody))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="pybind11, ziglang"):
        build.build_launcher(sys.executable, "win_amd64", tmp_path)
    assert build.main(["--python", sys.executable, "--out", str(tmp_path)]) == 1
    assert "need pybind11" in capsys.readouterr().err and not list(tmp_path.glob("*.whl"))
