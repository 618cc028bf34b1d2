"""One line per kernel about its machine code: registers, shared memory, resident warps, and its main loop per matrix instruction.

    python csrc/tools/sass_report.py [--arch sm_80] [--only NAME] [--symbol PART]    the built images
    python csrc/tools/sass_report.py --mix --symbol PART                             and the main loop's instruction mix

Needs `nvdisasm`: on PATH, or as Triton or NVIDIA's PyPI packages bundle it. The main loop is the innermost backward branch
with the most matrix instructions in its body, what is seldom run inside it included. PTX images have no machine code and are left out.
Exits with 1 where an instruction of a main loop touches local memory and `LOOP_LOCAL` does not say so.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package import KERNELS, import_module

ARCHITECTURES = import_module("kernels.architectures").ARCHITECTURES
BUNDLES = ("triton", "triton-windows", "nvidia-cuda-nvdisasm", "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")

MMA = {"HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA"}
CONVERSIONS = {"I2F", "I2FP", "F2I", "F2F", "F2FP", "I2I", "F2IP", "FRND", "I2IP"}
LOCAL = {"LDL", "STL"}
# How many instructions of a main loop touch local memory where no tile and no order of the code that was tried is without; elsewhere none
# may. At head_dim 256 the compiler lays O and the operands of more MMAs than needed side by side, and comes out a register or two short.
LOOP_LOCAL: dict[tuple[str, str], int] = {
    # Emulated FP8; tried: Q in registers or shared, one to four stages, all ways to keep less in registers, barriers between the parts.
    ("sm_100", "attend_mma_fp8_d256_none_fp8"): 1,
    ("sm_100", "attend_mma_fp8_d256_causal_fp8"): 1,
    ("sm_100", "attend_mma_fp8_d256_packed_fp8"): 1,
    # Lists at head_dim 256; tried: 15 to 19 shapes each (one to four stages, four to twelve warps, Q and loop state in shared memory).
    ("sm_75", "attend_mma_fp16_d256_list_fp32"): 5,
    ("sm_75", "attend_mma_fp16_d256_list_fp16"): 5,
    ("sm_89", "attend_mma_fp8_d256_list_fp8"): 1,
    ("sm_90a", "attend_mma_int8_d64_list_int32"): 1,
    ("sm_100", "attend_mma_int8_d128_list_int32"): 1,
    ("sm_100", "attend_mma_fp8_d256_list_fp16"): 1,
    ("sm_100", "attend_mma_fp8_d256_list_fp8"): 15,
    ("sm_120", "attend_mma_fp16_d256_list_fp16"): 3,
    ("sm_120", "attend_mma_int8_d256_list_int32"): 1,
    ("sm_120", "attend_mma_fp8_d256_list_fp8"): 3,
    # Row scales and a barrier's parity, read again each tile behind products under way; O, the scores and P take 212 of 240 registers.
    ("sm_90a", "attend_wgmma_fp8_wide_d256_list_fp8"): 3,
}

REGISTERS = 65536  # of a multiprocessor, dealt out in units of 256 a warp

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*)([.A-Z0-9_a-z]*)\s*(.*)$")
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_SECTION = re.compile(r"^//-+ \.text\.(\S+)\s")


@dataclass
class Code:
    """One kernel's instructions (opcode without modifiers) and its loops as [first, last] instruction numbers."""

    symbol: str
    opcodes: list[str] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)

    def count(self, opcodes: set[str], span: tuple[int, int] | None = None) -> int:
        first, last = span or (0, len(self.opcodes) - 1)
        return sum(op in opcodes for op in self.opcodes[first : last + 1])

    def main_loop(self) -> tuple[int, int] | None:
        """The innermost loop with the most MMAs, the shorter of equals; None where no loop holds any.

        What begins within a loop and ends behind it is none: code that stands behind the kernel, such as a wait, and jumps back."""
        busy = [s for s in self.loops if self.count(MMA, s)]
        busy = [s for s in busy if not any(o[0] < s[0] <= o[1] < s[1] for o in busy)]
        inner = [s for s in busy if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in busy)]
        return max(inner, key=lambda s: (self.count(MMA, s), s[0] - s[1]), default=None)


def find_nvdisasm() -> str:
    """The disassembler's path.

    Raises:
        FileNotFoundError: it is in none of the usual places.
    """
    name = "nvdisasm.exe" if os.name == "nt" else "nvdisasm"
    found = shutil.which(name)
    if found:
        return found
    for package in BUNDLES:
        try:
            files = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == name:
                return str(file.locate())
    raise FileNotFoundError(f"no {name} on PATH nor in {', '.join(BUNDLES)}; pip install triton, or put the CUDA toolkit's bin on PATH")


