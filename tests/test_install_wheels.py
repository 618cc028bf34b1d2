"""The wheel build: what the wheels hold, that they are reproducible, and that the index is theirs."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import re
import sys
import zipfile

import installing
import pytest
from installing import ROOT, launcher_wheel, our_wheel, sha256

build = installing.build


def test_the_universal_wheel_is_reproducible_and_complete(tmp_path):
    first, second = build.build_universal(tmp_path / "1"), build.build_universal(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()
    assert first.name == f"sageattention-{build.project()['version']}-py3-none-any.whl"
    with zipfile.ZipFile(first) as wheel:
        names = wheel.namelist()
        assert {entry.date_time for entry in wheel.infolist()} == {build.FIXED_TIME}
        wheel.extractall(tmp_path / "site")
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sageattention").rglob("*.py")}
    kernels = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "sageattention" / "kernels").rglob("*") if path.suffix in (".xz", ".json")
    }
    assert {name for name in names if ".dist-info/" not in name} == code | kernels
    (found,) = importlib.metadata.distributions(name="sageattention", path=[str(tmp_path / "site")])
    assert found.version == build.project()["version"] and not found.requires
    assert "sageattention-node-pack" in found.metadata["Keywords"]
    for file in found.files:
        assert file.size is None or (file.locate().stat().st_size == file.size and sha256(file.locate()) == _hex(file.hash.value))


def _hex(value: str) -> str:
    return base64.urlsafe_b64decode(value + "=").hex()


def test_install_py_knows_our_keyword():
    keyword = re.search(r'^KEYWORD = "([^"]+)"', (ROOT / "install.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert keyword in build.project()["keywords"]


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
    our_wheel(tmp_path, "2.0.0")
    assert build.main(["--pure", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.whl")] == [f"sageattention-{build.project()['version']}-py3-none-any.whl"]
    assert build.faults(tmp_path) == [] and build.main(["--check", "--out", str(tmp_path)]) == 0


def test_check_sees_what_is_wrong(tmp_path):
    assert build.main(["--pure", "--out", str(tmp_path)]) == 0
    wheel = next(tmp_path.glob("*.whl"))
    data = wheel.read_bytes()
    wheel.write_bytes(data[:-1])
    assert any("not the wheel" in fault for fault in build.faults(tmp_path))
    assert any("build the wheels again" in fault for fault in build.faults(tmp_path))
    wheel.unlink()
    assert any("not there" in fault for fault in build.faults(tmp_path))
    wheel.write_bytes(data)
    launcher_wheel(tmp_path)
    assert any("not listed" in fault for fault in build.faults(tmp_path))


def test_the_folder_of_this_checkout_is_consistent():
    """The universal wheel may be older than the sources between releases; the publishing workflow checks that too."""
    found = [fault for fault in build.faults(ROOT / "wheels") if "build the wheels again" not in fault]
    assert found == []
    wheels = list((ROOT / "wheels").glob("*.whl"))
    assert sum(path.stat().st_size for path in wheels) < 16 << 20
    assert all(path.stat().st_size < 1 << 20 for path in wheels if "launcher" in path.name)


def test_a_launcher_wheel(tmp_path):
    missing = [name for name in ("setuptools", "pybind11", "ziglang") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)} (dev.py wheels installs them)")
    wheel = build.build_launcher(sys.executable, tmp_path)
    assert wheel.stat().st_size < 1 << 20
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert re.fullmatch(rf"sageattention_launcher-[\d.]+-{python}-{python}-manylinux_2_(17|28)_x86_64\.whl", wheel.name)
    assert build.build_launcher(sys.executable, tmp_path / "again").read_bytes() == wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        module = archive.read(next(name for name in archive.namelist() if name.endswith(".so")))
    libraries = set(re.findall(rb"[\w.+-]+\.so(?:\.\d+)+", module))
    assert not {name for name in libraries if name.startswith((b"libcuda", b"libtorch", b"libpython", b"libstdc++"))} - {b"libcuda.so.1"}


def test_build_errors_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="setuptools, pybind11, ziglang"):
        build.build_launcher(sys.executable, tmp_path)
    assert build.main(["--python", sys.executable, "--out", str(tmp_path)]) == 1
    assert "need setuptools" in capsys.readouterr().err and not list(tmp_path.glob("*.whl"))
