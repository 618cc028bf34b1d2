"""Which images the tests on a card have passed with. Where an architecture's have changed since, its cards verify them (verify.py)."""

from __future__ import annotations

import functools
import hashlib

from . import store

# Family → `digest` of its images when `pytest -m gpu` last passed with them. Written by csrc/tools/prove.py.
PROVEN: dict[int, str] = {
    90: "e95f7fce9838315591cc5ae2671b4fdb",
}


@functools.cache
def digest(family: int) -> str:
    """Of all images of a family that the manifest lists; "" where it lists none."""
    listed = sorted((path, image["sha256"]) for path, image in store.images().items() if image["family"] == family)
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:32] if listed else ""


def proven(family: int) -> bool:
    """Whether the images of a family are those that the tests have passed with."""
    return PROVEN.get(family, "-") == digest(family)
