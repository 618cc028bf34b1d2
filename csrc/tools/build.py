"""Build the kernel images: the table in `sageattention/kernels/table.py` and the sources in csrc/ become the files beside that table.

    python csrc/tools/build.py                 what has changed
    python csrc/tools/build.py --arch sm_80    one architecture; --only NAME: one image
    python csrc/tools/build.py --check         no compiler: is every committed image there, whole, and built from these sources?
    python csrc/tools/build.py --verify        compile everything again and compare the machine code

Each image is one translation unit, generated here: the source named in the table, assertions that its parameter structs are
laid out as their Python twins, and one extern "C" kernel per entry. Images are xz files; `manifest.json` tells for each what it
was built from and what its kernels take. The same inputs give the same bytes anywhere. A committed file stays as it is where the sources
have changed and the machine code has not (machine_code.py says what may differ).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import lzma
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CSRC = TOOLS.parent
sys.path.insert(0, str(TOOLS))  # for worker processes, which import this file by its path

import nvrtc  # noqa: E402
import sass_report  # noqa: E402
from machine_code import same_code  # noqa: E402
from package import KERNELS, import_module  # noqa: E402

MANIFEST = "manifest.json"
OPTIONS = ["--std=c++20", "--device-as-default-execution-space"]  # the latter for lambdas and constexpr functions
# The window covers the largest image; a larger preset's 64 MiB would be allocated again at every load.
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22}]
CONSTANTS = "sage/constants.cuh"  # a header that is written here and lies nowhere
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|\s+|\w+|.', re.DOTALL)


class BuildError(Exception):
    """An image can't be built, or is not what the sources give."""


@functools.cache
def constants() -> str:
    """The header `CONSTANTS`: what Python and C++ share of sageattention/numerics/constants.py."""
    shared = import_module("numerics.constants")
    lines = ["// Written by csrc/tools/build.py from sageattention/numerics/constants.py.", "#pragma once", "namespace sage {"]
    lines += [
        f"constexpr float {name} = {x!r}f;" if isinstance(x, float) else f"constexpr int {name} = {x};" for name, x in shared.CPP.items()
    ]
    for name, members in shared.CPP_ENUMS.items():
        lines.append(f"enum {name} : int {{ {', '.join(f'{member} = {number}' for member, number in members.items())} }};")
    return "\n".join([*lines, "}  // namespace sage", ""])


def load_table() -> tuple:
    """`IMAGES` of sageattention/kernels/table.py."""
    images = import_module("kernels.table").IMAGES
    paths = [i.path for i in images]
    symbols = [(i.path, e.symbol) for i in images for e in i.entries]
    for what, keys in (("image", paths), ("kernel", symbols)):
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise BuildError(f"table.IMAGES names one {what} twice: {', '.join(twice)}")
    return images


def _layout(struct: type[ctypes.Structure], done: set[str]) -> list[str]:
    """Assertions that a C++ struct, and the structs within it, have the layout of their Python twins."""
    name, lines = struct.__name__, []
    if name in done:
        return lines
    done.add(name)
    same = "has another layout than its Python twin"
    lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name} {same}");')
    for field, kind, *_ in struct._fields_:
        place, at = getattr(struct, field), f"(({name}*)0)->{field}"
        # NVRTC has no offsetof; __INTADDR__ is what its front end turns that into.
        lines.append(f'static_assert(__INTADDR__(&({at})) == {place.offset} && sizeof({at}) == {place.size}, "{name}::{field} {same}");')
        element = getattr(kind, "_type_", kind) if issubclass(kind, ctypes.Array) else kind
        if issubclass(element, ctypes.Structure):
            lines += _layout(element, done)
    return lines


def translation_unit(image) -> str:
    """The text that is compiled for an image."""
    done: set[str] = set()
    lines = [f'#include "{image.source}"', "namespace sage {"]
    for entry in image.entries:
        lines += _layout(entry.params, done)
        lines += [f'static_assert({check}, "the table of kernels says otherwise");' for check in entry.checks]
    lines += [
        f'extern "C" __global__ void __launch_bounds__({e.threads}, {e.min_blocks})\n'
        f"{e.symbol}(const __grid_constant__ {e.params.__name__} p) {{ {e.expression}(p); }}"
        for e in image.entries
    ]
    return "\n".join([*lines, "}  // namespace sage", ""])


