"""On Windows alone, real or under wine: the portable layout, legacy consoles, a launcher in use, the driver by its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import stub
from comfy_server import NOT_SHIPPED
from installing import ROOT, Python, base_python, make_pack, python, write_index, write_wheel

sys.path.append(str(ROOT / "tests" / "windows"))
import wine_python

__all__ = ["base_python", "python"]  # fixtures
VERSION = "3.0.0"


@pytest.fixture(scope="module")
def stub_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in the place of the NVIDIA driver's."""
    return Path(stub.build_stub(tmp_path_factory.mktemp("stub")).path)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled launcher's wheel for this Python."""
    return stub.build_launcher(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a portable ComfyUI, without ComfyUI."""
    folder = tmp_path_factory.mktemp("portable") / "ComfyUI_windows_portable"
    folder.mkdir()
    wine_python.make_portable(folder, Path(sys._base_executable))
    (folder / "ComfyUI").mkdir()
    return folder


def run(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", ["AI\u7ed8\u753b", "J\u00fcrgen", "pa ck", "ComfyUI_windows_portable"])
def test_the_portable_build_in_any_folder(portable, tmp_path, name):
    """Its Python is isolated by a ._pth file, looks into no working folder, and lives where its user has unpacked it."""
    home = tmp_path / name
    portable.rename(home)
    try:
        exe = home / "python_embeded" / "python.exe"
        site = exe.parent / "Lib" / "site-packages"
        pack = make_pack(home / "ComfyUI" / "custom_nodes" / "sageattention")
        for outcome in ("installed", "current"):
            told = json.loads(run([exe, "-s", "install.py", "--json"], pack).stdout)
            assert (told["outcome"], told["python"]) == (outcome, str(exe)), told
        assert (site / "sageattention" / "__init__.py").is_file()
        saved = json.loads((home / "ComfyUI" / "user" / "__sageattention" / "install.json").read_text(encoding="utf-8"))
        assert saved["installed"]["path"] == str(site / "sageattention")
        run([exe, "-s", "install.py", "--uninstall"], pack)
        assert not list(site.iterdir())
        shutil.rmtree(home / "ComfyUI" / "custom_nodes")
    finally:
        home.rename(portable)


@pytest.mark.parametrize("encoding", ["cp1252:strict", "cp932:strict", "utf-8"])
def test_a_console_of_any_code_page(portable, encoding):
    """Of install.py in all its forms, and of the real package's doctor; paths are ASCII here, so that all can be shown."""
    exe, pack = portable / "python_embeded" / "python.exe", portable / "ComfyUI" / "custom_nodes" / "real"
    if not pack.exists():
        shutil.copytree(ROOT, pack, ignore=NOT_SHIPPED)
    for options in (["--dry-run"], ["--print"], []):
        run([exe, "-s", "install.py", *options], pack, PYTHONIOENCODING=encoding)
    assert "sageattention" in run([exe, "-s", "-m", "sageattention", "doctor"], portable, PYTHONIOENCODING=encoding).stdout


def test_doctor_finds_the_driver_and_the_launcher(portable, stub_driver, launcher):
    """By the driver's own name."""
    exe, pack = portable / "python_embeded" / "python.exe", portable / "ComfyUI" / "custom_nodes" / "real"
    if not pack.exists():
        shutil.copytree(ROOT, pack, ignore=NOT_SHIPPED)
    (portable / "index").mkdir()
    wheel = Path(shutil.copy(launcher, portable / "index"))
    run([exe, "-s", "install.py", "--index", write_index(portable / "index", wheel)], pack)
    shutil.copy(stub_driver, exe.parent / "nvcuda.dll")
    told = run([exe, "-s", "-m", "sageattention", "doctor"], portable).stdout
    assert "Stub A" in told and "compiled" in told, told


def test_the_launcher_opens_a_driver_in_a_folder_of_any_name(tmp_path, stub_driver, launcher):
    folder = tmp_path / "stub \u00fc \u8def"
    folder.mkdir()
    driver = Path(shutil.copy(stub_driver, folder / "nvcuda.dll"))
    shutil.unpack_archive(launcher, tmp_path / "site", "zip")
    code = "import sys; sys.path.insert(0, sys.argv[1])\nimport sageattention_launcher as l; print([l.open(name) for name in sys.argv[2:]])"
    told = run([sys.executable, "-c", code, tmp_path / "site", driver, "none.dll"], tmp_path).stdout
    assert told.strip() == repr(["", "none.dll can't be opened"])


def test_a_launcher_in_use_is_replaced_again_and_again(python: Python, tmp_path, launcher):
    """A running ComfyUI holds the library: it can be moved, and deleted only later."""
    pack = make_pack(tmp_path / "ComfyUI" / "custom_nodes" / "pack", launcher=False)

    def index(build: int) -> str:
        """Another build of the launcher: bytes after a library's end are nothing to Windows."""
        with zipfile.ZipFile(launcher) as archive:
            (module,) = (name for name in archive.namelist() if name.endswith(".pyd"))
            data = archive.read(module) + bytes([build])
        folder = tmp_path / f"build {build}"
        metadata = f"Metadata-Version: 2.4\nName: sageattention-launcher\nVersion: {VERSION}\n"
        wheel = write_wheel(folder, metadata, "-".join(launcher.stem.split("-")[2:]), {module: data})
        return str(write_index(folder, wheel))

    assert python.install(pack, "--index", index(0))["launcher"]["version"] == VERSION
    code = "import sageattention_launcher, sys; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([python.exe, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline().strip() == b"held"
            for build in (1, 2, 3):
                told = python.install(pack, "--index", index(build))
                assert told["launcher"] == {"version": VERSION, "why": ""} and "interrupted" not in told["message"], told
                (module,) = python.site.glob("sageattention_launcher.*.pyd")
                assert module.read_bytes()[-1] == build
        finally:
            holder.kill()
    assert python.install(pack, "--index", index(3))["outcome"] == "current"
    assert not (python.site / ".sageattention-install").exists()
