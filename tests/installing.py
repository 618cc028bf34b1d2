"""What the installer tests share: small packs and wheels, fresh Pythons, a loopback mirror."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from installer.wheel import write_wheel

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "win_amd64" if os.name == "nt" else f"manylinux_2_17_{os.uname().machine}.manylinux2014_{os.uname().machine}"
TIMES = float(os.environ.get("SLOWER_TIMES", "1"))  # how many times longer than on a quiet machine anything may take: wine starts slowly
HEALTHY = "def sageattn(q, k, v):\n    return q\n"
DOCTOR = "import json, sys\nassert sys.argv[1:] == ['doctor', '--json']\nprint(json.dumps({'ok': True}))\n"
RAISING = "raise ImportError('DLL load failed while importing _fused: the specified procedure could not be found.')\n"


def load(path: Path, name: str) -> ModuleType:
    """A file of the project as a module, under a name of the tests' own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(ROOT / "wheels" / "build.py", "wheels_build")


def package(version: str = "3.0.0", code: str = HEALTHY, doctor: str = DOCTOR, note: str = "") -> dict[str, bytes]:
    """The files of a small package that is ours."""
    files = {"__init__.py": f'{code}__version__ = "{version}"\n{note}', "__main__.py": doctor, "kernels/manifest.json": '{"images": {}}'}
    return {f"sageattention/{name}": text.encode() for name, text in files.items()}


def our_wheel(folder: Path, version: str = "3.0.0", **options: str) -> Path:
    """A small wheel that is ours by its metadata, as an older release or an index has it."""
    metadata = f"Metadata-Version: 2.4\nName: sageattention\nVersion: {version}\nKeywords: sageattention-node-pack\n"
    return write_wheel(folder, metadata, "py3-none-any", package(version, **options))


def launcher_wheel(folder: Path, version: str = "3.0.0", tag: str | None = None, code: str = "") -> Path:
    """A stand-in for the compiled launcher, for this Python unless a tag says otherwise."""
    metadata = f"Metadata-Version: 2.4\nName: sageattention-launcher\nVersion: {version}\n"
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tag = tag or f"{python}-{python}-{PLATFORM}"
    text = f'__version__ = "{version}"\n{code}'
    return write_wheel(folder, metadata, tag, {"sageattention_launcher.py": text.encode()})


def foreign_wheel(folder: Path, version: str = "2.2.0+cu130torch2.9", code: str = HEALTHY) -> Path:
    """Somebody else's sageattention."""
    metadata = f"Metadata-Version: 2.1\nName: sageattention\nVersion: {version}\n"
    return write_wheel(folder, metadata, "py3-none-any", {"sageattention/__init__.py": code.encode(), "sageattention/core.py": b""})


def make_pack(folder: Path, launcher: bool = True, version: str = "3.0.0", **options: str) -> Path:
    """A pack with the real install.py, a small package, and a launcher's wheel."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "install.py", folder)
    shutil.copytree(ROOT / "installer", folder / "installer", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(f'[project]\nname = "sageattention"\nversion = "{version}"\n', encoding="utf-8")
    for name, data in package(version, **options).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "wheels").mkdir()
    shutil.copy(ROOT / "wheels" / "triton_windows.json", folder / "wheels")
    if launcher:
        launcher_wheel(folder / "wheels", version)
    build.write_index(folder / "wheels", [])
    return folder


def write_index(folder: Path, *wheels: Path, **changes: object) -> Path:
    """An index of wheels that lie elsewhere; `changes` replaces fields of every entry."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.json"
    path.write_text(json.dumps({"format": 1, "wheels": [{**build.describe(w, []), **changes} for w in wheels]}), encoding="utf-8")
    return path


@functools.cache
def python_of(version: str) -> str | None:
    """An installed CPython of that version, or None."""
    if sysconfig.get_python_version() == version:
        return sys.executable
    for python in (*sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))), shutil.which(f"python{version}")):
        if python:
            done = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_python_version())"], capture_output=True, text=True)
            if done.stdout.strip() == version:
                return python
    return None


def run_python(exe: str, code: str, check: bool = True, **options: object) -> subprocess.CompletedProcess:
    """Run `code`; its output is UTF-8 whatever the console's code page is, as paths here have letters beyond it."""
    command = [exe, "-X", "utf8", "-c", code]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=check, env=environment, **options)


class Python:
    """A virtual environment to install into."""

    def __init__(self, folder: Path, base: str = sys.executable, pip: bool = True):
        where = "import importlib.util as i; s = i.find_spec('pip'); print(s.submodule_search_locations[0] if s else '')"
        theirs = run_python(base, where).stdout.strip()
        bare = ["--without-pip"] if theirs or not pip else []
        subprocess.run([base, "-m", "venv", *bare, str(folder)], check=True, capture_output=True)
        self.folder = folder
        self.exe = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        self.site = Path(run_python(self.exe, "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        if not self.site.is_absolute() or folder.resolve() not in self.site.resolve().parents:  # clean() deletes there
            raise RuntimeError(f"the environment {folder} says that its packages are in {str(self.site)!r}")
        if pip and theirs:  # ten times quicker than venv's own way
            shutil.copytree(theirs, self.site / "pip")
            for info in Path(theirs).parent.glob("pip-*.dist-info"):
                shutil.copytree(info, self.site / info.name)

    def __call__(self, code: str) -> subprocess.CompletedProcess:
        return run_python(self.exe, code, check=False, cwd=self.folder)

    def put(self, wheel: Path) -> None:
        """Install a wheel as pip would have, without its time."""
        shutil.unpack_archive(wheel, self.site, "zip")

    def clean(self) -> None:
        """Take out everything of these tests."""
        for path in [*self.site.glob("sageattention*"), *self.site.glob(".sageattention*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def version(self) -> str | None:
        """What `import sageattention` gives here: its __version__ ("foreign" without one), or None."""
        done = self("import sageattention as s; print(getattr(s, '__version__', 'foreign'))")
        return done.stdout.strip() or None

    def install(self, pack: Path, *options: str, prefix: tuple[str, ...] = (), file: str | Path = "install.py", **environment: str) -> dict:
        """Run install.py as ComfyUI-Manager does, or by another path. Returns the result, plus `code` and `errors`."""
        command = [*prefix, self.exe, str(file), "--json", *options]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        done = subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120)
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        return {**json.loads(done.stdout), "code": done.returncode, "errors": done.stderr}


class Mirror:
    """A server on the loopback interface: `answers[path]` is bytes, or a function that takes the request's handler."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                answer = mirror.answers.get(self.path)
                if answer is None:
                    self.send_error(404)
                elif callable(answer):
                    answer(self)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                """Quiet: the test's own assertion tells."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """One environment for a module, with pip, in a path with a space and letters beyond ASCII."""
    return Python(tmp_path_factory.mktemp("base") / "Ümläut 路径 env")


@pytest.fixture
def python(base_python: Python) -> Python:
    """That environment without any sageattention."""
    base_python.clean()
    return base_python


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A small pack in a ComfyUI-like folder, whose path has a space and letters beyond ASCII."""
    comfy = tmp_path / "Ünser ComfyUI 路径"
    return make_pack(comfy / "custom_nodes" / "patch-sage")


@pytest.fixture
def mirror():
    server = Mirror()
    yield server
    server.close()


def result(pack: Path) -> dict:
    """The result file that the node reads."""
    return json.loads((pack.parent.parent / "user" / "__sageattention" / "install.json").read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
