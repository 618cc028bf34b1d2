"""install.py in odd surroundings: settings of pip and uv, paths through links, a legacy locale."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from installing import Python, base_python, make_pack, pack, python, result

__all__ = ["base_python", "pack", "python"]  # fixtures

UV_SETTINGS = {
    "UV_BUILD_CONSTRAINT": "constraints/build.txt",
    "UV_CONSTRAINT": "constraints.txt",
    "UV_OVERRIDE": "overrides.txt",
    "UV_REQUIRE_HASHES": "1",
    "UV_CONFIG_FILE": "/gone/uv.toml",
    "UV_LINK_MODE": "symlink",
    "UV_CACHE_DIR": "/proc/cache",
    "UV_OFFLINE": "1",
}
PIP_SETTINGS = ["user = true", "prefix = /tmp/elsewhere", "root = /tmp/elsewhere", "require-hashes = true", "dry-run = true",
                "require-virtualenv = true\ntarget = /tmp/elsewhere"]  # fmt: skip


@pytest.mark.parametrize("name", [*UV_SETTINGS, "all of them"])
def test_settings_of_uv_in_a_python_without_pip(tmp_path: Path, pack: Path, name: str):
    """Stability Matrix sets UV_BUILD_CONSTRAINT, relative to a folder of its own."""
    bare = Python(tmp_path / "env", pip=False)
    settings = UV_SETTINGS if name == "all of them" else {name: UV_SETTINGS[name]}
    done = bare.install(pack, **settings)
    assert (done["outcome"], done["launcher"]["version"], done["errors"]) == ("installed", "3.0.0", ""), done
    assert bare.version() == "3.0.0"
    assert bare.install(pack, "--uninstall", **settings)["code"] == 0 and bare.version() is None


@pytest.mark.parametrize("where", ["PIP_CONFIG_FILE", "in the environment"])
@pytest.mark.parametrize("line", PIP_SETTINGS)
def test_settings_of_pip(python: Python, pack: Path, tmp_path: Path, where: str, line: str):
    file = tmp_path / "pip.conf" if where == "PIP_CONFIG_FILE" else python.folder / "pip.conf"
    file.write_text(f"[global]\n{line}\n[install]\n{line}\n")
    try:
        done = python.install(pack, **({"PIP_CONFIG_FILE": str(file)} if where == "PIP_CONFIG_FILE" else {}))
        assert (done["outcome"], done["launcher"]["version"]) == ("installed", "3.0.0"), done
        assert python.version() == "3.0.0" and (python.site / "sageattention").is_dir()
        assert python.install(pack, "--uninstall")["code"] == 0 and python.version() is None
    finally:
        file.unlink()


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.parametrize("options", [[], ["--replace"]], ids=["plain", "replace"])
def test_run_through_a_link(python: Python, pack: Path, tmp_path: Path, options: list[str]):
    """sys.path holds the link's target: the package in the pack is not an installed one."""
    link = tmp_path / "link"
    link.symlink_to(pack.parent.parent, target_is_directory=True)
    before = tree(pack)
    done = python.install(tmp_path, *options, file=link / "custom_nodes" / pack.name / "install.py")
    assert done["outcome"] == "installed" and python.version() == "3.0.0", done
    assert tree(pack) == before and result(pack)["outcome"] == "installed"


@pytest.mark.parametrize("options", [[], ["--replace"]], ids=["plain", "replace"])
@pytest.mark.parametrize("entry", ["custom_nodes", "the pack"])
def test_the_pack_on_the_path_is_not_an_installed_one(python: Python, tmp_path: Path, options: list[str], entry: str):
    """The registry's folder name is `sageattention`."""
    folder = make_pack(tmp_path / "ComfyUI" / "custom_nodes" / "sageattention")
    (folder / "__init__.py").write_text("raise RuntimeError('the pack was imported as the package')\n")
    before = tree(folder)
    done = python.install(folder, *options, PYTHONPATH=str(folder.parent if entry == "custom_nodes" else folder))
    assert tree(folder) == before
    assert done["outcome"] == "installed" and python.version() == "3.0.0", done


@pytest.mark.skipif(os.name == "nt", reason="a locale of Unix")
def test_a_folder_that_the_locale_has_no_letters_for(python: Python, pack: Path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python.install(pack, **locale)
    assert (done["outcome"], done["launcher"]) == ("installed", {"version": "3.0.0", "why": ""}), done
    assert python.version() == "3.0.0"
    assert python.install(pack, **locale)["outcome"] == "current"
    assert python.install(pack, "--uninstall", **locale)["code"] == 0 and python.version() is None


def test_the_printed_text_survives_any_console(python: Python, pack: Path):
    for encoding in ("ascii", "cp1252", "cp932"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        for options in ([], ["--dry-run"], ["--print"]):
            done = subprocess.run([python.exe, "install.py", *options], cwd=pack, env=environment, capture_output=True)
            assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    shutil.rmtree(python.site / "sageattention")
