"""What calls on CPU tensors give, beside fp64: layouts, grouped heads, masks, scales, empty and odd inputs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from api_calls import QUANTISED, qkv  # noqa: E402

import sageattention  # noqa: E402
from sageattention import Unsupported, sageattn  # noqa: E402
from sageattention.cli import workloads  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402


def check(out, lse, exact, exact_lse, bound=0.02):
    assert workloads.relative_l2(out, exact) < bound
    if lse is not None:
        seen = exact_lse != -torch.inf
        assert torch.equal(lse == -torch.inf, ~seen)
        assert (lse - exact_lse)[seen].abs().max() < 0.03


@pytest.mark.parametrize("variant", ["auto", "sdpa", QUANTISED])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize("return_lse", [False, True])
def test_layouts_groups_and_lse(variant, layout, heads_kv, return_lse):
    q, k, v = qkv(heads=4, heads_kv=heads_kv)
    exact, exact_lse = oracle(q, k, v)
    given = (q, k, v) if layout == "HND" else tuple(t.transpose(1, 2).contiguous() for t in (q, k, v))
    result = sageattn(*given, layout, return_lse=return_lse, variant=variant)
    out, lse = result if return_lse else (result, None)
    assert out.shape == given[0].shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse is None or (lse.shape == (2, 4, 33) and lse.dtype == torch.float32)
    check(out if layout == "HND" else out.transpose(1, 2), lse, exact, exact_lse)


@pytest.mark.parametrize("variant", ["sdpa", QUANTISED])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("shape", [(70,), (33, 1), (33, 70), (2, 33, 70), (1, 1, 70), (2, 1, 1, 70), (1, 2, 33, 70), (2, 2, 33, 70)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(variant, return_lse, shape, dtype, is_causal):
    q, k, v = qkv()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = noise > -0.5 if dtype == torch.bool else 2 * noise.to(dtype)
    exact, exact_lse = oracle(q, k, v, attn_mask=mask, is_causal=is_causal)
    result = sageattn(q, k, v, is_causal=is_causal, attn_mask=mask, return_lse=return_lse, variant=variant)
    out, lse = result if return_lse else (result, None)
    check(out, lse, exact, exact_lse)


@pytest.mark.parametrize("variant", ["sdpa", QUANTISED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_a_fully_masked_row_is_zero_and_a_row_of_finfo_min_is_not(variant, dtype, mask_dtype):
    q, k, v = qkv(dtype=dtype)
    v = v + 1
    mask = torch.ones(33, 70, dtype=torch.bool)
    mask[5] = False
    if mask_dtype != torch.bool:
        mask = torch.zeros(33, 70).masked_fill(~mask, -torch.inf)
        mask[7] = torch.finfo(torch.float32).min
    out, lse = sageattn(q, k, v, attn_mask=mask, return_lse=True, variant=variant)
    plain = sageattn(q, k, v, attn_mask=mask, variant=variant)
    for o in (out, plain):
        assert o.isfinite().all()
        assert (o[:, :, 5] == 0).all() and (lse[:, :, 5] == -torch.inf).all()
        if mask_dtype != torch.bool:
            # As fp32 attention has it, the bias drowns the scores and leaves the average. SDPA in fp16 holds it at −65504, which does not.
            survive = variant == "sdpa" and dtype == torch.float16
            expected = oracle(q, k, v)[0][:, :, 7] if survive else v.double().mean(2)
            assert workloads.relative_l2(o[:, :, 7], expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_finite_bias_hides_a_key(dtype, mask_dtype):
    """Of the smallest number in a whole row, whatever dtype it is in; −inf does."""
    q, k, v = qkv(dtype=dtype)
    mask = torch.zeros(33, 70, dtype=mask_dtype)
    mask[7] = torch.finfo(mask_dtype).min
    mask[8, 1:] = -torch.inf
    out = sageattn(q, k, v, attn_mask=mask)
    assert out.isfinite().all() and out[:, :, 7].abs().sum() > 0
    torch.testing.assert_close(out[:, :, 8], v[:, :, 0])


@pytest.mark.parametrize("mask", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_additive_mask_may_have_another_dtype(dtype, mask):
    q, k, v = qkv(dtype=getattr(torch, dtype))
    shape, kind = (q.shape[2], k.shape[2]), getattr(torch, mask)
    keep = torch.ones(shape, dtype=torch.bool).tril(3)
    for masked in (-torch.inf, torch.finfo(kind).min):
        bias = torch.zeros(shape, dtype=kind).masked_fill(~keep, masked)
        assert torch.allclose(sageattn(q, k, v, attn_mask=bias), sageattn(q, k, v, attn_mask=keep), atol=1e-2)


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
def test_strided_inputs(variant):
    packed = torch.randn(2, 40, 3, 2, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (packed[:, :, i, :, :64].transpose(1, 2) for i in range(3))
    assert not q.is_contiguous()
    out = sageattn(q, k, v, variant=variant)
    assert torch.equal(out, sageattn(q.contiguous(), k.contiguous(), v.contiguous(), variant=variant))
    keys = torch.randn(1, 1, 50, 64).bfloat16().expand(2, 2, 50, 64)
    check(sageattn(q, keys, keys, variant=variant), None, oracle(q, keys, keys)[0], None)


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
@pytest.mark.parametrize("sm_scale", [0.0, 0.3, -0.1, 1])
def test_softmax_scale(variant, sm_scale):
    q, k, v = qkv(dtype=torch.float32)
    check(sageattn(q, k, v, sm_scale=sm_scale, variant=variant), None, oracle(q, k, v, sm_scale=sm_scale)[0], None, bound=0.12)


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("len_q, len_kv, heads", [(0, 70, 2), (33, 0, 2), (0, 0, 2), (33, 70, 0)])
def test_zero_lengths_give_what_sdpa_gives(variant, layout, len_q, len_kv, heads):
    q, k, v = qkv(len_q, len_kv, heads)
    if layout == "NHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = sageattn(q, k, v, layout, return_lse=True, variant=variant)
    assert out.shape == q.shape and out.dtype == q.dtype and (out == 0).all()
    assert lse.shape == (2, heads, len_q) and (lse == -torch.inf).all()


def test_compatibility_switches_change_nothing():
    q, k, v = qkv()
    assert torch.equal(sageattn(q, k, v, smooth_k=False, variant=QUANTISED), sageattn(q, k, v, smooth_k=True, variant=QUANTISED))


def test_the_quantised_path_is_really_taken():
    q, k, v = qkv()
    exact = oracle(q, k, v)[0]
    error = workloads.relative_l2(sageattn(q.float(), k.float(), v.float(), variant=QUANTISED), exact)
    assert 0.003 < error < 0.011


@pytest.mark.parametrize("variant", ["auto", QUANTISED])
def test_autocast_changes_nothing(variant):
    q, k, v = qkv(dtype=torch.float32)
    plain = sageattn(q, k, v, variant=variant, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sageattn(q, k, v, variant=variant, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(out, plain)) and out[0].dtype == torch.float32


@pytest.mark.parametrize("poisoned", range(3))
def test_a_nan_is_not_hidden(poisoned):
    tensors = qkv(dtype=torch.float32)
    tensors[poisoned][0, 0, 3, 1] = float("nan")
    out, lse = sageattn(*tensors, variant=QUANTISED, return_lse=True)
    q, k, v = tensors
    exact = (q @ k.mT).softmax(-1) @ v  # torch 2.5's own attention hides those of Q
    assert torch.equal(out.isnan(), exact.isnan())
    assert bool(lse.isnan().any()) == (poisoned < 2)


def test_a_prepared_call_computes_itself_or_says_why_it_is_left():
    q, k, v = qkv()
    call = sageattention.prepare(q, k, v, return_lse=True, variant=QUANTISED)
    assert call.left_to_model == ""
    for given, expected in zip(call.run(), sageattn(q, k, v, return_lse=True, variant=QUANTISED)):
        assert torch.equal(given, expected)
    left = sageattention.prepare(q, k, v)
    assert "cpu" in left.left_to_model and left.attempt() is None
    assert torch.equal(left.run()[0], sageattn(q, k, v)) and left.run()[1] is None
    with pytest.raises(Unsupported, match="tensor_layout"):
        sageattention.prepare(q, k, v, "BSHD")
