"""A real ComfyUI starts with and without --use-sage-attention beside every kind of installed sageattention, after the hook ran.

Needs COMFYUI_PATH, a ComfyUI checkout whose requirements are installed in the running Python. "Installed" here is a folder on
PYTHONPATH, so that the Python itself stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import NOT_SHIPPED
from installing import HEALTHY, RAISING, ROOT, foreign_wheel, our_wheel

pytestmark = pytest.mark.comfyui
COMFYUI = os.environ.get("COMFYUI_PATH", "")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base directory with the pack and nothing else."""
    pack = tmp_path / "custom_nodes" / "sage-pack"
    shutil.copytree(ROOT, pack, ignore=NOT_SHIPPED)
    for folder in ("models", "output", "input", "temp", "user", "site"):
        (tmp_path / folder).mkdir()
    return tmp_path


def hook(base: Path, *options: str) -> str:
    """Run install.py as the Manager does."""
    environment = {**os.environ, "COMFYUI_PATH": COMFYUI, "COMFYUI_FOLDERS_BASE_PATH": str(base), "PYTHONPATH": str(base / "site")}
    command = [sys.executable, "install.py", *options]
    done = subprocess.run(command, cwd=base / "custom_nodes" / "sage-pack", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(base: Path, *flags: str, **environment: str) -> tuple[int, str]:
    """ComfyUI loads everything and ends: its exit code and its log."""
    command = [sys.executable, str(Path(COMFYUI) / "main.py"), "--cpu", "--quick-test-for-ci", "--disable-api-nodes",
               "--base-directory", str(base), "--database-url", "sqlite:///:memory:", *flags]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(base / "site"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=base, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.returncode, done.stdout


def put(base: Path, wheel: Path) -> None:
    shutil.unpack_archive(wheel, base / "site", "zip")


def test_a_clone_alone_serves_the_flag_and_does_not_set_it(base):
    code, log = start(base)
    assert code == 0 and "Using sage attention" not in log, log[-3000:]
    code, log = start(base, "--use-sage-attention")
    assert code == 0 and "Using sage attention" in log, log[-3000:]


@pytest.mark.parametrize("which", ["ours newer", "foreign"])
def test_a_healthy_one_serves_the_flag(base, tmp_path, which):
    wheel = our_wheel(tmp_path, "3.9.0") if which == "ours newer" else foreign_wheel(tmp_path, code=HEALTHY)
    put(base, wheel)
    assert "kept" in hook(base)
    code, log = start(base, "--use-sage-attention")
    assert code == 0 and "Using sage attention" in log and "can't be imported" not in log, log[-3000:]


def test_an_older_one_of_ours_is_brought_up_to_date(base, tmp_path):
    put(base, our_wheel(tmp_path, "2.9.0", code=RAISING))
    assert "Installed sageattention" in hook(base)
    code, log = start(base, "--use-sage-attention")
    assert code == 0 and "Using sage attention" in log, log[-3000:]


@pytest.mark.parametrize("flag", [[], ["--use-sage-attention"]], ids=["no flag", "flag"])
@pytest.mark.parametrize(
    "code",
    [RAISING, "raise OSError('libcudart.so.12: cannot open shared object file')\n", "raise RuntimeError('no kernel image')\n"],
    ids=["dll", "library", "kernel image"],
)
def test_ours_runs_in_the_place_of_a_broken_one(base, tmp_path, code, flag):
    """Without a word from install.py: torch may have been upgraded after it ran."""
    put(base, foreign_wheel(tmp_path, code=code))
    returned, log = start(base, *flag)
    assert returned == 0 and ("Using sage attention" in log) == bool(flag), log[-3000:]
    assert log.count(f"the copy in {base / 'site' / 'sageattention'} can't be imported") == 1 and "--replace" in log, log[-3000:]


def test_a_broken_one_is_named_and_replaced_where_asked(base, tmp_path):
    put(base, foreign_wheel(tmp_path, code=RAISING))
    assert "IS BROKEN: ImportError: DLL load failed" in hook(base)
    assert "Installed sageattention" in hook(base, "--replace")
    code, log = start(base, "--use-sage-attention")
    assert code == 0 and "Using sage attention" in log and "can't be imported" not in log, log[-3000:]


def test_one_whose_import_ends_python_is_known_from_the_hook(base, tmp_path):
    put(base, foreign_wheel(tmp_path, code="import os\nos._exit(3)\n"))
    assert "IS BROKEN: the import ends Python with code 3" in hook(base)
    code, log = start(base, "--use-sage-attention")
    assert code == 0 and "Using sage attention" in log and "ends Python with code 3" in log, log[-3000:]


def test_a_pack_named_like_the_package_with_custom_nodes_on_the_path(base):
    """The registry's folder name is `sageattention`."""
    nodes = base / "custom_nodes"
    (nodes / "sage-pack").rename(nodes / "sageattention")
    for code, log in (start(base, PYTHONPATH=str(nodes)), start(base, "--use-sage-attention", PYTHONPATH=str(nodes))):
        assert code == 0 and "(IMPORT FAILED)" not in log and "can't be imported" not in log, log[-3000:]
    assert "Using sage attention" in log