def shared_memory(image, csrc: Path = CSRC) -> dict[str, int]:
    """Dynamic shared memory of each kernel, in bytes: the sources' constants, read from PTX that holds nothing else."""
    lines = [f'#include "{image.source}"', "namespace sage {"]
    lines += [f'extern "C" __device__ const int {e.symbol}_smem = {e.smem};' for e in image.entries]
    options = [*OPTIONS, f"--include-path={csrc}"]
    text, arch = "\n".join([*lines, "}", ""]), image.arch.replace("sm_", "compute_")
    ptx, _, _ = nvrtc.compile_text(text, f"{image.name}.smem.cu", arch, options, {CONSTANTS: constants()})
    found = dict(re.findall(r"\b(\w+)_smem(?: = (\d+))?;", ptx.decode()))
    return {e.symbol: int(found[e.symbol] or 0) for e in image.entries}


def include_closure(source: str, csrc: Path = CSRC) -> dict[str, str]:
    """Every header that `source` includes, itself first, by its path in `csrc`, with its text. Line ends are normalised."""
    found: dict[str, str] = {}
    queue = [csrc / source]
    while queue:
        path = queue.pop().resolve()
        key = path.relative_to(csrc.resolve()).as_posix()
        if key in found:
            continue
        found[key] = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        if f"#include <{CONSTANTS}>" in found[key]:
            found[CONSTANTS] = constants()
        for name in _INCLUDE.findall(found[key]):
            place = next((p for p in (path.parent / name, csrc / name) if p.is_file()), None)
            if place is None:
                raise BuildError(f'{key} includes "{name}", which is neither beside it nor in csrc/')
            queue.append(place)
    return found


@functools.cache
def code_of(text: str) -> str:
    """C++ as its tokens: without comments, and without white space but for the line ends of directives."""
    tokens: list[str] = []
    directive, line_begins = False, True
    for token in _TOKEN.findall(text.replace("\\\n", " ")):
        if token.isspace() or token.startswith(("//", "/*")):
            if "\n" in token:
                tokens += ["\n"] if directive else []
                directive, line_begins = False, True
        else:
            directive |= line_begins and token == "#"
            line_begins = False
            tokens.append(token)
    return " ".join(tokens)


def source_hash(image, csrc: Path = CSRC) -> str:
    """What the image depends on, as one sha256: compiler, options, and the code of the generated text and of all included files."""
    digest = hashlib.sha256()
    parts = [nvrtc.VERSION, image.arch, *OPTIONS, code_of(translation_unit(image)), *(e.smem for e in image.entries)]
    for key, text in sorted(include_closure(image.source, csrc).items()):
        parts += [key, code_of(text)]
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def compile_image(job: tuple[str, str, str, str]) -> tuple[bytes, dict[str, nvrtc.Usage], str, float]:
    """Worker: one translation unit to (image, usage by symbol, warnings, seconds). `job` is plain text, so any process can run it."""
    text, name, arch, csrc = job
    start = time.perf_counter()
    options = [*OPTIONS, f"--include-path={csrc}"]
    image, usage, warnings = nvrtc.compile_text(text, name, arch, options, {CONSTANTS: constants()})
    return image, usage, warnings, time.perf_counter() - start


def compile_all(images: Iterable, jobs: int, csrc: Path = CSRC, say: Callable[[str], None] = print):
    """Compile images in `jobs` processes; yields (image, bytes, usage) as they are done, and tells progress.

    Raises:
        BuildError: after all others are done, with the log of every source that was refused or warned of.
    """
    images, failed = list(images), []
    if not images:
        return
    # Fresh processes: a fork of one that has torch's threads may hang.
    with ProcessPoolExecutor(max(1, min(jobs, len(images))), multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(compile_image, (translation_unit(i), f"{i.name}.image.cu", i.arch, str(csrc))): i for i in images}
        for count, future in enumerate(as_completed(pending), 1):
            image = pending[future]
            head = f"[{count:3}/{len(images)}] {image.path:44}"
            try:
                binary, usage, warnings, seconds = future.result()
                if warnings:
                    raise nvrtc.CompileError(f"{image.path}: a warning fails the build\n{warnings}")
            except nvrtc.CompileError as error:
                failed.append(str(error))
                say(f"{head} FAILED")
                continue
            registers = max((u.registers for u in usage.values()), default=0)
            say(f"{head} {seconds:6.1f} s  {len(image.entries):2} kernels  {f'<= {registers} registers' if registers else 'PTX'}")
            yield image, binary, usage
    if failed:
        raise BuildError("\n".join(failed))


