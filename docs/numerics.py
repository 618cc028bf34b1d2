"""Measures the tables of `numerics.md` by the emulation and writes them into it: `python docs/numerics.py`.

Each table stands between two markers, `<!-- name -->` and `<!-- /name -->`; the text around them is written by hand. Takes some
minutes on one core. With `--check` nothing is written: it exits with 1 where a chosen scheme misses a bound of `workloads.KINDS`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sageattention.cli import workloads  # noqa: E402
from sageattention.numerics import reference  # noqa: E402
from sageattention.numerics.constants import FRAGMENT_KEYS, NEGLIGIBLE_BIAS  # noqa: E402
from sageattention.numerics.scheme import (  # noqa: E402
    FP8_FP16,
    FP8_FP32,
    FP8_FP32_MMA,
    FP8_FP32_WGMMA,
    FP16_FP16_FP32,
    FP16_FP32,
    FP16_FP32_MMA,
    INT8_INT32,
    Scheme,
)

PAGE = ROOT / "docs" / "numerics.md"
SHAPE = replace(workloads.ACCURACY, heads=4, len_q=768)
LONG_ROWS = 256  # queries where a kind needs 16 or 32 thousand keys: its rows are alike
NEVER = 1 << 30


@dataclass(frozen=True)
class Choice:
    """One row of a table. `chosen` names the variants that run this scheme."""

    name: str
    scheme: Scheme
    chosen: str = ""
    fragment_keys: int = FRAGMENT_KEYS


PRODUCT_QK = (
    Choice("a scale per token, rotated", FP16_FP32, "Triton, reference"),
    Choice("per 16 keys (fragment), rotated", FP16_FP32_MMA, "CUDA"),
    Choice("per 8 keys (narrower fragment), rotated", FP16_FP32_MMA, fragment_keys=32),
    Choice("per tile of 64, rotated", replace(FP16_FP32, k_scale="tile")),
    Choice("per tile of 128, rotated", replace(FP16_FP32, k_scale="tile", kv_tile=128)),
    Choice("per token, not rotated", replace(FP16_FP32, rotate=False)),
    Choice("per 16 keys, not rotated", replace(FP16_FP32_MMA, rotate=False)),
)
INT8_PLAIN = replace(INT8_INT32, v_mean=False, v_rounded=False)
PRODUCT_PV = (
    Choice("fp16, fp32 accumulator", FP16_FP32_MMA, "fp16 `fp32`"),
    Choice("fp16, fp16 accumulator, promoted every tile", FP16_FP16_FP32, "fp16 `fp16+fp32`, `fp16`"),
    Choice("fp8, running maximum", replace(FP8_FP32, p_tile_max=False, v_mean=False)),
    Choice("fp8, running maximum, V mean removed", replace(FP8_FP32, p_tile_max=False)),
    Choice("fp8, tile maximum", replace(FP8_FP32, v_mean=False)),
    Choice("fp8, tile maximum, V mean removed", FP8_FP32),
    Choice("— the same, tile of 128 keys", replace(FP8_FP32, kv_tile=128)),
    Choice("— the same, denominator of unrounded P", replace(FP8_FP32, exact_sum=True)),
    Choice("— without V's mean, denominator of unrounded P", replace(FP8_FP32, exact_sum=True, v_mean=False)),
    Choice("fp8, tile maximum, V mean removed, mean right for V as rounded", FP8_FP32_MMA, "fp8 `fp32`, `fp32+fp32`"),
    Choice("fp8, running maximum, V mean removed, mean right for V as rounded", replace(FP8_FP32_WGMMA, linear=False)),
    Choice("— the same, half of P on a line", FP8_FP32_WGMMA, "sm90"),
    Choice("fp8, tile maximum, fp16 accumulator, P to 56, V to 4.5, mean right for V as rounded", FP8_FP16, "fp8 `fp32+fp16`"),
    Choice("— P to 448, V to .5625", replace(FP8_FP16, p_max=448.0, v_max=0.5625)),
    Choice("int8, running maximum", replace(INT8_PLAIN, p_tile_max=False)),
    Choice("int8, tile maximum", INT8_PLAIN),
    Choice("int8, tile maximum, V mean removed", replace(INT8_PLAIN, v_mean=True)),
    Choice("int8, tile maximum, V mean removed, mean right for V as rounded", INT8_INT32, "int8"),
    Choice("— the same, tile of 32 keys", replace(INT8_INT32, kv_tile=32)),
    Choice("— the same, tile of 128 keys", replace(INT8_INT32, kv_tile=128)),
    Choice("— the same, a K scale per 8 keys", INT8_INT32, fragment_keys=32),
)
SHRINK = replace(FP8_FP32, v_mean=False, p_tile_max=False)
FP16_LONG = replace(FP16_FP16_FP32, p_max=1.0, v_max=0.75)  # 32k keys of the largest product still fit fp16
ACCUMULATORS = (
    Choice("fp32", FP16_FP32_MMA, "fp16 `fp32`"),
    Choice("fp16, promoted every 64 keys", FP16_FP16_FP32, "fp16 `fp16+fp32`, `fp16`"),
    Choice("fp16, promoted every 512 keys", replace(FP16_FP16_FP32, p_max=8.0, v_max=4.0, promote=512)),
    Choice("fp16, never promoted", replace(FP16_LONG, promote=NEVER)),
    Choice("fp8 MMA (14 bits), every 64 keys, V mean removed, tile maximum", FP8_FP32_MMA, "fp8 `fp32`, `fp32+fp32`"),
    Choice("fp8 MMA, every 256 keys, V mean removed", FP8_FP32_WGMMA, "sm90"),
    Choice("fp8 MMA, every 64 keys", SHRINK),
    Choice("fp8 MMA, every 128 keys", replace(SHRINK, kv_tile=128)),
    Choice("fp8 MMA, every 512 keys", replace(SHRINK, promote=512)),
    Choice("fp8 MMA, never promoted", replace(SHRINK, promote=NEVER)),
    Choice("fp8 MMA, never promoted, V mean removed", replace(SHRINK, v_mean=True, promote=NEVER)),
    Choice("fp8 with an fp16 accumulator, every 64 keys", FP8_FP16, "fp8 `fp32+fp16`"),
    Choice("int32 inside the tile, fp32 across", INT8_INT32, "int8"),
)


class Measurements:
    """Relative L2 errors and gains of schemes on input kinds; inputs and exact results are made once."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[torch.Tensor, ...]] = {}

    def inputs_of(self, kind: str) -> tuple[torch.Tensor, ...]:
        if kind not in self.made:
            if kind == "flat":
                qkv = flat()
            else:
                long = workloads.KINDS[kind].len_kv
                shape = workloads.KINDS[kind].sized(replace(SHAPE, heads=1, len_q=LONG_ROWS) if long else SHAPE)
                qkv = workloads.make(kind, shape)
            self.made[kind] = (*qkv, reference.oracle(*qkv)[0])
        return self.made[kind]

    def run(self, choice: Choice, kind: str) -> tuple[float, float]:
        """(relative L2 error, gain)"""
        q, k, v, exact = self.inputs_of(kind)
        out = reference.emulate(q, k, v, replace(choice.scheme, fragment_keys=choice.fragment_keys))[0]
        return workloads.relative_l2(out, exact), workloads.gain(out, exact)


