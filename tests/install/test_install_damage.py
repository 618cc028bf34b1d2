"""install.py and damaged files: an installed copy is repaired, a damaged pack is told of, and nothing ends in a traceback."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from installing import HEALTHY, Python, base_python, foreign_wheel, make_pack, pack, python, sha256

__all__ = ["base_python", "pack", "python"]  # fixtures


def cut(path: Path) -> None:
    """In the middle of its second line."""
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\n") + 10])


def zero(path: Path) -> None:
    """As a file is after a crash: its size is right."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def split_letter(path: Path) -> None:
    """Ends inside a character of UTF-8."""
    path.write_bytes(path.read_bytes().replace(b"\nVersion", "\nSummary: für\nVersion".encode()).split(b"\xbc")[0])


def without_version(path: Path) -> None:
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if not line.startswith(b"Version")))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES = [
    *(("sageattention-3.0.0.dist-info/RECORD", damage) for damage in (cut, zero, lambda path: path.write_bytes(b""), remove)),
    *(("sageattention-3.0.0.dist-info/METADATA", damage) for damage in (split_letter, without_version, zero, remove)),
    ("sageattention-3.0.0.dist-info", remove),
    *(("sageattention/__init__.py", damage) for damage in (zero, remove)),
    *(("sageattention/__main__.py", damage) for damage in (zero, flip)),
    *(("sageattention_launcher-3.0.0.dist-info/RECORD", damage) for damage in (cut, zero, remove)),
    ("sageattention_launcher-3.0.0.dist-info", remove),
    ("sageattention_launcher.py", zero),
]


def files(site: Path) -> dict[str, str]:
    """Every file of ours there, with its sha256."""
    found = [p for top in site.glob("*sageattention*") for p in ([top] if top.is_file() else top.rglob("*")) if p.is_file()]
    return {path.relative_to(site).as_posix(): sha256(path) for path in found if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{name}-{damage.__name__}" for name, damage in DAMAGES])
def test_a_damaged_installation_is_repaired(python: Python, pack: Path, name: str, damage: Callable[[Path], object]):
    python.install(pack)
    whole = files(python.site)
    damage(python.site / name)
    assert files(python.site) != whole
    done = python.install(pack)
    assert (done["code"], done["errors"]) == (0, "") and "3.0.0" in done["message"].splitlines()[0], done
    assert files(python.site) == whole and python.version() == "3.0.0"
    if "launcher" not in name and damage is not cut:  # a record that is cut says nothing of the rest
        assert f"The sageattention in {python.site} was damaged." in done["message"]
    assert python.install(pack)["message"] == "sageattention 3.0.0 is up to date."


@pytest.mark.parametrize("damage", [split_letter, without_version, zero, cut])
def test_damaged_metadata_of_torch_and_of_a_foreign_one(python: Python, pack: Path, tmp_path: Path, damage):
    python.put(foreign_wheel(tmp_path))
    info = python.site / "torch-2.9.1+cu130.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: torch\nVersion: 2.9.1+cu130\n", encoding="utf-8")
    try:
        damage(info / "METADATA")
        damage(python.site / "sageattention-2.2.0+cu130torch2.9.dist-info" / "METADATA")
        told = python.install(pack)
    finally:
        shutil.rmtree(info)
    assert (told["outcome"], told["code"], told["errors"]) == ("kept-foreign", 0, "")
    assert told["torch"] == "2.9.1+cu130" and told["installed"]["version"] == "2.2.0+cu130torch2.9"


def test_leavings_in_the_way_are_no_obstacle(python: Python, pack: Path):
    """A folder of bytecode, as an uninstall may leave it."""
    (python.site / "sageattention" / "__pycache__").mkdir(parents=True)
    (python.site / "sageattention" / "__pycache__" / "api.pyc").touch()
    assert python.install(pack)["outcome"] == "installed"
    assert python.version() == "3.0.0"


def _image(pack: Path) -> Path:
    """Put a kernel image, and a manifest that lists it, into a pack."""
    path = pack / "sageattention" / "kernels" / "sm_90a" / "attend.cubin.xz"
    path.parent.mkdir()
    path.write_bytes(lzma.compress(b"code" * 1000))
    listed = {"images": {"sm_90a/attend.cubin.xz": {"sha256": hashlib.sha256(b"code" * 1000).hexdigest()}}}
    (pack / "sageattention" / "kernels" / "manifest.json").write_text(json.dumps(listed))
    return path


@pytest.mark.parametrize("damage", [zero, flip, remove, lambda path: path.write_bytes(b"version https://git-lfs.example/spec/v1\n")])
def test_a_damaged_kernel_in_the_pack_is_not_installed(python: Python, tmp_path: Path, damage):
    whole = make_pack(tmp_path / "whole")
    _image(whole)
    assert python.install(whole)["outcome"] == "installed"
    damaged = make_pack(tmp_path / "damaged", version="3.1.0")
    damage(_image(damaged))
    told = python.install(damaged)
    assert (told["outcome"], told["code"]) == ("bundled-only", 0)
    assert "sm_90a/attend.cubin.xz" in told["message"] and "install the node pack again" in told["message"]
    assert python.version() == "3.0.0"


@pytest.mark.parametrize(
    ("name", "damage"),
    [("sageattention/__main__.py", zero), ("sageattention/__init__.py", remove), ("sageattention/kernels/manifest.json", zero),
     ("pyproject.toml", zero), ("pyproject.toml", remove)],
)  # fmt: skip
def test_a_damaged_pack_is_told_of(python: Python, pack: Path, name: str, damage):
    damage(pack / name)
    told = python.install(pack)
    assert (told["outcome"], told["code"], told["errors"]) == ("bundled-only", 0, "")
    assert "nstall the node pack again" in told["message"] and python.version() is None
    assert not list(python.site.glob("*sageattention*"))


@pytest.mark.parametrize("damage", [zero, remove, cut])
def test_a_damaged_index_costs_the_launcher_only(python: Python, pack: Path, damage):
    damage(pack / "wheels" / "index.json")
    told = python.install(pack)
    assert (told["outcome"], told["code"], told["errors"]) == ("installed", 0, "")
    assert "index" in told["launcher"]["why"] and python.version() == "3.0.0"


def test_a_folder_that_only_looks_like_ours(python: Python, pack: Path):
    """Somebody's own package without metadata is not replaced."""
    (python.site / "sageattention" / "kernels").mkdir(parents=True)
    (python.site / "sageattention" / "__init__.py").write_text(HEALTHY)
    assert python.install(pack)["outcome"] == "kept-foreign"
