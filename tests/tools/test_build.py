"""The build: same inputs, same bytes; only what changed; nothing that spills, differs in layout or is out of date."""

from __future__ import annotations

import ctypes
import dataclasses
import lzma
import shutil
import subprocess
import sys
import types

import pytest
from stub import DEMO_CSRC, DEMO_KERNELS, ENTRIES, TABLE, TOOLS, DemoParams, build, by_path, nvrtc

from sageattention.kernels.binaries import Entry, Image

FEW = tuple(i for i in TABLE if i.arch in ("sm_75", "sm_90a", "compute_80"))


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        nvrtc.headers(), nvrtc._library()
    except nvrtc.CompileError as error:
        pytest.skip(f"no compiler: {error}")


@pytest.fixture
def csrc(tmp_path):
    return shutil.copytree(DEMO_CSRC, tmp_path / "csrc")


def make(table, kernels, csrc, jobs=1):
    return build.build(tuple(table), list(table), jobs, kernels, csrc, say=lambda text: None)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_target_compiles_and_a_second_build_elsewhere_gives_the_same_bytes(tmp_path, csrc):
    assert make(TABLE, tmp_path / "a", csrc, jobs=2) == len(TABLE)
    other = shutil.copytree(csrc, tmp_path / "deeply/nested/place")
    text = (csrc / "demo.cuh").read_text(encoding="utf-8")
    (other / "demo.cuh").write_bytes(text.replace("\n", "\r\n").encode())  # a checkout with Windows line ends
    make(TABLE, tmp_path / "b", other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {i.path for i in TABLE} | {build.MANIFEST}
    machine = [build.stored(i.path, tmp_path / "a") for i in TABLE if not i.is_ptx]
    assert all(m[:4] == b"\x7fELF" for m in machine) and len(set(machine)) == len(machine)
    assert b".target sm_80" in build.stored("compute_80/demo.ptx.xz", tmp_path / "a")
    assert not any(str(tmp_path).encode() in build.stored(i.path, tmp_path / "a") for i in TABLE)


def test_the_manifest_tells_what_each_kernel_takes(tmp_path, csrc):
    make(FEW, tmp_path / "k", csrc)
    manifest = build.read_manifest(tmp_path / "k")
    kernels = manifest["sm_90a/demo.cubin.xz"]["kernels"]
    assert kernels["demo_triple"] | {"registers": 0} == {
        "registers": 0, "spills": 0, "smem_static": 0, "smem_dynamic": 98304, "threads": 128, "min_blocks": 2,
        "params": ctypes.sizeof(DemoParams),
    }  # fmt: skip
    assert 8 <= kernels["demo_triple"]["registers"] <= 64
    assert manifest["compute_80/demo.ptx.xz"]["kernels"]["demo_double"]["registers"] is None
    assert manifest["sm_75/demo.cubin.xz"]["compiler"].startswith("NVRTC 12.8.93")


def test_only_what_changed_is_built_again(tmp_path, csrc):
    kernels = tmp_path / "k"
    make(FEW, kernels, csrc)
    assert make(FEW, kernels, csrc) == 0
    (kernels / "sm_75/demo.cubin.xz").write_bytes(b"damaged")
    assert make(FEW, kernels, csrc) == 1
    (kernels / "sm_75/demo.cubin.xz").unlink()
    assert make(FEW, kernels, csrc) == 1
    changed = (dataclasses.replace(FEW[0], entries=ENTRIES[:1]), *FEW[1:])
    assert make(changed, kernels, csrc) == 1
    (csrc / "sub/unrelated.cuh").write_text("#error not included")
    assert make(changed, kernels, csrc) == 0
    (csrc / "sub/size.cuh").write_text("// One.\nnamespace sage {\n\n  constexpr int  kSize=1 ;  // a comment\n}\n")
    assert make(changed, kernels, csrc) == 0
    (csrc / "sub/size.cuh").write_text("namespace sage { constexpr int kSize = 2; }\n")  # included by the source
    assert build.check(list(changed), kernels, csrc) == [
        f"{i.path}: its sources, its entries or the compiler have changed" for i in changed
    ]
    assert make(changed, kernels, csrc) == len(FEW)


@pytest.mark.parametrize("path", ["sm_75/demo.cubin.xz", "compute_80/demo.ptx.xz"])
def test_an_image_stays_as_it_is_where_only_constants_differ(tmp_path, csrc, path):
    def built(name, folder):
        member = f"struct Sizes {{ static constexpr int {name}; }};\n"
        (csrc / "sub/size.cuh").write_text(f"namespace sage {{ {member}constexpr const int& kSize = Sizes::{name.split()[0]}; }}\n")
        make((by_path(path),), folder, csrc)
        return build.stored(path, folder), build.read_manifest(folder)[path]

    first, before = built("kOne = 1", tmp_path / "k")
    again, after = built("kUnit = 1, kAnother = 5", tmp_path / "k")
    elsewhere, _ = built("kUnit = 1, kAnother = 5", tmp_path / "other")
    assert again == first != elsewhere and build.same_code(first, elsewhere)
    assert before["source"] != after["source"] and before["sha256"] == after["sha256"]
    assert build.verify([by_path(path)], 1, tmp_path / "k", csrc, say=lambda text: None) == []
    (csrc / "sub/size.cuh").write_text("namespace sage { constexpr int kSize = 2; }\n")
    make((by_path(path),), tmp_path / "k", csrc)
    assert not build.same_code(first, build.stored(path, tmp_path / "k"))


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("int x = 1;  // one", "int x=1;", True),
        ("f(a,\n  b)", "f(a, b)", True),
        ("int x; /* a\nb */ int y;", "int x; int y;", True),
        ("#define A 1 \\\n  + 2\nint x;", "#define A 1 + 2\nint x;", True),
        ('asm("a // b");', 'asm("a // c");', False),
        ('asm("a b");', 'asm("a  b");', False),
        ("int ab;", "int a b;", False),
        ("#define A\nint x;", "#define A int x;", False),
        ("int x; // #if 0\nint y;", "int x;\n#if 0\nint y;", False),
    ],
)
def test_only_code_counts_as_a_source(one, other, same):
    assert (build.code_of(one) == build.code_of(other)) == same


