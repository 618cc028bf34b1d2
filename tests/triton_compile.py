"""Compile the Triton variant's kernels for an architecture without a GPU; prints one JSON line per kernel.

usage: python triton_compile.py ARCH [ARCH …]     (run without TRITON_INTERPRET)
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sageattention.backends.triton.attend import attend
from sageattention.backends.triton.quantize import ROWS, SPLITS, quantize_kv, statistics
from sageattention.kernels.family import Tile, find_tile
from sageattention.numerics.constants import HEAD_DIMS
from sageattention.variants import TRITON_FP16

SCALARS = {"factor": "fp32", "sign": "fp32", "out_limit": "fp32"}
POINTERS = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*bf16", "lse": "*fp32", "mask": "*fp32", "k8": "*i8", "k_scale": "*fp32",
    "k_scale_max": "*fp32", "k_mean": "*fp32", "v16": "*fp16", "v_scale": "*fp32", "partial_amax": "*fp32",
    "live": "*u8", "cu_seqlens": "*i32", "cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32",
}  # fmt: skip
# What Triton specialises on at run time for a contiguous [B, H, N, D] call: multiples of 16.
ALIGNED = (*POINTERS, "slots", *(f"{t}_stride_{x}" for t in ("q", "k", "v", "out") for x in "bnh"))


def _pointer(name: str, arch: int) -> str | None:
    """Turing has no bf16 MMA, and no model that runs on it uses bf16: compile what its users run."""
    kind = POINTERS.get(name)
    return "*fp16" if kind == "*bf16" and arch < 80 else kind


def compile_kernel(kernel, arch: int, constants: dict, options: dict) -> dict:
    """Compile one kernel for sm_`arch`; returns its shared memory and whether it holds INT8 MMA."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _pointer(name, arch) or SCALARS.get(name) or ("i64" if "stride" in name else "i32")
        if name in ALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    return {
        "kernel": kernel.fn.__name__, "arch": arch, "head_dim": constants["D"], "shared": built.metadata.shared,
        "warps": built.metadata.num_warps, "int8_mma": ".s8.s8" in ptx, "cubin": built.asm["cubin"],
    }  # fmt: skip


def attend_constants(head_dim: int, tile: Tile, arch: int, *, mask: int = 0, causal: bool = False, lse: bool = False) -> dict:
    return {
        "LOG2_P_MAX": math.log2(TRITON_FP16.scheme.p_max), "HEAD_DIM": head_dim, "D": head_dim, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "MASK": mask, "CAUSAL": causal, "LSE": lse, "VARLEN": False, "INT8_DOT": arch != 75,
    }  # fmt: skip


def compile_all(arch: int) -> list[dict]:
    """The variant's kernels for one architecture, in each compiled head dimension.

    On Turing only in the smallest: without MMA to use, Triton unrolls every product, and the compiler takes minutes.
    """
    built = []
    for d in HEAD_DIMS if arch >= 80 else HEAD_DIMS[:1]:
        tile = find_tile(TRITON_FP16.tiles, arch, d)
        shape = {"HEAD_DIM": d, "D": d, "BLOCK_N": tile.block_n, "SPLITS": SPLITS, "VARLEN": False, "CAUSAL": False}
        for some_live in (False, True) if d == 128 else (False,):
            live = {"SOME_LIVE": some_live, **shape}
            rows = {"V_MAX": TRITON_FP16.scheme.v_max, "ROWS": min(ROWS, tile.block_n)}
            built.append(compile_kernel(statistics, arch, {"BLOCK": 64, **live}, {}))
            built.append(compile_kernel(quantize_kv, arch, {**rows, **live}, {}))
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        built.append(compile_kernel(attend, arch, attend_constants(d, tile, arch), options))
        if d == 128:
            built.append(compile_kernel(attend, arch, attend_constants(d, tile, arch, mask=2, causal=True, lse=True), options))
    return built


def main(archs: list[int]) -> None:
    for arch in archs:
        for row in compile_all(arch):
            row.pop("cubin")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
