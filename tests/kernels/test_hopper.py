"""Hopper's own kernels: their numerics keep the bounds, persistent blocks give every query its output."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import matrix  # noqa: E402

from sageattention import Unsupported, dispatch, variants  # noqa: E402
from sageattention.cli import workloads  # noqa: E402
from sageattention.numerics.reference import emulate, oracle  # noqa: E402
from sageattention.numerics.scheme import (  # noqa: E402
    FP8_FP32_WGMMA,
    FP8_FP32_WGMMA_WIDE,
    FP16_FP32_WGMMA,
    FP16_FP32_WGMMA_WIDE,
)


@pytest.mark.parametrize(
    "scheme, head_dim",
    [(FP16_FP32_WGMMA, 128), (FP8_FP32_WGMMA, 128), (FP16_FP32_WGMMA_WIDE, 256), (FP8_FP32_WGMMA_WIDE, 256)],
    ids=["fp16", "fp8", "fp16 wide", "fp8 wide"],
)
@pytest.mark.parametrize("kind", ["normal", "channel_bias", "heavy_tailed", "sink"])
def test_scheme_keeps_the_bounds(kind, scheme, head_dim):
    shape = workloads.KINDS[kind].sized(workloads.Shape("small", 1, 1, 256, 2001, head_dim))
    q, k, v = workloads.make(kind, shape)
    error = workloads.relative_l2(emulate(q, k, v, scheme)[0], oracle(q, k, v)[0])
    assert error <= workloads.KINDS[kind].bounds[scheme.pv]


PERSISTENT = [v.name for v in variants.VARIANTS.values() if any(k.persistent for k in v.kernels)]


@pytest.mark.gpu
@pytest.mark.parametrize("len_q", [300, 600])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("variant", PERSISTENT)
def test_blocks_go_on_with_further_queries(variant, head_dim, len_q):
    """240 and 400 blocks of queries on some 132 multiprocessors: all of one and a part of the other are shared out by tiles."""
    case = matrix.Case(head_dim, heads_q=40, heads_kv=20, len_q=len_q, len_kv=1100)
    given, _ = matrix.tensors(case, "cuda")
    options = {"tensor_layout": "HND", "is_causal": False, "attn_mask": None, "sm_scale": None, "return_lse": False}
    try:
        call = dispatch.prepare(**given, **options, variant=variant)
    except Unsupported as error:
        pytest.skip(str(error))
    if not call.plan.kernels.persistent:
        pytest.skip("this card runs other kernels of the variant")
    matrix.check(case, variant, device="cuda", joined=True)