def spilling(image, usage: dict[str, nvrtc.Usage]) -> list[str]:
    """Kernels that use more local memory than their entry allows."""
    return [
        f"{image.path}: {symbol} keeps {u.stack} bytes per thread in local memory ({u.spills} bytes of spill code, {u.registers} registers)"
        for symbol, u in usage.items()
        if u.stack > image.entry(symbol).local or (u.spills and not image.entry(symbol).local)
    ]


def spilling_in_loop(image, binary: bytes, usage: dict[str, nvrtc.Usage]) -> list[str]:
    """Kernels whose main loop uses other local memory than `sass_report.LOOP_LOCAL` says: a value there that leaves the registers costs
    more than any tile gains.

    Raises:
        BuildError: there is no disassembler, and a kernel that uses local memory somewhere.
    """
    if not any(u.stack for u in usage.values()) and not any((image.arch, symbol) in sass_report.LOOP_LOCAL for symbol in usage):
        return []
    try:
        listing = sass_report.disassemble(sass_report.find_nvdisasm(), binary)
    except FileNotFoundError as error:
        raise BuildError(str(error)) from None
    beyond = {code.symbol: sass_report.spills(code, image.arch) for code in sass_report.parse(listing) if code.symbol in usage}
    return [
        f"{image.path}: {symbol} touches local memory {n:+} times in its main loop, beyond sass_report.LOOP_LOCAL"
        for symbol, n in beyond.items()
        if n
    ]


def pack(image: bytes) -> bytes:
    """An image as it is stored."""
    return lzma.compress(image, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=XZ_FILTERS)


def record(image, binary: bytes, usage: dict[str, nvrtc.Usage], shared: dict[str, int], source: str) -> dict:
    """The image's part of the manifest. Registers and spills are null where only the driver will know them (PTX)."""
    kernels = {}
    for entry in image.entries:
        used = usage.get(entry.symbol)
        if used is None and not image.is_ptx:
            raise BuildError(f"{image.path}: the assembler's report does not name {entry.symbol}")
        kernels[entry.symbol] = {
            "registers": used and used.registers,
            "spills": used and used.stack + used.spills,
            "smem_static": used and used.smem,
            "smem_dynamic": shared[entry.symbol],
            "threads": entry.threads,
            "min_blocks": entry.min_blocks,
            "params": ctypes.sizeof(entry.params),
        }
    return {
        "name": image.name, "arch": image.arch, "family": image.capability, "compiler": nvrtc.VERSION, "source": source,
        "sha256": hashlib.sha256(binary).hexdigest(), "bytes": len(binary), "kernels": kernels,
    }  # fmt: skip


def read_manifest(kernels: Path = KERNELS) -> dict:
    """The manifest's images by path; empty where there is none yet."""
    path = kernels / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["images"] if path.is_file() else {}


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def write_manifest(images: dict, kernels: Path = KERNELS) -> None:
    text = json.dumps({"format": 1, "images": dict(sorted(images.items()))}, indent=1, sort_keys=True)
    _replace(kernels / MANIFEST, text.encode() + b"\n")


def stored(path: str, kernels: Path = KERNELS) -> bytes | None:
    """An image's bytes as they are in the package, or None where the file is missing or damaged."""
    file = kernels / path
    try:
        return lzma.decompress(file.read_bytes(), format=lzma.FORMAT_XZ) if file.is_file() else None
    except (lzma.LZMAError, EOFError):
        return None


