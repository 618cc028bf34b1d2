"""The exchange in site-packages: whatever is refused or left half done, the old package or the new one is there, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import installing
import pytest
from installing import base_python, foreign_wheel, launcher_wheel, our_wheel, pack, python

from installer import LAUNCHER, PACKAGE, Problem, exchange
from installer.installed import Installed, infos_of

__all__ = ["base_python", "pack", "python"]  # fixtures


def tree(site: Path) -> dict[str, bytes]:
    return {path.relative_to(site).as_posix(): path.read_bytes() for path in site.rglob("*") if path.is_file()}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with an older one of ours, and something that is not ours."""
    folder = tmp_path / "site"
    installing.shutil.unpack_archive(our_wheel(tmp_path, "2.9.0"), folder, "zip")
    (folder / "numpy").mkdir()
    (folder / "numpy" / "__init__.py").touch()
    return folder


def swap(site: Path, wheel: Path, prove=lambda site: None) -> None:
    exchange.exchange(wheel, PACKAGE, Installed(PACKAGE, site, infos_of(PACKAGE, site)), site, prove)


def imported(site: Path) -> str | None:
    """The version that Python would import from there, as site.py reads the .pth file."""
    code = f"import site; site.addsitedir({str(site)!r})\nimport sageattention as s; print(s.__version__)"
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=site).stdout.strip() or None


def fails(site: Path) -> None:
    raise Problem("it does not work")


