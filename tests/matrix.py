"""The matrix of calls that every variant is tested on, and the check of one of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from sageattention import dispatch
from sageattention.cli import workloads
from sageattention.numerics import reference

HEAD_DIMS = (40, 64, 80, 96, 128, 160, 256)
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("HND", "NHD")
MASKS = ("none", "causal", "bool", "additive", "row", "causal+bool")
# kernel against emulation: what differs is the order of fp32 sums, exp2's last bits and, rarely, one INT8 step
EMULATION_BOUND = {"fp16": 2e-3, "fp8": 5e-3, "int8": 5e-3}
# half a step of the output's own rounding, which both sides do on slightly different numbers
OUTPUT_STEP = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 0.0}


@dataclass(frozen=True)
class Case:
    """One call: q [2, heads_q, len_q, head_dim], k and v [2, heads_kv, len_kv, head_dim]."""

    head_dim: int
    dtype: str = "bfloat16"
    layout: str = "HND"
    mask: str = "none"
    heads_q: int = 2
    heads_kv: int = 2
    len_q: int = 197
    len_kv: int = 333
    sm_scale: float | None = None

    def __str__(self) -> str:
        heads = f"{self.heads_q}h" if self.heads_q == self.heads_kv else f"{self.heads_q}of{self.heads_kv}h"
        return f"d{self.head_dim}-{self.dtype}-{self.layout}-{self.mask}-{heads}-{self.len_q}x{self.len_kv}"


def full() -> list[Case]:
    """head_dim × dtype × layout × mask, with grouped-query attention and odd lengths mixed in."""
    cases = []
    lengths = itertools.cycle([(197, 333), (64, 1), (1, 129), (300, 64), (129, 511)])
    heads = itertools.cycle([(2, 2), (4, 2), (3, 1)])
    scales = itertools.cycle([None, 0.3, -0.1])
    for d, dtype, layout, mask in itertools.product(HEAD_DIMS, DTYPES, LAYOUTS, MASKS):
        cases.append(Case(d, dtype, layout, mask, *next(heads), *next(lengths), next(scales)))
    return cases


def tensors(case: Case, device: str = "cpu", seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """({"q", "k", "v"} as [B, H, N, D], mask or None); K with a channel bias, so that the anchor matters."""
    g = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(2, heads, tokens, case.head_dim, generator=g)

    bias = 3 * torch.randn(case.head_dim, generator=g)
    made = {
        "q": normal(case.heads_q, case.len_q),
        "k": normal(case.heads_kv, case.len_kv) + bias,
        "v": normal(case.heads_kv, case.len_kv),
    }
    mask = None
    if "bool" in case.mask:
        mask = torch.rand(2, 1, case.len_q, case.len_kv, generator=g) > 0.3
        mask[:, :, 0] = False  # a fully masked row
    elif case.mask == "additive":
        mask = torch.randn(case.heads_q, case.len_q, case.len_kv, generator=g)
        mask[:, -1] = torch.finfo(torch.float32).min  # a finite bias over a whole row: the plain average
    elif case.mask == "row":
        mask = torch.randn(1, 1, 1, case.len_kv, generator=g).to(dtype)
        mask[..., -1] = -torch.inf if case.len_kv > 1 else 0.0
    move = {name: t.to(dtype).to(device) for name, t in made.items()}
    return move, None if mask is None else mask.to(device)


def run(case: Case, variant: str, accum: str = "", device: str = "cpu") -> dict[str, torch.Tensor]:
    """Run one case; returns the kernel's, the emulation's and the oracle's (out, lse) as [B, H, N, D] and [B, H, N]."""
    t, mask = tensors(case, device)
    given = t if case.layout == "HND" else {name: x.transpose(1, 2).contiguous() for name, x in t.items()}
    call = dispatch.prepare(
        **given, tensor_layout=case.layout, is_causal="causal" in case.mask, attn_mask=mask, sm_scale=case.sm_scale, return_lse=True,
        variant=variant, accum=accum,
    )  # fmt: skip
    out, lse = call.run()
    options = {"is_causal": "causal" in case.mask, "attn_mask": mask, "sm_scale": case.sm_scale}
    emulated, emulated_lse = reference.emulate(**t, scheme=call.plan.scheme, **options)
    exact, exact_lse = reference.oracle(**t, **options)
    return {
        "out": out if case.layout == "HND" else out.transpose(1, 2), "lse": lse, "emulated": emulated, "emulated_lse": emulated_lse,
        "exact": exact, "exact_lse": exact_lse, "pv": call.plan.scheme.pv,
    }  # fmt: skip


def check(case: Case, variant: str, accum: str = "", device: str = "cpu", output_step: float | None = None, joined: bool = False) -> None:
    """Assert that a variant gives its emulation's numbers, is close to the oracle, and that masked rows are 0 and −inf.

    joined: two blocks may share a row's keys. Each then rounds P against a reference of its own, which is not the emulation's: FP8
    rounds other weights up or down, as far from the oracle as the emulation.
    """
    r = run(case, variant, accum, device)
    assert r["out"].isfinite().all()
    step = OUTPUT_STEP[case.dtype] if output_step is None else output_step
    if not r["exact"].any():  # every row masked: no relative error to speak of
        assert not r["out"].any() and (r["lse"] == -torch.inf).all()
        return
    error = workloads.relative_l2(r["out"], r["emulated"])
    if joined and r["pv"] == "fp8":
        assert workloads.relative_l2(r["out"], r["exact"]) <= 1.05 * workloads.relative_l2(r["emulated"], r["exact"]) + step
    else:
        assert error <= EMULATION_BOUND[r["pv"]] + step, f"{error:.2e} off the emulation"
    masked = r["exact_lse"] == -torch.inf
    assert (r["lse"][masked] == -torch.inf).all() and (r["out"][masked] == 0).all()
    off = (r["lse"] - r["emulated_lse"])[~masked].abs()
    assert off.mean() <= 2e-3 and off.max() <= 0.1, f"LSE off by {off.mean():.1e} on average, {off.max():.1e} at most"
    assert workloads.relative_l2(r["out"], r["exact"]) <= 0.08