def stale(image, manifest: dict, kernels: Path = KERNELS, csrc: Path = CSRC) -> str:
    """Why an image has to be built again; empty where it has not."""
    known = manifest.get(image.path)
    if known is None:
        return "not in the manifest"
    if known["source"] != source_hash(image, csrc):
        return "its sources, its entries or the compiler have changed"
    data = stored(image.path, kernels)
    if data is None:
        return "the file is missing or damaged"
    return "" if hashlib.sha256(data).hexdigest() == known["sha256"] else "the file is not the one in the manifest"


def build(table: tuple, chosen: list, jobs: int, kernels: Path = KERNELS, csrc: Path = CSRC, say: Callable[[str], None] = print) -> int:
    """Build what is stale among `chosen`, drop what the table no longer names. Returns the number of images built.

    Raises:
        BuildError: a source does not compile, or a kernel spills; images that are fine are written all the same.
    """
    manifest, names = read_manifest(kernels), {i.path for i in table}
    for path in [p for p in manifest if p not in names]:
        del manifest[path]
    wanted = [(i, why) for i in chosen if (why := stale(i, manifest, kernels, csrc))]
    say(f"{len(chosen) - len(wanted)} images are up to date, {len(wanted)} to build")
    bad: list[str] = []
    try:
        for image, binary, usage in compile_all((i for i, _ in wanted), jobs, csrc, say):
            if spilled := spilling(image, usage) or spilling_in_loop(image, binary, usage):
                bad += spilled
                continue
            before = stored(image.path, kernels)
            if before is not None and same_code(binary, before):
                binary = before
            else:
                _replace(kernels / image.path, pack(binary))
            manifest[image.path] = record(image, binary, usage, shared_memory(image, csrc), source_hash(image, csrc))
    finally:
        write_manifest(manifest, kernels)
    for path in sorted(kernels.glob("*/*.xz")):
        if path.relative_to(kernels).as_posix() not in names:
            say(f"removed {path.relative_to(kernels).as_posix()}: the table does not name it")
            path.unlink()
    if bad:
        raise BuildError("local memory in kernels:\n" + "\n".join(bad))
    return len(wanted)


def check(chosen: list, kernels: Path = KERNELS, csrc: Path = CSRC) -> list[str]:
    """What --check finds: one line for each image that is not built from the present sources."""
    manifest = read_manifest(kernels)
    return [f"{i.path}: {why}" for i in chosen if (why := stale(i, manifest, kernels, csrc))]


def verify(chosen: list, jobs: int, kernels: Path = KERNELS, csrc: Path = CSRC, say: Callable[[str], None] = print) -> list[str]:
    """Compile again; one line for each image whose committed code differs from what its sources give."""
    differing = check(chosen, kernels, csrc)
    for image, binary, _ in compile_all(chosen, jobs, csrc, say):
        before = stored(image.path, kernels)
        if before is None or not same_code(binary, before):
            differing.append(f"{image.path}: compiling it again gives other machine code")
    return differing


def released(table: tuple) -> list:
    """The images that the package holds."""
    return [image for image in table if image.released]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the kernel images of sageattention.")
    parser.add_argument(
        "--arch", action="append", help="only this architecture, e.g. sm_80 or compute_80; may be repeated (default: all of the package)"
    )
    parser.add_argument("--only", action="append", help="only images of this name; may be repeated")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes (2)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="no compiler: compare the committed images with the sources' hashes")
    what.add_argument("--verify", action="store_true", help="compile again and compare the machine code")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        table = load_table()
        chosen = [i for i in table if i.arch in args.arch] if args.arch else released(table)
        chosen = [i for i in chosen if not args.only or i.name in args.only]
        if not chosen:
            raise BuildError("no image of table.IMAGES has that architecture and name")
        if args.check or args.verify:
            differing = check(chosen) if args.check else verify(chosen, args.jobs)
            print("\n".join(differing) or f"{len(chosen)} images are what the sources give")
            return 1 if differing else 0
        built = build(table, chosen, args.jobs)
    except (BuildError, nvrtc.CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(p.stat().st_size for p in KERNELS.glob("*/*.xz"))
    print(f"built {built} images in {time.perf_counter() - start:.1f} s; {len(table)} in all, {size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