def test_an_image_that_left_the_table_is_removed(tmp_path, csrc):
    kernels = tmp_path / "k"
    make(FEW, kernels, csrc)
    make(FEW[1:], kernels, csrc)
    assert set(contents(kernels)) == {i.path for i in FEW[1:]} | {build.MANIFEST}
    assert set(build.read_manifest(kernels)) == {i.path for i in FEW[1:]}


def test_verify_sees_an_image_that_the_sources_do_not_give(tmp_path, csrc):
    kernels = tmp_path / "k"
    make(FEW, kernels, csrc)
    assert build.verify(list(FEW), 1, kernels, csrc, say=lambda text: None) == []
    code = build.stored("sm_75/demo.cubin.xz", kernels)
    first = bytes.fromhex("027a0100000a0000")  # MOV R1, c[0x0][0x28]: how every kernel begins
    assert first in code
    other = code.replace(first, bytes.fromhex("027a0200000a0000"), 1)
    (kernels / "sm_75/demo.cubin.xz").write_bytes(build.pack(other))
    assert build.verify(list(FEW), 1, kernels, csrc, say=lambda text: None) == [
        "sm_75/demo.cubin.xz: the file is not the one in the manifest",
        "sm_75/demo.cubin.xz: compiling it again gives other machine code",
    ]