def flat() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """32,768 keys of one and the same weight, V of mean 1: the hardest sum for a short accumulator."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 128, generator=g) for n in (16, 32768, 32768))
    return q.bfloat16(), (k * 0).bfloat16(), (1 + 0.1 * v).bfloat16()


def error_cell(error: float, gain: float) -> str:
    return f"{error:.4f}"[1:] if error < 1 else f"{error:.2f}"


def gain_cell(error: float, gain: float) -> str:
    return f"{error_cell(error, gain)} ({100 * (gain - 1):+.2f} %)"


def table(measured: Measurements, choices: tuple[Choice, ...], kinds: list[str], cell: Callable[[float, float], str]) -> str:
    lines = ["| " + " | ".join(["", *kinds, "chosen for"]) + " |", "|---" * (len(kinds) + 2) + "|"]
    for choice in choices:
        cells = [cell(*measured.run(choice, kind)) for kind in kinds]
        name = f"**{choice.name}**" if choice.chosen else choice.name
        lines.append("| " + " | ".join([name, *cells, choice.chosen]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def bounds_table() -> str:
    lines = ["| P and V | " + " | ".join(workloads.KINDS) + " |", "|---" * (len(workloads.KINDS) + 1) + "|"]
    for pv in ("fp16", "fp8", "int8"):
        lines.append("| " + " | ".join([pv, *(error_cell(kind.bounds[pv], 1.0) for kind in workloads.KINDS.values())]) + " |")
    return "\n".join(lines)


def outlier_table() -> str:
    """Rows that do not attend to one outlier key, by how much larger that key is than the others."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 128, generator=g) for n in (512, 4096, 4096))
    sizes = (1, 10, 50, 100, 1e3, 1e4, 1e5, 1e30)
    lines = ["| key 7 is larger by | " + " | ".join(f"{x:g}" for x in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name, scheme in (("a K scale per token", FP16_FP32), ("per 16 keys", FP16_FP32_MMA)):
        cells = []
        for size in sizes:
            larger = k.clone()
            larger[:, :, 7] *= size
            scores = (q @ k[:, :, 7:8].mT)[0, 0, :, 0]
            rows = scores < -0.5 * scores.std()
            exact = reference.oracle(q, larger, v)[0][:, :, rows]
            cells.append(error_cell(workloads.relative_l2(reference.emulate(q, larger, v, scheme)[0][:, :, rows], exact), 1.0))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def masked_table() -> str:
    """Hidden keys, by what they hold: the error without them, with a mask, and with a bias that takes their weight but lets them count."""
    g = torch.Generator().manual_seed(0)

    def alike(t: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(hidden[:, None], t[:, :, :1], t)

    padding, half = torch.arange(4608) >= 4608 - 472, torch.arange(1024) >= 512
    quarter, few = (torch.rand(1024, generator=g) < share for share in (1 / 4, 1 / 64))
    inputs: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
        "472 of 4,608, all alike": (padding, lambda k: alike(k, padding), lambda v: alike(v, padding)),
        "512 of 1,024, all alike": (half, lambda k: alike(k, half), lambda v: alike(v, half)),
        "one in 4, V 20 times larger": (quarter, lambda k: k, lambda v: torch.where(quarter[:, None], 20 * v, v)),
        "one in 64, K 50 times larger": (few, lambda k: torch.where(few[:, None], 50 * k, k), lambda v: v),
    }
    schemes = {"fp16": FP16_FP32_MMA, "fp8, mma.sync": FP8_FP32_MMA, "fp8, sm90": FP8_FP32_WGMMA, "int8": INT8_INT32}
    lines = ["| hidden keys | " + " | ".join(schemes) + " |", "|---" * (len(schemes) + 1) + "|"]
    for name, (hidden, spoil_k, spoil_v) in inputs.items():
        q, k, v = (torch.randn(1, 2, n, 128, generator=g).bfloat16() for n in (256, len(hidden), len(hidden)))
        bad_k, bad_v, keep = spoil_k(k), spoil_v(v), ~hidden
        exact = reference.oracle(q, k[:, :, keep], v[:, :, keep])[0]
        counted = torch.where(keep, 0.0, 0.9 * -NEGLIGIBLE_BIAS)[None, None, None]
        cells = []
        for scheme in schemes.values():
            outs = (
                reference.emulate(q, k[:, :, keep], v[:, :, keep], scheme)[0],
                reference.emulate(q, bad_k, bad_v, scheme, attn_mask=keep[None, None, None])[0],
                reference.emulate(q, bad_k, bad_v, scheme, attn_mask=counted)[0],
            )
            cells.append(" · ".join(error_cell(workloads.relative_l2(out, exact), 1.0) for out in outs))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def missed_bounds(measured: Measurements) -> list[str]:
    """The chosen schemes that are over a bound of `workloads.KINDS`."""
    missed = []
    for choice in (*PRODUCT_QK, *PRODUCT_PV):
        for kind in workloads.KINDS.values() if choice.chosen else ():
            error, gain = measured.run(choice, kind.name)
            if error > kind.bounds[choice.scheme.pv] or abs(gain - 1) > (kind.gain or 1):
                missed.append(f"{choice.name} on {kind.name}: {error:.4f}, gain {gain:.4f}, bound {kind.bounds[choice.scheme.pv]}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="judge the chosen schemes, write nothing")
    parser.add_argument("tables", nargs="*", help="measure these alone, by their markers' names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = Measurements()
    if arguments.check:
        missed = missed_bounds(measured)
        print("\n".join(missed) or "every chosen scheme is within its bounds")
        return bool(missed)
    tables: dict[str, Callable[[], str]] = {
        "bounds": bounds_table,
        "qk": lambda: table(measured, PRODUCT_QK, [k for k in workloads.KINDS if k not in ("large_v", "coherent_v")], error_cell),
        "pv": lambda: table(measured, PRODUCT_PV, list(workloads.KINDS), error_cell),
        "accumulators": lambda: table(measured, ACCUMULATORS, ["flat", "coherent_v"], gain_cell),
        "masked": masked_table,
        "outlier": outlier_table,
    }
    page = PAGE.read_text(encoding="utf-8")
    for name in arguments.tables or tables:
        text = tables[name]()
        page, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S)
        if count != 1:
            raise SystemExit(f"{PAGE} has no place for the table {name!r}")
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
