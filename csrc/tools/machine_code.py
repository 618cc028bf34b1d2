"""Whether two builds of an image differ in nothing but the names of C++ constants.

The compiler lists the static constants of every class it has met, by mangled name, in a cubin's symbol table (PTX: in declarations),
so renaming one in the sources gives other bytes and the same instructions.
"""

from __future__ import annotations

import re
import struct

# Section types: SHT_SYMTAB and, from sm_100 on, the same beside it as .nv.merc.symtab; SHT_STRTAB; SHT_NOBITS.
SYMBOLS, STRINGS, NO_BITS = (2, 0x70000085), 3, 8
_HEADER, _SYMBOL = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")  # Elf64_Shdr, Elf64_Sym
_MANGLED = re.compile(rb"_Z\w+")


def same_code(a: bytes, b: bytes) -> bool:
    """Whether two cubins, or two texts of PTX, are the same but for names of C++ symbols."""
    if a == b:
        return True
    if a[:4] != b"\x7fELF" or b[:4] != b"\x7fELF":
        return _numbered(a) == _numbered(b)
    return a[:0x18] == b[:0x18] and a[0x30:0x34] == b[0x30:0x34] and _sections(a) == _sections(b)  # identification, flags, sections


def _numbered(ptx: bytes) -> bytes:
    """PTX with its mangled names replaced by their number in order of appearance."""
    numbers: dict[bytes, int] = {}
    return _MANGLED.sub(lambda name: b"_Z%d" % numbers.setdefault(name[0], len(numbers)), ptx)


def _sections(cubin: bytes) -> list[tuple]:
    """(type, flags, link, info, alignment, content) of each section: without the strings, and with symbols that have no names."""
    (table,), (count,) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<H", cubin, 0x3C)
    found: list[tuple] = []
    for i in range(count):
        _, kind, flags, _, at, size, link, info, alignment, _ = _HEADER.unpack_from(cubin, table + i * _HEADER.size)
        content = size if kind == NO_BITS else cubin[at : at + size]
        if kind in SYMBOLS:
            content = [symbol[1:] for symbol in _SYMBOL.iter_unpack(content)]
        found.append((kind, flags, link, info, alignment, None if kind == STRINGS else content))
    return found
