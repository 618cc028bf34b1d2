"""The real installers: comfy-cli validates and packs the pack, ComfyUI-Manager installs the archive, comfy-cli installs it end to end.

comfy-cli and comfyui_manager are looked for in the Python that INSTALLERS_PYTHON names, else in the running one. The registry is
on the loopback interface; no other host can be reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import installing
import pytest
from installing import ROOT, Mirror, Python, mirror

__all__ = ["mirror"]  # a fixture
TOOLS = os.environ.get("INSTALLERS_PYTHON") or sys.executable
COMFYUI = os.environ.get("COMFYUI_PATH", "")
LIMIT = 20 << 20
FILES = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "__init__.py", "install.py", "prestartup_script.py", "pyproject.toml"}
FOLDERS = {
    "example_workflows": {".json"},
    "locales": {".json"},
    "web": {".md"},
    "docs": {".json", ".md", ".png", ".py", ".svg"},
    "installer": {".py"},
    "nodes": {".py"},
    "sageattention": {".json", ".py", ".xz"},
    "wheels": {".json", ".whl"},
}

# Runs in every child: the registry is ours, and names of other hosts are not looked up.
SITE = """
import importlib.machinery, os, socket, sys

class Registry:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "comfyui_manager.common.cnr_utils":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.base_url = os.environ["TEST_REGISTRY"]
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Registry)
look_up = socket.getaddrinfo
def only_loopback(host, *args, **kwargs):
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise socket.gaierror(f"this test reaches no {host}")
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = only_loopback
"""
# The Manager downloads through torchvision, which a ComfyUI has and this environment has not.
TORCHVISION = """
import os, urllib.request
def download_url(url, root, filename=None, md5=None):
    urllib.request.urlretrieve(url, os.path.join(root, filename))
