"""Kernel images: what one file of device code is, and which one a card runs. Pure data and pure functions, no CUDA.

Architectures are integers, 10 · major + minor of the compute capability (86 is 8.6, 120 is 12.0), or names as the compiler
spells them: "sm_86" for machine code (a cubin), "compute_80" for PTX, which the driver compiles for any later card.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from ctypes import Structure
from dataclasses import dataclass

from .. import settings
from ..errors import Unsupported

FORCE = "SAGEATTENTION_ARCH"
_FORCED = re.compile(r"(?:(sm|compute)_)?(\d{2,3})[af]?|(\d{1,2})\.(\d)")


@dataclass(frozen=True)
class Entry:
    """One kernel of an image: `SYMBOL(params)`, called on the device as `expression(params)`.

    `params` is the kernel's only parameter, passed by value; the C++ struct of the same name must have the same layout, which
    the build asserts field by field.
    """

    symbol: str
    expression: str  # C++, something callable with the struct
    params: type[Structure]
    threads: int  # per block
    min_blocks: int = 1  # resident per multiprocessor, for __launch_bounds__
    smem: str = "0"  # C++, a constant: dynamic shared memory of a launch, bytes; the build evaluates it for the manifest
    local: int = 0  # bytes of local memory per thread that the build accepts; more is a spill, and an error
    checks: tuple[str, ...] = ()  # C++, constants that the build asserts: what Python knows of the kernel's data


@dataclass(frozen=True, eq=False)  # a row of the table, equal to itself only
class Image:
    """One compiled file: kernels of one source for one architecture.

    `family` says whose tiles it carries where that differs from `arch`: the sm_80 kernels compiled for sm_90a have family 80.
    `released` images are part of the package; the others serve tests.
    """

    name: str
    arch: str
    source: str  # relative to csrc/
    entries: tuple[Entry, ...]
    family: int = 0  # 0: that of `arch`
    options: tuple[str, ...] = ()  # for the compiler, beyond the ones common to all
    released: bool = True

    @property
    def is_ptx(self) -> bool:
        return self.arch.startswith("compute_")

    @functools.cached_property
    def capability(self) -> int:
        """The architecture it is compiled for, as a number."""
        return int(re.sub(r"\D", "", self.arch))

    @property
    def tiles_of(self) -> int:
        """The architecture whose row of the variant's tiles it was compiled with."""
        return self.family or self.capability

    @functools.cached_property
    def path(self) -> str:
        """Its file below `kernels/`, with forward slashes."""
        suffix = f".f{self.family}" if self.family and self.family != self.capability else ""
        return f"{self.arch}/{self.name}{suffix}.{'ptx' if self.is_ptx else 'cubin'}.xz"

    def entry(self, symbol: str) -> Entry:
        """The kernel of that name.

        Raises:
            KeyError: the image has no such kernel.
        """
        for entry in self.entries:
            if entry.symbol == symbol:
                return entry
        raise KeyError(f"{self.path} has no kernel {symbol}, it has {', '.join(e.symbol for e in self.entries)}")

    def runs_on(self, arch: int) -> bool:
        """Whether a card of compute capability `arch` can execute it (CUDA C++ Programming Guide, "Binary Compatibility" and
        "PTX Compatibility"): machine code on the same major and the same or a later minor revision, an "a" target on that
        very revision, PTX on anything later."""
        if self.is_ptx:
            return arch >= self.capability
        if self.arch.endswith("a"):
            return arch == self.capability
        return arch // 10 == self.capability // 10 and arch >= self.capability


def select(images: Iterable[Image], name: str, arch: int, family: int = 0, ptx: bool = False) -> Image | None:
    """The image called `name` that a card of compute capability `arch` should run, or None.

    Machine code goes before PTX, the closest architecture before an older one. `family` asks for the tiles of another
    architecture (the closest there is, not above it); `ptx` accepts nothing but PTX.
    """
    named = [i for i in images if i.name == name]
    if family:
        closest = max((i.tiles_of for i in named if i.tiles_of <= family), default=0)
        named = [i for i in named if i.tiles_of == closest]
    able = [i for i in named if i.runs_on(arch) and (i.is_ptx or not ptx)]
    return max(able, key=lambda i: (not i.is_ptx, i.capability, i.tiles_of), default=None)


def forced() -> tuple[int, bool]:
    """What SAGEATTENTION_ARCH asks for: (family, PTX only); (0, False) where it is unset.

    "80", "8.0" and "sm_80" force the kernels of that architecture; "compute_80" forces them as PTX. Forced, even as "90", an
    architecture has no kernels that are made for one kind of device alone: that is how Hopper runs mma.sync.

    Raises:
        Unsupported: the variable holds something else.
    """
    text = settings.read(FORCE)
    if not text:
        return 0, False
    match = _FORCED.fullmatch(text)
    if not match:
        raise Unsupported(FORCE, f"the environment variable holds {text!r}, accepted are e.g. 80, 8.0, sm_80 and compute_80")
    kind, number, major, minor = match.groups()
    return int(number or f"{major}{minor}"), kind == "compute"


def describe(images: Iterable[Image], name: str) -> Iterator[str]:
    """The architectures an image exists for, in the table's order, for messages."""
    return (i.arch + (f" (tiles of {i.family})" if i.family else "") for i in images if i.name == name)
