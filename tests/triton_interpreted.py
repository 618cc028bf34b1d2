"""Bodies of the Triton tests that run both in Triton's interpreter (in a child process) and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import extremes
import masked
import matrix
import torch

from sageattention import attend, dispatch, quantize_kv, sageattn_qk_int8_pv_fp16_triton, sageattn_varlen
from sageattention.backends.triton import host
from sageattention.cli import workloads
from sageattention.numerics import reference
from sageattention.variants import TRITON_FP16

# The interpreter cuts bf16 stores off instead of rounding them: up to 2^-8 of each element, a third of it in the mean square.
TRUNCATED = {"bfloat16": 2.0**-8, "float16": 0.0, "float32": 0.0}


def cases() -> None:
    """A cross-section of the matrix: every head_dim, dtype, layout, mask, GQA and length appears."""
    for case in matrix.full()[:: 252 // 18]:
        case = replace(case, len_q=min(case.len_q, 140))
        matrix.check(case, TRITON_FP16.name, output_step=TRUNCATED[case.dtype])


def packed(device: str = "cpu") -> None:
    """`sageattn_varlen` is each sequence on its own, also an empty one and one without keys."""
    torch.manual_seed(0)
    lengths_q, lengths_k = [5, 0, 130, 70, 3], [70, 9, 0, 200, 1]
    q = torch.randn(sum(lengths_q), 4, 80, dtype=torch.float16, device=device)
    k, v = (torch.randn(sum(lengths_k), 2, 80, dtype=torch.float16, device=device) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    for causal in (False, True):
        out = sageattn_varlen(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), is_causal=causal, variant=TRITON_FP16.name)
        for i, (a, b) in enumerate(zip(lengths_q, lengths_k)):
            part = out[cu_q[i] : cu_q[i + 1]]
            if a == 0 or b == 0:
                assert (part == 0).all()
                continue
            one = (t[cu[i] : cu[i + 1]][None] for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
            alone = sageattn_qk_int8_pv_fp16_triton(*one, tensor_layout="NHD", is_causal=causal)[0]
            assert torch.equal(part, alone), (i, causal, (part - alone).abs().max())


def halves(device: str = "cpu") -> None:
    """quantize_kv and attend are sageattn cut in two; the caller may overwrite k and v in between."""
    t, _ = matrix.tensors(matrix.Case(96, "float16", heads_q=4), device)
    whole = sageattn_qk_int8_pv_fp16_triton(t["q"], t["k"], t["v"], return_lse=True)
    kv = quantize_kv(t["k"], t["v"], variant=TRITON_FP16.name)
    t["k"].fill_(float("nan"))
    t["v"].fill_(float("nan"))
    for a, b in zip(whole, attend(t["q"], kv, return_lse=True)):
        assert torch.equal(a, b)


def masked_keys(device: str = "cpu") -> None:
    """Keys that nobody sees change nothing, whatever they hold: in a whole call, and where `quantize_kv` is told of them."""
    for case in masked.CASES:
        if device == "cpu":
            if case.len_kv > 1024:
                continue  # the interpreter takes a second for each tile
            case = replace(case, len_q=case.len_q if case.causal else 64, heads=case.heads // case.heads_kv, heads_kv=1)
        spoilt, cut = case.spoilt(device), case.cut(device)
        if device == "cpu":  # the interpreter cuts bf16 off
            spoilt, cut = ({name: t.float() if name in "qkv" else t for name, t in call.items()} for call in (spoilt, cut))
        out, alone = (sageattn_qk_int8_pv_fp16_triton(**call) for call in (spoilt, cut))
        exact, _ = reference.oracle(**cut)
        few = case.causal and device == "cpu"  # of one head, the rows with a handful of keys make most of the error
        assert workloads.relative_l2(out, exact) <= (1.2 if few else 1.05) * workloads.relative_l2(alone, exact), case.name
        emulated, _ = reference.emulate(**spoilt, scheme=TRITON_FP16.scheme)
        step = 0.0 if device == "cpu" else matrix.OUTPUT_STEP["bfloat16"]
        assert workloads.relative_l2(out, emulated) <= matrix.EMULATION_BOUND["fp16"] + step, case.name
        if case.form == "bool" and not case.causal:
            kv = quantize_kv(spoilt["k"], spoilt["v"], variant=TRITON_FP16.name, key_mask=spoilt["attn_mask"][:, 0, 0])
            assert torch.equal(attend(spoilt["q"], kv, attn_mask=spoilt["attn_mask"]), out), case.name


def groups(device: str = "cpu") -> None:
    """Any grouping of the heads gives the same bits."""
    case = matrix.Case(64, "float16", heads_q=6, heads_kv=3, len_q=70, len_kv=90)
    t, _ = matrix.tensors(case, device)
    call = dispatch.prepare(
        **t, tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None, return_lse=True, variant=TRITON_FP16.name
    )
    assert call.plan.heads_per_group == 6
    whole = host.run(call)
    for size in (1, 4):
        for a, b in zip(whole, host.run(replace(call, plan=replace(call.plan, heads_per_group=size)))):
            assert torch.equal(a, b)


def finite(device: str = "cpu") -> None:
    """Finite inputs of any size give finite outputs and LSE; the input kinds of the accuracy table stay within their bounds."""
    small = replace(workloads.ACCURACY, heads=2, len_q=140, len_kv=300)
    for name, kind in workloads.KINDS.items():
        q, k, v = workloads.make(name, small, dtype=torch.float16 if name != "large_v" else torch.bfloat16, device=device)
        out = sageattn_qk_int8_pv_fp16_triton(q, k, v)
        exact, _ = reference.oracle(q, k, v)
        assert out.isfinite().all(), name
        emulated, _ = reference.emulate(q, k, v, TRITON_FP16.scheme)  # so few keys may be harder than those that bounds are made for
        bound = max(kind.bounds["fp16"], workloads.relative_l2(emulated, exact))
        assert workloads.relative_l2(out, exact) <= 1.2 * bound + 2.0**-8 * (name == "large_v"), name

    def rows(*values: float) -> torch.Tensor:
        return torch.tensor(values, device=device).view(1, 1, -1, 2)

    extremes = [
        (rows(1.0, 0.0), rows(3e38, 0.0, -3e38, 0.0), rows(3.39e38, 1.0, 3.39e38, -1.0), None),
        (rows(1e30, 0.0), rows(0.0, 1e30, 0.0, -1e30), rows(1.0, 2.0, 3.0, 4.0), None),
        (rows(1e-38, 0.0), rows(3e38, 0.0, -3e38, 0.0), rows(1e-40, 1.0, -1e-40, -1.0), 1e38),
        (rows(3e38, 3e38), rows(3e38, -3e38, 3e38, -3e38), rows(0.0, 0.0, 0.0, 0.0), 0.0),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        for q, k, v, scale in extremes:
            out, lse = sageattn_qk_int8_pv_fp16_triton(q.to(dtype), k.to(dtype), v.to(dtype), sm_scale=scale, return_lse=True)
            assert out.isfinite().all() and lse.isfinite().all(), (q, k, v, scale, out, lse)


def any_size() -> None:
    """The property of `extremes`, on few tokens; on a GPU `test_gpu_behaviour` has it with more."""

    @extremes.finite_outputs(examples=40, len_q=20, len_kv=20, derandomize=True, database=None)
    def holds(**call) -> None:
        extremes.check(TRITON_FP16.name, "cpu", **call)

    holds()


def tiles() -> None:
    """Every architecture's launch shape gives the emulation's numbers, whatever number of tiles the keys fill."""
    for (arch, head_dim), tile in TRITON_FP16.tiles.items():
        for len_kv in (1, 2 * tile.block_n + 1):
            case = matrix.Case(head_dim, "float32", len_q=tile.block_m + 1, len_kv=len_kv)
            t, _ = matrix.tensors(case)
            call = dispatch.prepare(
                **t, tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None, return_lse=True, variant=TRITON_FP16.name
            )
            scheme = replace(call.plan.scheme, kv_tile=tile.block_n)
            out, lse = host.run(replace(call, plan=replace(call.plan, arch=arch, tile=tile, scheme=scheme)))
            expected, expected_lse = reference.emulate(**t, scheme=scheme)
            assert workloads.relative_l2(out, expected) <= matrix.EMULATION_BOUND["fp16"], (arch, head_dim, len_kv)
            assert (lse - expected_lse).abs().max() <= 0.1, (arch, head_dim, len_kv)