"""


def tool(*modules: str) -> Path:
    """The folder of the tools' scripts; skips where a module is missing."""
    code = f"import importlib.util as i; print([m for m in {modules!r} if not i.find_spec(m)])"
    done = subprocess.run([TOOLS, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() != "[]":
        pytest.skip(f"{TOOLS} has no {done.stdout.strip()}; INSTALLERS_PYTHON names a Python that does")
    return Path(TOOLS).parent


def run(command: list, **options) -> subprocess.CompletedProcess:
    # DO_NOT_TRACK: comfy-cli would report its use.
    environment = {**os.environ, "DO_NOT_TRACK": "1", **options.pop("env", {})}
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        environment.pop(name, None)
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, env=environment, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tracked files of this checkout, committed in a repository of their own."""
    folder = tmp_path_factory.mktemp("source") / "pack"
    tracked = run(["git", "-C", ROOT, "ls-files", "-z"])
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "commit", "-qm", "pack"],
    ):
        assert run(["git", "-C", folder, *command]).returncode == 0
    return folder


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory) -> Path:
    """node.zip, as `comfy node pack` makes it."""
    done = run(
        [tool("comfy_cli") / "comfy", "--skip-prompt", "node", "pack"], cwd=source, env={"HOME": str(tmp_path_factory.mktemp("home"))}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "node.zip"


def test_validate(source, tmp_path):
    done = run([tool("comfy_cli") / "comfy", "--skip-prompt", "node", "validate"], cwd=source, env={"HOME": str(tmp_path)})
    assert done.returncode == 0 and "Security warnings" not in done.stdout, done.stdout + done.stderr


def test_the_archive_holds_what_is_needed_and_nothing_else(archive):
    assert archive.stat().st_size < LIMIT
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        names = packed.namelist()
        digests = [hashlib.sha256(packed.read(name)).hexdigest() for name in names if name.endswith((".xz", ".whl"))]
    assert {name for name in names if "/" not in name} == FILES
    assert {name.split("/")[0] for name in names if "/" in name} == FOLDERS.keys()
    for name in names:
        assert "/" not in name or Path(name).suffix in FOLDERS[name.split("/")[0]], name
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sageattention").rglob("*.py")}
    assert {name for name in names if name.startswith("sageattention/") and name.endswith(".py")} == code
    assert len(set(digests)) == len(digests) and not [
        name for name in names if name.startswith("wheels/sageattention-")
    ]  # each kernel once
    assert "wheels/build.py" not in names and not [name for name in names if "__pycache__" in name]


def test_no_link_leads_out_of_the_archive(archive):
    """Of the README and of the documents."""
    with zipfile.ZipFile(archive) as packed:
        names = set(packed.namelist())
        for page in [name for name in names if name.endswith(".md")]:
            for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", packed.read(page).decode("utf-8")):
                assert posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) in names, f"{page}: {target}"


def test_metadata_is_static_and_versions_agree():
    """The Manager reads `project.version` itself, and parses versions strictly."""
    project = installing.build.project()
    version = (ROOT / "sageattention" / "_version.py").read_text(encoding="utf-8")
    assert f'__version__ = "{project["version"]}"' in version
    assert all(part.isdigit() for part in project["version"].split(".")) and project["version"].count(".") == 2
    assert project["urls"]
    assert "dynamic" not in project and project["dependencies"] == []
    requirements = ROOT / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.exists() else []
    assert not [line for line in lines if line.strip() and not line.startswith("#")]


class Workspace:
    """A ComfyUI with a Python of its own, in which the tools are importable."""

    def __init__(self, folder: Path, registry: Mirror):
        bin_folder = tool("comfy_cli", "comfyui_manager", "aiohttp", "yaml")
        self.path, self.comfy = folder / "comfy ui", bin_folder / "comfy"
        ignored = shutil.ignore_patterns(".git", "tests*", "models", "__pycache__", "user", "output", "temp")
        shutil.copytree(COMFYUI, self.path, ignore=ignored)
        for name in ("models", "custom_nodes", "user"):
            (self.path / name).mkdir(exist_ok=True)
        self.python = Python(self.path / ".venv", TOOLS)
        theirs = run([TOOLS, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
        (self.python.site / "zz_tools.pth").write_text(f"{theirs}\n")
        wanted = [
            line for line in (self.path / "requirements.txt").read_text().splitlines() if line.startswith("comfyui-frontend-package==")
        ]
        front = self.python.site / "comfyui_frontend_package-0.dist-info"  # else the Manager would go and install one
        front.mkdir()
        (front / "METADATA").write_text(f"Metadata-Version: 2.1\nName: comfyui-frontend-package\nVersion: {wanted[0].split('==')[1]}\n")
        site = folder / "site"
        (site / "torchvision" / "datasets").mkdir(parents=True)
        (site / "torchvision" / "__init__.py").touch()
        (site / "torchvision" / "datasets" / "__init__.py").touch()
        (site / "torchvision" / "datasets" / "utils.py").write_text(TORCHVISION)
        (site / "sitecustomize.py").write_text(SITE)
        (folder / "home").mkdir()
        self.environment = {
            "PYTHONPATH": str(site),
            "TEST_REGISTRY": registry.url,
            "HOME": str(folder / "home"),
            "COMFYUI_PATH": str(self.path),
        }

    def install(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [self.comfy, "--skip-prompt", f"--workspace={self.path}", "node", "install", "--exit-on-fail", *arguments]
        return run(command, cwd=self.path, env=self.environment)

    def result(self) -> dict:
        return json.loads((self.path / "user" / "__sageattention" / "install.json").read_text(encoding="utf-8"))


@pytest.fixture
def workspace(tmp_path, mirror) -> Workspace:
    return Workspace(tmp_path, mirror)


def _installed(workspace: Workspace, pack: Path) -> None:
    version = installing.build.project()["version"]
    assert workspace.python.version() == version
    assert workspace.result()["outcome"] == "installed" and workspace.result()["python"] == workspace.python.exe
    assert (pack / "sageattention" / "__init__.py").is_file()


@pytest.mark.comfyui
def test_comfy_node_install_from_a_registry(workspace, archive, mirror):
    version = installing.build.project()["version"]
    release = {"id": "1", "version": version, "downloadUrl": f"{mirror.url}/node.zip", "status": "NodeVersionStatusActive"}
    node = {"id": "sageattention", "name": "SageAttention", "latest_version": release, "publisher": {"id": "p", "name": "p"}}
    page = json.dumps({"nodes": [node], "totalPages": 1, "total": 1}).encode()
    mirror.answers = {
        "/nodes?page=1&limit=30&comfyui_version=unknown&form_factor=git-linux": page,
        f"/nodes/sageattention/install?version={version}": json.dumps(release).encode(),
        "/node.zip": archive.read_bytes(),
    }
    done = workspace.install("--mode", "remote", "sageattention")
    assert done.returncode == 0 and "[INSTALLED] sageattention" in done.stdout + done.stderr, (done.stdout + done.stderr)[-4000:]
    assert mirror.asked[-1] == "/node.zip"
    _installed(workspace, workspace.path / "custom_nodes" / "sageattention")


@pytest.mark.comfyui
def test_comfy_node_install_from_a_repository(workspace, source):
    done = workspace.install(f"file://localhost{source}")
    assert done.returncode == 0 and "[INSTALLED]" in done.stdout + done.stderr, (done.stdout + done.stderr)[-4000:]
    _installed(workspace, workspace.path / "custom_nodes" / "pack")


MANAGER = """
import json, sys
sys.path.append({comfy!r})
import utils.extra_config
from comfyui_manager.common import cm_global, cnr_utils
cm_global.pip_blacklist, cm_global.pip_downgrade_blacklist, cm_global.pip_overrides = set(), [], {{}}
from comfyui_manager.glob.manager_core import unified_manager
pack = {pack!r}
print(json.dumps([unified_manager.execute_install_script("sageattention", pack, instant_execution=True), cnr_utils.read_cnr_info(pack)]))
"""


@pytest.mark.comfyui
def test_the_manager_installs_the_unpacked_archive(workspace, archive):
    pack = workspace.path / "custom_nodes" / "sageattention"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(pack)
        (pack / ".tracking").write_text("\n".join(packed.namelist()))
    before = sorted(path.relative_to(pack) for path in pack.rglob("*"))
    code = MANAGER.format(comfy=str(workspace.path), pack=str(pack))
    done = run([workspace.python.exe, "-c", code], cwd=workspace.path, env=workspace.environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    succeeded, info = json.loads(done.stdout.strip().splitlines()[-1])
    assert succeeded is True
    assert (info["id"], info["version"]) == ("sageattention", installing.build.project()["version"])
    _installed(workspace, pack)
    assert before == sorted(path.relative_to(pack) for path in pack.rglob("*"))
