"""The kernel images on disk: finds them, checks them against the manifest, unpacks them. No CUDA, no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

from .._version import __version__
from .binaries import Entry, Image

KERNELS = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
FORMAT = 1
RECORD = ("threads", "smem_dynamic", "smem_static", "params")  # what loading a kernel needs to know of it


class Unusable(Exception):
    """A kernel that can't be used here: its image or the manifest is missing or damaged, or this machine can't run it. The
    message names the file and the remedy."""


def remedy() -> str:
    """What to do about a damaged installation; names the version."""
    return f"reinstall sageattention {__version__} (from a checkout: python dev.py build)"


@functools.cache
def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unusable(f"{path} is missing, so no kernel can be verified; {remedy()}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{path} can't be read ({error}); {remedy()}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("images"), dict):
        found = content.get("format") if isinstance(content, dict) else None
        raise Unusable(f"{path} has format {found}, this version reads {FORMAT}; {remedy()}")
    try:
        for image in content["images"].values():
            int(image["sha256"], 16)
            for kernel in image["kernels"].values():
                _ = [kernel[key] for key in RECORD]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"{path} is damaged ({type(error).__name__}: {error}); {remedy()}") from error
    return content["images"]


def images() -> dict[str, dict[str, Any]]:
    """The manifest's word on each image, by its path; empty where there is no manifest that can be read."""
    try:
        return _manifest(KERNELS)
    except Unusable:  # reading any of its images raises the same
        return {}


def record(image: Image, entry: Entry) -> dict[str, Any]:
    """The manifest's word on one kernel: registers, shared memory, threads and the size of its parameters.

    Raises:
        Unusable: there is no manifest, or it does not hold the image, or holds it with other kernels than the table's.
    """
    known = _manifest(KERNELS).get(image.path)
    if known is None:
        raise Unusable(f"{KERNELS / MANIFEST} does not list {image.path}; {remedy()}")
    kernel = known["kernels"].get(entry.symbol)
    if kernel is None:
        raise Unusable(f"{KERNELS / image.path} has no kernel {entry.symbol}: it is of another version; {remedy()}")
    return kernel


def missing(image: Image) -> str:
    """Why this installation cannot have the image at all, or "" where the manifest lists it. Reads the manifest once."""
    try:
        listed = image.path in _manifest(KERNELS)
    except Unusable as error:
        return str(error)
    if not listed and not image.released:
        return f"{image.path} is for tests and no part of the package (from a checkout: python csrc/tools/build.py --arch {image.arch})"
    return "" if listed else f"{KERNELS / MANIFEST} does not list {image.path}; {remedy()}"


def read(image: Image) -> bytes:
    """An image ready for the driver: unpacked, verified, PTX with its closing NUL.

    Raises:
        Unusable: the file is missing, truncated, corrupt or another one than the manifest's.
    """
    known, path = _manifest(KERNELS).get(image.path), KERNELS / image.path
    if known is None:
        raise Unusable(f"{KERNELS / MANIFEST} does not list {image.path}; {remedy()}")
    try:
        data = lzma.decompress(path.read_bytes(), format=lzma.FORMAT_XZ)
    except FileNotFoundError:
        raise Unusable(f"{path} is missing; {remedy()}") from None
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise Unusable(f"{path} is truncated or corrupt ({error}); {remedy()}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != known["sha256"]:
        raise Unusable(f"{path} is not the file of the manifest (sha256 {digest[:16]}..., expected {known['sha256'][:16]}...); {remedy()}")
    return data + b"\0" if image.is_ptx else data
