"""Wheels: the package of this pack as one, written the same to the byte everywhere, and what a wheel holds."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from . import KEYWORD, PACK, PACKAGE, Problem

FIXED_TIME = (2020, 1, 1, 0, 0, 0)
TAG = "py3-none-any"
INSTALLER = b"sageattention-install\n"


def record_hash(data: bytes) -> str:
    """A file's hash as RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def write_record(rows: Iterable[tuple[str, str, int | str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def read_record(data: bytes) -> dict[str, str]:
    """Path -> hash ("" where it has none); of a damaged one, the rows that can still be read."""
    lines = data.replace(b"\0", b"").decode("utf-8", errors="replace").splitlines()
    return {row[0]: row[1] if len(row) > 1 else "" for row in csv.reader(lines) if row}


def write_wheel(folder: Path, metadata: str, tag: str, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write NAME-VERSION-TAG.whl: all times are fixed, and nothing is compressed unless asked for, as zlib's versions differ.

    Args:
        metadata: the METADATA file; name and version are taken from it.
        tag: such as "py3-none-any".
        files: path in the wheel -> content, without the dist-info folder.
    """
    fields = dict(line.split(": ", 1) for line in metadata.splitlines() if ": " in line)
    stem = f"{re.sub(r'[-_.]+', '_', fields['Name'])}-{fields['Version']}"
    pure = str(tag.endswith("none-any")).lower()
    wheel = f"Wheel-Version: 1.0\nGenerator: {PACKAGE}\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
    info = f"{stem}.dist-info"
    content = {**dict(sorted(files.items())), f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": wheel.encode()}
    rows = [(name, record_hash(data), len(data)) for name, data in content.items()]
    content[f"{info}/RECORD"] = write_record([*rows, (f"{info}/RECORD", "", "")])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # Unix, on Windows too
            archive.writestr(entry, data, compression)
    return path


def project(pack: Path = PACK) -> dict[str, str]:
    """The one-line texts of pyproject.toml's table [project]: Python 3.10 has no reader of TOML.

    Raises:
        Problem: there is none, or it has no version of the form X.Y.Z.
    """
    try:
        text = (pack / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Problem(f"{pack} is not whole: {error}. Install the node pack again.") from error
    table = re.search(r"^\[project\]$(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    found = dict(re.findall(r'^([\w-]+) = "([^"]*)"$', table[1] if table else "", re.MULTILINE))
    if not re.fullmatch(r"\d+\.\d+\.\d+", found.get("version", "")):
        raise Problem(f"{pack / 'pyproject.toml'} names no version: install the node pack again.")
    return found


class Bundle:
    """The package that lies in the pack, as a wheel. Attributes: name, version, file."""

    def __init__(self, pack: Path = PACK):
        self.pack, self.name, table = pack, PACKAGE, project(pack)
        self.version = table["version"]
        self.file = f"{PACKAGE}-{self.version}-{TAG}.whl"
        fields = [("Name", PACKAGE), ("Version", self.version), ("Summary", table.get("description")),
                  ("License-Expression", table.get("license")), ("Keywords", KEYWORD),
                  ("Requires-Python", table.get("requires-python"))]  # fmt: skip
        self.metadata = "Metadata-Version: 2.4\n" + "".join(f"{name}: {value}\n" for name, value in fields if value)

    def files(self) -> dict[str, bytes]:
        """The package's code, its kernels, the licence. Raises Problem where they can't be read."""
        try:
            paths = [p for pattern in ("**/*.py", "kernels/manifest.json", "kernels/*/*.xz") for p in (self.pack / PACKAGE).glob(pattern)]
            files = {path.relative_to(self.pack).as_posix(): path.read_bytes() for path in paths}
        except OSError as error:
            raise self._not_whole(str(error)) from error
        licence = self.pack / "LICENSE"
        if licence.is_file():
            files[f"{PACKAGE}-{self.version}.dist-info/licenses/LICENSE"] = licence.read_bytes()
        return files

    def record(self) -> dict[str, str]:
        """What the wheel holds: path -> hash."""
        info = f"{PACKAGE}-{self.version}.dist-info"
        return {**{name: record_hash(data) for name, data in self.files().items()}, f"{info}/METADATA": record_hash(self.metadata.encode())}

    def bring(self, folder: Path) -> Path:
        """The wheel's file, written into `folder`.

        Raises:
            Problem: a file of the pack is missing or damaged, as far as can be told: the kernels' manifest has their hashes.
        """
        files, kernels = self.files(), f"{PACKAGE}/kernels/"
        damaged = [name for name, data in files.items() if name.endswith(".py") and b"\0" in data]
        damaged += [] if f"{PACKAGE}/__init__.py" in files else ["__init__.py is missing"]
        try:
            listed = json.loads(files.get(kernels + "manifest.json", b'{"images": {}}'))["images"]
            damaged += [path for path, image in listed.items() if not _is_image(files.get(kernels + path), image["sha256"])]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._not_whole(f"kernels/manifest.json: {error}") from error
        if damaged:
            raise self._not_whole(", ".join(damaged[:3]))
        return write_wheel(folder, self.metadata, TAG, files)

    def _not_whole(self, what: str) -> Problem:
        return Problem(f"{self.pack / PACKAGE} is not whole ({what}): install the node pack again.")


def _is_image(packed: bytes | None, sha256: str) -> bool:
    try:
        return packed is not None and hashlib.sha256(lzma.decompress(packed)).hexdigest() == sha256
    except lzma.LZMAError:
        return False


def record_of(wheel: Path) -> dict[str, str]:
    """What a wheel holds: path -> hash. Empty where the file is none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
            return {path: digest for path, digest in read_record(archive.read(name)).items() if digest}
    except (zipfile.BadZipFile, zlib.error, StopIteration, OSError):
        return {}  # and fetching it will say more


def unpack(wheel: Path, module: str, folder: Path) -> None:
    """Unpack a wheel as PEP 427 has it, into a new folder. Such as ours only: files of `module` and its dist-info, no scripts, no data.

    Raises:
        Problem: it is not such a wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            info = next((name.split("/")[0] for name in names if re.fullmatch(rf"{module}-[\w.]+\.dist-info/RECORD", name)), None)
            tops = {name.split("/")[0] for name in names} - {info}
            odd = [name for name in names if any(part in ("", ".", "..") for part in re.split(r"[/\\]", name))]
            if info is None or odd or len(tops) != 1 or not re.fullmatch(rf"{module}(\.[\w.-]+)?", min(tops)):
                raise Problem(f"{wheel.name} holds more or less than {module}: {', '.join(odd[:3] or sorted(tops)[:3])}.")
            folder.mkdir()
            for name in names:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
            # pip and uv take out what RECORD names, and say who put it there.
            (folder / info / "INSTALLER").write_bytes(INSTALLER)
            row = (f"{info}/INSTALLER", record_hash(INSTALLER), len(INSTALLER))
            (folder / info / "RECORD").write_bytes(archive.read(f"{info}/RECORD") + write_record([row]))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise Problem(f"{wheel.name} is not a wheel: {error}.") from error