def test_a_kernel_that_spills_fails_the_build_and_is_not_written(tmp_path, csrc):
    spilling = Image("spilling", "sm_80", "demo.cuh", (Entry("demo_spill", "spill<1>", DemoParams, 1024, 2),))
    with pytest.raises(build.BuildError, match=r"sm_80/spilling.cubin.xz: demo_spill keeps [0-9]+ bytes per thread in local memory"):
        make((*FEW, spilling), tmp_path / "k", csrc)
    assert set(build.read_manifest(tmp_path / "k")) == {i.path for i in FEW}
    assert not (tmp_path / "k/sm_80").exists()


SERIALISED = """
#include "demo.cuh"
namespace sage {
__device__ __forceinline__ void serialised(const DemoParams& p) {  // reads an accumulator while the product is under way
  float d[4] = {};
  const unsigned long long at = p.n;
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3},%4,%4,1,1,1,0,0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(at));
  p.y[threadIdx.x] = d[0];
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
}
}  // namespace sage
"""
UNUSED = '#include "demo.cuh"\nnamespace sage { __device__ void serialised(const DemoParams& p) { int unused; } }\n'


@pytest.mark.parametrize("text, warning", [(SERIALISED, "C75"), (UNUSED, "never referenced")], ids=["serialised wgmma", "unused"])
def test_a_warning_fails_the_build(tmp_path, csrc, text, warning):
    (csrc / "warned.cuh").write_text(text)
    image = Image("warned", "sm_90a", "warned.cuh", (Entry("demo_warned", "serialised", DemoParams, 128),))
    with pytest.raises(build.BuildError, match=rf"(?s)sm_90a/warned\.cubin\.xz: a warning fails the build.*{warning}"):
        make((image,), tmp_path / "k", csrc)
    assert not (tmp_path / "k/sm_90a").exists()


FIELDS = dict(DemoParams._fields_)
TWINS = {
    "DemoParams::n has another layout": {k: FIELDS[k] for k in ("x", "y", "factor", "n")},
    "DemoParams::y has another layout": FIELDS | {"y": ctypes.c_uint32},
    "DemoParams has another layout": FIELDS | {"more": ctypes.c_int64},
    "Pair::stride has another layout": FIELDS
    | {"x": type("Pair", (ctypes.Structure,), {"_fields_": (("stride", ctypes.c_int64), ("data", ctypes.c_uint64))})},
}


@pytest.mark.parametrize("said", TWINS)
def test_a_struct_laid_out_differently_on_the_two_sides_does_not_compile(tmp_path, csrc, said):
    wrong = type("DemoParams", (ctypes.Structure,), {"_fields_": tuple(TWINS[said].items())})
    image = Image("wrong", "sm_80", "demo.cuh", (Entry("demo_wrong", "scale<1>", wrong, 256),))
    with pytest.raises(build.BuildError, match=said):
        make((image,), tmp_path / "k", csrc)


def test_a_source_that_does_not_compile_is_told_and_the_others_are_built(tmp_path, csrc):
    (csrc / "broken.cuh").write_text('#include "demo.cuh"\nnamespace sage { int x = undeclared; }\n')
    with pytest.raises(build.BuildError, match='"undeclared" is undefined'):
        make((dataclasses.replace(FEW[0], name="broken", source="broken.cuh"), *FEW), tmp_path / "k", csrc)
    assert set(build.read_manifest(tmp_path / "k")) == {i.path for i in FEW}
    (csrc / "broken.cuh").write_text('#include "nowhere.cuh"\n')
    with pytest.raises(build.BuildError, match=r'source file "nowhere\.cuh"'):
        make((dataclasses.replace(FEW[0], name="broken", source="broken.cuh"),), tmp_path / "k", csrc)


def test_an_unpacked_image_is_small_to_load(tmp_path):
    """A loader's memory is the window stated in the file, not the preset's."""
    data = build.pack(bytes(1 << 16))
    assert lzma.decompress(data, memlimit=6 << 20) == bytes(1 << 16)
    with pytest.raises(lzma.LZMAError):
        lzma.decompress(lzma.compress(bytes(1 << 16), preset=9), memlimit=6 << 20)