def disassemble(nvdisasm: str, cubin: bytes) -> str:
    """nvdisasm's listing of a cubin's code sections."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.cubin"
        file.write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", str(file)], check=True, capture_output=True, text=True).stdout


def parse(listing: str) -> Iterator[Code]:
    """The kernels of a listing."""
    code: Code | None = None
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            if code:
                yield code
            code, labels = Code(section[1]), {}
        elif code and (label := _LABEL.match(line)):
            labels[label[1]] = len(code.opcodes)
        elif code and (instruction := _INSTRUCTION.match(line)):
            _, opcode, _, operands = instruction.groups()
            if opcode == "NOP":
                continue
            target = _TARGET.search(operands) if opcode == "BRA" else None
            here = len(code.opcodes)
            if target and labels.get(target[1], here) < here:
                code.loops.append((labels[target[1]], here))
            code.opcodes.append(opcode)
    if code:
        yield code


HEADER = (
    f"{'kernel':38} {'arch':7} {'regs':>4} {'local':>5} {'smem KiB':>8} {'warps':>6} | {'loop':>5} {'MMA':>4} {'per MMA: all':>12} "
    f"{'LDS':>4} {'cvt':>4} {'MUFU':>4} | {'L/STL':>5}"
)


def resident_warps(arch: int, known: dict) -> int:
    """Warps of a kernel that a multiprocessor holds at once."""
    warps = known["threads"] // 32
    shared = (known["smem_static"] or 0) + known["smem_dynamic"] + (1024 if arch >= 80 else 0)
    by_registers = REGISTERS // (warps * -(-known["registers"] // 8) * 256)
    return warps * min(by_registers, ARCHITECTURES[arch].warps // warps, ARCHITECTURES[arch].shared * 1024 // max(shared, 1))


def spills(code: Code, arch: str) -> int:
    """How many instructions of the main loop touch local memory beyond what is known; negative: `LOOP_LOCAL` allows too many."""
    loop = code.main_loop()
    return (code.count(LOCAL, loop) if loop else 0) - LOOP_LOCAL.get((arch, code.symbol), 0)


def line(code: Code, arch: str, known: dict) -> str:
    """The report of one kernel. `known` is its part of the manifest."""
    smem = ((known["smem_static"] or 0) + known["smem_dynamic"]) / 1024
    number = int(re.sub(r"\D", "", arch))
    warps = f"{resident_warps(number, known)}/{ARCHITECTURES[number].warps}"
    text = f"{code.symbol:38} {arch:7} {known['registers']:4} {known['spills']:5} {smem:8.1f} {warps:>6} | "
    loop = code.main_loop()
    if loop is None:
        return text + f"{'-':>5}"
    size, mma = loop[1] - loop[0] + 1, code.count(MMA, loop)
    lds, cvt, mufu = (code.count(opcodes, loop) / mma for opcodes in ({"LDS", "LDSM"}, CONVERSIONS, {"MUFU"}))
    return text + f"{size:5} {mma:4} {size / mma:12.2f} {lds:4.2f} {cvt:4.2f} {mufu:4.2f} | {code.count(LOCAL, loop):5}"


def mix(code: Code) -> str:
    """The main loop's opcodes by frequency."""
    loop = code.main_loop()
    if loop is None:
        return "    no loop with an MMA"
    counted = collections.Counter(code.opcodes[loop[0] : loop[1] + 1])
    return "    " + "  ".join(f"{op} {n}" for op, n in counted.most_common())


def images(arch: list[str] | None, only: list[str] | None) -> Iterable[tuple[str, dict]]:
    """(path, manifest record) of the built cubins."""
    manifest = json.loads((KERNELS / "manifest.json").read_text(encoding="utf-8"))["images"]
    for path, known in manifest.items():
        if path.endswith(".cubin.xz") and (not arch or known["arch"] in arch) and (not only or known["name"] in only):
            yield path, known


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One line per built kernel about its machine code.")
    parser.add_argument("--arch", action="append", help="only this architecture, e.g. sm_80; may be repeated")
    parser.add_argument("--only", action="append", help="only images of this name; may be repeated")
    parser.add_argument("--symbol", default="", help="only kernels whose symbol contains this")
    parser.add_argument("--mix", action="store_true", help="also the main loop's instruction mix")
    args = parser.parse_args(argv)
    try:
        nvdisasm = find_nvdisasm()
        chosen = list(images(args.arch, args.only))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(HEADER)
    spilling = []
    for path, known in chosen:
        for code in parse(disassemble(nvdisasm, lzma.decompress((KERNELS / path).read_bytes()))):
            if args.symbol in code.symbol and code.symbol in known["kernels"]:
                print(line(code, known["arch"], known["kernels"][code.symbol]))
                if spills(code, known["arch"]):
                    spilling.append(f"{path}: {code.symbol}")
                if args.mix:
                    print(mix(code))
    if spilling:
        print("more or less local memory than LOOP_LOCAL says in the main loop of\n" + "\n".join(spilling), file=sys.stderr)
    return int(bool(spilling))


if __name__ == "__main__":
    sys.exit(main())
