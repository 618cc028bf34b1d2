"""What is installed: read from files alone, so that damaged metadata is a finding and no exception."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from pathlib import Path

from . import KEYWORD, LAUNCHER, PACKAGE, module_of
from .interpreter import leads_into_pack
from .wheel import read_record, record_hash


class Installed:
    """A distribution, or a bare package folder, that this Python finds first.

    Attributes: folder (its site-packages), version (None for a bare folder), ours, entries (what it owns in its folder, or None where
    that can't be told).
    """

    def __init__(self, name: str, folder: Path, infos: list[Path]):
        module, metadata = module_of(name), ""
        self.name, self.folder, self.version = name, folder, None
        self.record: dict[str, str] = {}
        if infos:  # one, or the leavings of several
            info = infos[-1]
            metadata = text(info / "METADATA") or text(info / "PKG-INFO") or text(info)
            self.version, self.record = field(metadata, "Version") or version_of(info), read_record(_bytes(info / "RECORD"))
        own = [entry.name for entry in folder.iterdir() if re.fullmatch(rf"{module}(\..+)?", entry.name)] + [info.name for info in infos]
        manifest = folder / PACKAGE / "kernels" / "manifest.json"  # only our package has one
        self.ours = name == LAUNCHER or KEYWORD in (field(metadata, "Keywords") or "") or (name == PACKAGE and manifest.is_file())
        tops = {Path(path).parts[0] for path in self.record if path and not os.path.isabs(path)} - {"..", "__pycache__"}
        recorded = [top for top in tops if top.lower().startswith(module) or (folder / top).is_file()]
        # Without a record, a foreign one's files are unknown; ours are these, whatever is left of it.
        self.entries = sorted({*own, *recorded}) if self.ours or recorded or not infos else None

    def holds(self, record: dict[str, str]) -> bool:
        """Whether every file of that record is there to the bit, and in its own record too. An empty one is not known: its own holds."""
        wanted = record or {path: digest for path, digest in self.record.items() if digest}
        same = all(record_hash(_bytes(self.folder / path)) == digest for path, digest in wanted.items())
        return bool(wanted) and same and wanted.items() <= self.record.items()

    def fingerprint(self) -> list:
        """Changes when it, torch or this Python does."""
        stamps = [(self.folder / entry).stat().st_mtime_ns for entry in self.entries or () if (self.folder / entry).exists()]
        return [sys.executable, str(self.folder), self.version, torch_version(), *stamps]


def find(name: str) -> Installed | None:
    """The installed distribution of that name, else a package of that name without metadata, else None. Never what lies in the pack."""
    module = module_of(name)
    for folder in paths():
        infos = infos_of(name, folder)
        if infos:
            return Installed(name, folder, infos)
    for folder in paths():
        spec = importlib.machinery.PathFinder.find_spec(module, [str(folder)])
        if spec and spec.origin:
            return Installed(name, folder, [])
    return None


def paths() -> list[Path]:
    """The folders of `sys.path` without those that lead into the pack."""
    return [Path(entry) for entry in sys.path if entry and os.path.isdir(entry) and not leads_into_pack(Path(entry))]


def infos_of(name: str, folder: Path) -> list[Path]:
    """A distribution's folders of metadata there, .dist-info or .egg-info."""
    spelled = re.sub(r"[-_.]", "[-_.]", name)
    pattern = re.compile(rf"{spelled}(-[^-]+)?(-py[\d.]+)?\.(dist|egg)-info", re.IGNORECASE)
    try:
        return [folder / entry for entry in sorted(os.listdir(folder)) if pattern.fullmatch(entry)]
    except OSError:
        return []


def torch_version() -> str | None:
    """From its metadata: importing torch takes seconds, and on Windows locks its libraries."""
    for folder in paths():
        for info in infos_of("torch", folder):
            return field(text(info / "METADATA"), "Version") or version_of(info)
    return None


def version_of(info: Path) -> str | None:
    """The version that is in the folder's name."""
    match = re.match(r"[^-]+-([^-]+?)(-py[\d.]+)?\.(dist|egg)-info$", info.name)
    return match[1] if match else None


def field(metadata: str, name: str) -> str | None:
    """A line of metadata; None where that is missing."""
    match = re.search(rf"^{name}: *(\S.*?)\s*$", metadata, re.MULTILINE)
    return match[1] if match and match[1].isprintable() else None


def text(path: Path) -> str:
    return _bytes(path).decode("utf-8", errors="replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version or ""))