def test_the_assemblers_report_is_read_per_kernel():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k2' for 'sm_80'
ptxas info    : Function properties for k2
ptxas         .     1424 bytes stack frame, 1504 bytes spill stores, 1792 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1424 bytes cumulative stack size, 640 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 200 registers, used 1 barriers, 376 bytes cmem[0]
"""
    assert nvrtc.usage(log) == {"k2": nvrtc.Usage(32, 1424, 3296, 640), "k": nvrtc.Usage(200, 0, 0, 0)}


def test_the_demo_images_of_the_gpu_tests_are_up_to_date():
    assert build.verify(list(TABLE), 1, DEMO_KERNELS, DEMO_CSRC) == []


# --- the package's own images ---


@pytest.fixture
def committed():
    if not (build.KERNELS / build.MANIFEST).exists():
        pytest.skip("no kernel images in this checkout; run dev.py build")


def test_every_committed_image_is_built_from_the_present_sources(committed):
    assert build.check(build.released(build.load_table())) == []


def test_committed_images_are_built_again_to_the_same_bytes(committed):
    """One that is quick to compile; a scheduled workflow builds all again."""
    paths = ("sm_86/attend_mma_int8_d64.cubin.xz",)
    chosen = [image for image in build.load_table() if image.path in paths]
    assert len(chosen) == len(paths) and build.verify(chosen, 1) == []


def test_a_table_that_names_a_file_or_a_kernel_twice_is_refused(monkeypatch):
    variants = types.SimpleNamespace(IMAGES=(*TABLE, TABLE[0]))
    monkeypatch.setattr(build, "import_module", lambda name: variants)
    with pytest.raises(build.BuildError, match=r"one image twice: sm_75/demo\.cubin\.xz"):
        build.load_table()
    variants.IMAGES = (dataclasses.replace(TABLE[0], entries=(ENTRIES[0], ENTRIES[0])),)
    with pytest.raises(build.BuildError, match=r"one kernel twice.*demo_double"):
        build.load_table()


def test_the_table_is_read_without_torch_or_the_package():
    code = "import sys, build; build.load_table(); assert not {'torch', 'sageattention'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=TOOLS, check=True)


def test_the_disassembly_report_counts_main_loops():
    import sass_report

    try:
        nvdisasm = sass_report.find_nvdisasm()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    text = """
extern "C" __global__ void looped(const int* a, int* o, int n) {
  int d[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < 4; ++j)
      asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                   : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                   : "r"(a[i]), "r"(a[1 + i]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
    d[0] = (int)(float)d[0];
  }
  o[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""
    image, usage, _ = nvrtc.compile_text(text, "looped.cu", "sm_80", ["--std=c++17"])
    (code,) = sass_report.parse(sass_report.disassemble(nvdisasm, image))
    loop = code.main_loop()
    assert code.symbol == "looped" and code.count(sass_report.MMA, loop) == 4
    assert code.count(sass_report.CONVERSIONS, loop) == 2 and code.count(sass_report.LOCAL) == 0
    known = {"registers": 168, "spills": 0, "smem_static": 0, "smem_dynamic": 48 * 1024, "threads": 384}
    assert sass_report.resident_warps(80, known) == 12 and sass_report.resident_warps(80, known | {"threads": 96}) == 9
    assert " 12/64 |" in sass_report.line(code, "sm_80", known) and sass_report.line(code, "sm_80", known).endswith(" 0.50 0.00 |     0")
    assert not sass_report.spills(code, "sm_80")
    behind = sass_report.Code("x", ["MOV", "IMMA", "BRA", "EXIT", "IMMA", "SYNCS", "BRA"], [(0, 2), (1, 6)])  # a wait that jumps back
    assert behind.main_loop() == (0, 2)
    code.opcodes[loop[0]] = "LDL"
    assert sass_report.spills(code, "sm_80") == 1