class Refusing:
    """`os.rename` that refuses one entry, once the proof has failed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, entry: str):
        self.entry, self.real, self.active = entry, os.rename, False
        monkeypatch.setattr(os, "rename", self)

    def __call__(self, source, target):
        if self.active and Path(source).name == self.entry:
            raise PermissionError(13, "Access is denied", str(source))
        self.real(source, target)

    def prove(self, site: Path) -> None:
        self.active = True
        fails(site)


ENTRIES = ["sageattention", "sageattention-2.9.0.dist-info", "sageattention-3.0.0.dist-info"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_taking_back_that_is_refused_loses_nothing(site, tmp_path, monkeypatch, entry):
    before, new = tree(site), our_wheel(tmp_path)
    refusing = Refusing(monkeypatch, entry)
    with pytest.raises(Problem, match="Nothing is lost"):
        swap(site, new, refusing.prove)
    assert imported(site) in ("2.9.0", "3.0.0")
    with pytest.raises(Problem, match="Nothing is lost"), exchange.exclusive(site):  # still in use
        pytest.fail("an exchange is not decided")
    assert imported(site) in ("2.9.0", "3.0.0")
    refusing.active = False
    said: list[str] = []
    with exchange.exclusive(site, said.append):
        assert tree(site).items() >= before.items()
    assert tree(site) == before and said == ["An interrupted install was taken back first."]


def test_a_rename_that_is_refused_on_the_second_entry(site, tmp_path, monkeypatch):
    """While moving in: the old one comes back, and it says what to do."""
    before, real = tree(site), os.rename

    def rename(source, target):
        if Path(source).name == "sageattention-3.0.0.dist-info":
            raise PermissionError(13, "Access is denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Problem, match="Close ComfyUI and run this again"):
        swap(site, our_wheel(tmp_path))
    assert tree(site) == before


@pytest.mark.parametrize(
    "content", [b"", bytes(80), b'{"old": ["sageatt', b'{"old": ["sageattention"], "new": []}'], ids=["empty", "zeroed", "cut", "whole"]
)
@pytest.mark.parametrize("moved", range(5))
def test_what_release_3_0_0_left_half_done(site, tmp_path, content, moved):
    """It kept a journal, and a crash may have damaged that: four renames, of which some were done."""
    before, work = tree(site), site / exchange.WORK
    installing.shutil.unpack_archive(our_wheel(tmp_path), work / "new", "zip")
    (work / "old").mkdir()
    (work / "journal.json").write_bytes(content)
    (site / exchange.FALLBACK).write_text(f"{exchange.WORK}/new\n")
    renames = [("sageattention", site, work / "old"), ("sageattention-2.9.0.dist-info", site, work / "old"),
               ("sageattention", work / "new", site), ("sageattention-3.0.0.dist-info", work / "new", site)]  # fmt: skip
    for entry, source, target in renames[:moved]:
        os.rename(source / entry, target / entry)
    assert imported(site) in ("2.9.0", "3.0.0")
    with exchange.exclusive(site):
        pass
    assert tree(site) == before


@pytest.mark.parametrize("moved", range(3))
def test_what_release_3_0_0_left_of_a_first_install(tmp_path, moved):
    site, work = tmp_path / "site", tmp_path / "site" / exchange.WORK
    installing.shutil.unpack_archive(our_wheel(tmp_path), work / "new", "zip")
    (work / "old").mkdir()
    (work / "journal.json").touch()
    for entry in ("sageattention", "sageattention-3.0.0.dist-info")[:moved]:
        os.rename(work / "new" / entry, site / entry)
    with exchange.exclusive(site):
        pass
    assert imported(site) == ("3.0.0" if moved == 2 else None)
    assert len(list(site.iterdir())) == (2 if moved == 2 else 0)


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("name", [PACKAGE, LAUNCHER])
def test_every_rename_and_every_rename_back(tmp_path, monkeypatch, name, stop):
    """Ended without a word at any rename, and the next run ended at any rename too."""
    site, real = tmp_path / "site", os.rename
    for wheel in (our_wheel(tmp_path, "2.9.0"), launcher_wheel(tmp_path, "2.9.0")):
        installing.shutil.unpack_archive(wheel, site, "zip")
    before = tree(site)
    new = our_wheel(tmp_path) if name == PACKAGE else launcher_wheel(tmp_path)

    class Killed(BaseException):
        pass

    class Countdown:
        def __init__(self, left):
            self.left = left

        def __call__(self, source, target):
            if self.left == 0:
                raise Killed
            self.left -= 1
            real(source, target)

    monkeypatch.setattr(exchange.Undecided, "take_back", lambda self: None)  # a killed process takes nothing back
    monkeypatch.setattr(os, "rename", Countdown(stop))
    ended = False
    try:
        exchange.exchange(new, name, Installed(name, site, infos_of(name, site)), site, lambda site: None)
    except Killed:
        ended = True
    assert ended == (stop < 4)
    monkeypatch.undo()
    for again in range(6):
        monkeypatch.setattr(os, "rename", Countdown(again))
        try:
            with exchange.exclusive(site):
                break
        except Killed:
            continue
        finally:
            monkeypatch.undo()
    assert (tree(site) == before) == ended
    assert not (site / exchange.WORK).exists() and not (site / exchange.FALLBACK).exists()


def test_a_library_in_use_stays_until_it_can_be_deleted(site, tmp_path, monkeypatch):
    """Windows lets a loaded .pyd be moved, but not deleted: the next exchange takes another folder, and says nothing of an interruption."""
    real = installing.shutil.rmtree

    def rmtree(path, ignore_errors=False):
        if Path(path).name.startswith("old"):
            return  # ignore_errors, that is
        real(path, ignore_errors)

    monkeypatch.setattr(installing.shutil, "rmtree", rmtree)
    said: list[str] = []
    for version in ("3.0.0", "3.0.1", "3.0.2"):
        swap(site, our_wheel(tmp_path, version))
        with exchange.exclusive(site, said.append) as work:
            pass
    assert imported(site) == "3.0.2" and said == [] and len(list(work.glob("old-*"))) == 3
    monkeypatch.undo()
    with exchange.exclusive(site):
        pass
    assert not work.exists()


def test_windows_tries_again_while_somebody_has_the_file_open(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    real, refusals = os.rename, [PermissionError(13, "Access is denied")] * 3

    def rename(source, target):
        if refusals:
            raise refusals.pop()
        real(source, target)

    class Windows:
        name = "nt"

        def __getattr__(self, name):
            return rename if name == "rename" else getattr(os, name)

    monkeypatch.setattr(exchange, "os", Windows())
    exchange.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").exists()
    refusals += [PermissionError(13, "Access is denied")] * 10**6
    monkeypatch.setattr(exchange, "RETRY_SECONDS", 0.3)
    with pytest.raises(PermissionError):
        exchange.move(tmp_path / "b", tmp_path / "c")


@pytest.mark.skipif(os.name == "nt", reason="there, an open file can't be removed")
@pytest.mark.parametrize("then", ["removed", "made again"])
def test_a_lock_that_was_opened_before_it_was_removed_is_none(tmp_path, monkeypatch, then):
    """A second run that waits at the door while the first one cleans up must not work beside a third."""
    path = tmp_path / "lock"
    stale = open(path, "a+b")  # noqa: SIM115
    path.unlink()
    if then == "made again":
        path.touch()
    monkeypatch.setattr(exchange, "open", lambda *_: stale, raising=False)
    assert exchange._lock(path) is None and stale.closed


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_the_working_folder_is_emptied_under_the_lock(site, tmp_path, monkeypatch):
    real, seen = installing.shutil.rmtree, []

    def rmtree(path, ignore_errors=False):
        lock = exchange._lock(Path(path).parent / "lock")
        seen.append(lock)
        real(path, ignore_errors)

    monkeypatch.setattr(installing.shutil, "rmtree", rmtree)
    swap(site, our_wheel(tmp_path))
    assert len(seen) == 2 and seen == [None, None]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, subprocess.TimeoutExpired("doctor", 900), Problem("wrong")])
def test_whatever_ends_the_proof_the_old_one_comes_back(site, tmp_path, failure):
    before = tree(site)

    def prove(folder):
        assert '__version__ = "3.0.0"' in (folder / "sageattention" / "__init__.py").read_text()
        raise failure

    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        swap(site, our_wheel(tmp_path), prove)
    assert tree(site) == before


def test_a_foreign_one_comes_back_whole(tmp_path):
    site = tmp_path / "site"
    installing.shutil.unpack_archive(foreign_wheel(tmp_path), site, "zip")
    before = tree(site)
    with pytest.raises(Problem, match="it does not work"):
        swap(site, our_wheel(tmp_path), fails)
    assert tree(site) == before


@pytest.mark.parametrize(
    "bad", ["evil.pth", "sageattention-3.0.0.data/scripts/sage", "../evil.py", "sageattention/../../evil.py", "numpy/a.py"]
)
def test_a_wheel_with_anything_else_in_it_is_refused(site, tmp_path, bad):
    before = tree(site)
    metadata = "Metadata-Version: 2.4\nName: sageattention\nVersion: 3.0.0\n"
    wheel = installing.write_wheel(tmp_path, metadata, "py3-none-any", {**installing.package(), bad: b"raise SystemExit\n"})
    with pytest.raises(Problem, match="holds more or less than sageattention"):
        swap(site, wheel)
    assert tree(site) == before and not list(tmp_path.glob("evil*"))


def test_a_wheel_that_is_damaged_inside(site, tmp_path):
    before, wheel = tree(site), our_wheel(tmp_path)
    data = bytearray(wheel.read_bytes())
    data[data.index(b"def sageattn")] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(Problem, match="is not a wheel"):
        swap(site, wheel)
    assert tree(site) == before
