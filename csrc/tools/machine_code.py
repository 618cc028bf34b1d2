"""Whether two builds of an image have the same kernels, whatever else differs.

The compiler keeps a variable for every static constant of every class it has met (--device-as-default-execution-space makes them
device variables), which no instruction reads. So renaming, adding or dropping a constant gives other bytes and the same kernels.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_HEADER, _SYMBOL = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")  # Elf64_Shdr, Elf64_Sym
_RELOCATION = {4: struct.Struct("<QQq"), 9: struct.Struct("<QQ")}  # SHT_RELA, SHT_REL
NO_BITS = 8
KERNEL_SECTIONS = (".text.", ".nv.constant0.", ".nv.constant2.", ".nv.shared.")
_MANGLED = re.compile(rb"_Z\w+")
_CONSTANT = re.compile(rb"^(?:\.visible |\.weak )?\.(?:global|const) [^\n]*\b_Z\w+[^\n]*;\n", re.MULTILINE)


def same_code(a: bytes, b: bytes) -> bool:
    """Whether two cubins, or two texts of PTX, have the same kernels."""
    if a == b:
        return True
    if a[:4] != b"\x7fELF" or b[:4] != b"\x7fELF":
        return _numbered(a) == _numbered(b)
    return a[0x30:0x34] == b[0x30:0x34] and _kernels(a) == _kernels(b)  # e_flags hold the architecture


def _numbered(ptx: bytes) -> bytes:
    """PTX without the constants, and with its other mangled names replaced by their number in order of appearance."""
    numbers: dict[bytes, int] = {}
    return _MANGLED.sub(lambda name: b"_Z%d" % numbers.setdefault(name[0], len(numbers)), _CONSTANT.sub(b"", ptx))


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int  # of a kernel's code: its barriers
    info: int  # of a kernel's code: its registers, above 24 bits; of relocations: their section's number
    content: bytes
    size: int


def _kernels(cubin: bytes) -> dict[str, object]:
    """What the GPU gets of each kernel, by section: code, constants, shared memory, and what is patched into the code."""
    sections = _sections(cubin)
    symbols = next(s.content for s in sections if s.name == ".symtab")
    names = next(s.content for s in sections if s.name == ".strtab")

    def symbol(number: int) -> str | bytes:
        name, kind, _, section, _, _ = _SYMBOL.unpack_from(symbols, number * _SYMBOL.size)
        return sections[section].name if kind & 15 == 3 else names[name : names.index(b"\0", name)]  # STT_SECTION has no name

    found: dict[str, object] = {}
    for s in sections:
        if s.name.startswith(KERNEL_SECTIONS):
            found[s.name] = (s.flags, s.info >> 24, s.size, s.content)
        elif s.kind in _RELOCATION and sections[s.info].name.startswith(KERNEL_SECTIONS):
            found[s.name] = [
                (at, info & 0xFFFFFFFF, symbol(info >> 32), *addend) for at, info, *addend in _RELOCATION[s.kind].iter_unpack(s.content)
            ]
    return found


def _sections(cubin: bytes) -> list[_Section]:
    (table,), (count, named) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3C)
    headers = [_HEADER.unpack_from(cubin, table + i * _HEADER.size) for i in range(count)]
    names = headers[named][4]
    return [
        _Section(
            cubin[names + name : cubin.index(b"\0", names + name)].decode(), kind, flags, info,
            b"" if kind == NO_BITS else cubin[at : at + size], size,
        )
        for name, kind, flags, _, at, size, _, info, _, _ in headers
    ]  # fmt: skip
