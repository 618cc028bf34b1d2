"""The index of wheels, in a folder or on a server, and what may be downloaded from there."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

from . import Problem
from .installed import numbers
from .interpreter import supported_tags
from .wheel import record_of

WHEEL = re.compile(r"(sageattention|sageattention_launcher)-(\d+\.\d+\.\d+)-([\w.]+)-([\w.]+)-([\w.]+)\.whl", re.ASCII)
MAX_WHEEL, MAX_INDEX = 64 << 20, 1 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def origin(url: str) -> tuple[str, str]:
    """Scheme and host with port; refuses all but https, and http on this machine's loopback."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or (parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK)):
        raise Problem(f"{url!r} is refused: only https is allowed.")
    return parts.scheme, parts.netloc


class SameHost(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if origin(newurl) != origin(req.full_url):
            raise Problem(f"{req.full_url} redirects to another host, {newurl!r}: refused.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, limit: int, seconds: float) -> bytes:
    """What is there, as far as `limit` bytes and some, within `seconds` as a whole."""
    deadline, data = time.monotonic() + seconds, b""
    try:
        origin(url)
        with urllib.request.build_opener(SameHost).open(url, timeout=seconds) as answer:
            while len(data) <= limit:
                chunk = answer.read1(1 << 16)
                if not chunk:
                    return data
                data += chunk
                if time.monotonic() > deadline:
                    raise Problem(f"{url}: too slow, given up after {seconds:g} s.")
            return data
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Problem(f"{url}: {error}.") from error


class Index:
    """The wheels that there are; `where` is a folder, an index.json, or its URL. Refused when it names what can't be our wheel."""

    def __init__(self, where: str, seconds: float):
        self.where, self.seconds, self.remote = where, seconds, bool(re.match(r"\w\w+:", where))
        self.file = None if self.remote else Path(where) / "index.json" if Path(where).is_dir() else Path(where)
        try:
            data = self.file.read_bytes() if self.file else download(where, MAX_INDEX, seconds)
            self.wheels = [self._checked(entry) for entry in json.loads(data)["wheels"]]
        except OSError as error:
            raise Problem(f"The index {where} can't be read: {error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Problem(f"The index {where} is not one: {type(error).__name__}: {error}.") from error

    @staticmethod
    def _checked(entry: dict) -> dict:
        match = WHEEL.fullmatch(entry["file"])
        if not match or match[1].replace("_", "-") != entry["name"] or match[2] != entry["version"]:
            raise ValueError(f"{entry['file']!r} is no wheel of {entry['name']!r} {entry['version']!r}")
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]) or not 0 < entry["size"] <= MAX_WHEEL:
            raise ValueError(f"{entry['file']} has no proper sha256 and size")
        pythons, abis, platforms = (part.split(".") for part in match.groups()[2:])
        return {**entry, "tags": {f"{p}-{a}-{s}" for p in pythons for a in abis for s in platforms}}

    def best(self, name: str, version: str | None = None) -> Listed | None:
        """The newest wheel of that name (and version), by the tags' order among equals; None where nothing fits."""
        order = {tag: rank for rank, tag in enumerate(supported_tags())}
        named = (w for w in self.wheels if w["name"] == name and version in (None, w["version"]))
        ranked = [([-n for n in numbers(w["version"])], order[tag], w) for w in named for tag in w["tags"] & order.keys()]
        return Listed(self, min(ranked, key=lambda r: r[:2])[2]) if ranked else None


class Listed:
    """A wheel of an index. Attributes: name, version, file."""

    def __init__(self, index: Index, entry: dict):
        self.index, self.entry = index, entry
        self.name, self.version, self.file = entry["name"], entry["version"], entry["file"]

    def local(self) -> Path | None:
        """The wheel's file beside the index."""
        path = self.index.file.parent / self.file if self.index.file else None
        return path if path and path.is_file() else None

    def place(self) -> str:
        """Where pip gets it from."""
        return str(self.local() or next(iter(self.entry.get("urls", ())), self.file) + f"#sha256={self.entry['sha256']}")

    def record(self) -> dict[str, str]:
        """What it holds: path -> hash; empty where it is not at hand."""
        local = self.local()
        return record_of(local) if local else {}

    def bring(self, folder: Path) -> Path:
        """Its file, in `folder`, from the first place that has it as the index describes it. Raises Problem where none has."""
        beside, problems = self.local(), []
        urls = [urllib.parse.urljoin(self.index.where, self.file)] if self.index.remote else []
        for source in [*([beside] if beside else []), *urls, *self.entry.get("urls", ())]:
            try:
                data = source.read_bytes() if isinstance(source, Path) else download(source, self.entry["size"], self.index.seconds)
                if len(data) != self.entry["size"] or hashlib.sha256(data).hexdigest() != self.entry["sha256"]:
                    raise Problem(f"{source}: {len(data)} bytes that are not the wheel of the index (size or sha256 differ).")
            except Problem as problem:
                problems.append(str(problem))
                continue
            path = folder / self.file
            path.write_bytes(data)
            return path
        raise Problem(f"{self.file} is not to be had. " + (" ".join(problems) or "The index names no place."))
