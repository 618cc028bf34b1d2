"""The emulations keep the numerics contract: right to a stated error, and finite wherever fp32 attention is finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from schemes import SCHEMES, each_scheme  # noqa: E402

from sageattention.cli import workloads  # noqa: E402
from sageattention.cli.check import LSE_BOUNDS  # noqa: E402
from sageattention.numerics import hadamard  # noqa: E402
from sageattention.numerics.constants import HEAD_DIMS  # noqa: E402
from sageattention.numerics.reference import E4M3_MAX, emulate, oracle, quantize_k, quantize_v  # noqa: E402
from sageattention.numerics.scheme import FP8_FP32, FP16_FP32, FP16_FP32_MMA, INT8_INT32  # noqa: E402

LARGEST_TILE = 128


def attention(q, k, v, scheme, **arguments):
    """(emulated out, its lse, exact out, exact lse)"""
    return *emulate(q, k, v, scheme, **arguments), *oracle(q, k, v, **arguments)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(len_q=33, len_kv=130, head_dim=64, heads=1, heads_kv=None, seed=0):
    return (
        randn(1, heads, len_q, head_dim, seed=seed),
        randn(1, heads_kv or heads, len_kv, head_dim, seed=seed + 1),
        randn(1, heads_kv or heads, len_kv, head_dim, seed=seed + 2),
    )


# --- accuracy


@each_scheme
@pytest.mark.parametrize("kind", workloads.KINDS.values(), ids=lambda kind: kind.name)
def test_error_stays_within_the_bound_of_each_kind(kind, scheme):
    # Where few keys share a row's weight, rows differ much: many of them. The long kinds are alike in every row.
    shape = kind.sized(replace(workloads.ACCURACY, heads=1, len_q=64) if kind.len_kv else replace(workloads.ACCURACY, heads=4, len_q=256))
    q, k, v = workloads.make(kind.name, shape)
    out, lse, exact, exact_lse = attention(q, k, v, scheme)
    assert workloads.relative_l2(out, exact) <= kind.bounds[scheme.pv]
    assert abs(workloads.gain(out, exact) - 1) <= (kind.gain or 0.02)
    assert (lse - exact_lse).abs().max() <= 0.02 * max(1.0, float(exact_lse.abs().max()))


def test_unpromoted_fp8_accumulator_shrinks_as_measured():
    """Hopper's FP8 wgmma on V of mean 1: .98 at 2k keys and .815 at 16k."""
    unpromoted = replace(FP8_FP32, v_mean=False, p_tile_max=False, promote=1 << 30)
    for keys, measured in ((2048, 0.98), (16384, 0.815)):
        q, k, v = qkv(32, keys)
        out, _, exact, _ = attention(q, k, v + 1, unpromoted)
        assert workloads.gain(out, exact) == pytest.approx(measured, abs=0.03)


def test_int8_p_needs_the_tile_maximum():
    shape = workloads.KINDS["sink"].sized(replace(workloads.ACCURACY, heads=1, len_q=16))
    q, k, v = workloads.make("sink", shape)
    exact = oracle(q, k, v)[0]
    running = replace(INT8_INT32, p_tile_max=False)
    assert workloads.relative_l2(emulate(q, k, v, running)[0], exact) > 0.5  # the whole tail rounds to zero
    assert workloads.relative_l2(emulate(q, k, v, INT8_INT32)[0], exact) < 0.004


def test_rotation_spreads_outlier_channels():
    q, k, v = workloads.make("heavy_tailed", replace(workloads.ACCURACY, heads=8, len_q=128))
    exact = oracle(q, k, v)[0]
    rotated, plain = (workloads.relative_l2(emulate(q, k, v, replace(FP16_FP32, rotate=r))[0], exact) for r in (True, False))
    assert rotated < 0.5 * plain


@each_scheme
@pytest.mark.parametrize("keys", [1, 2, 8, 64])
def test_the_lse_of_few_keys_keeps_to_the_bound_of_check(scheme, keys):
    off = 0.0
    for seed in range(0, 30, 3):
        out, lse, exact, exact_lse = attention(*qkv(len_q=40, len_kv=keys, seed=seed), scheme)
        off = max(off, float(((lse - exact_lse).abs() / exact_lse.abs().clamp_min(1)).max()))
    assert off <= LSE_BOUNDS[scheme.pv]


@each_scheme
def test_a_shift_of_k_changes_nothing_but_the_lse(scheme):
    q, k, v = qkv(64, 700)
    out, lse, exact, exact_lse = attention(q, k + 30 * randn(1, 1, 1, 64, seed=9), v, scheme)
    assert workloads.relative_l2(out, exact) < 0.06
    assert (lse - exact_lse).abs().max() < 0.05


@each_scheme
def test_equal_weights_give_the_mean_of_v(scheme):
    """Of V as it was rounded too, where the scheme makes up for that."""
    q, k, v = qkv(3, 1000)
    out, _ = emulate(0 * q, k, v, scheme)
    exact = v.double().mean(2, keepdim=True).expand_as(out)
    assert workloads.relative_l2(out, exact) <= (1e-3 if scheme.v_rounded or scheme.pv == "fp16" else 0.05)


@each_scheme
def test_constant_v_comes_back(scheme):
    """The weights sum to one: the denominator agrees with the P that multiplies V."""
    q, k, v = qkv(32, 1000)
    v = torch.full_like(v, 3.0)
    out, _ = emulate(q, k, v, scheme)
    torch.testing.assert_close(out, v[:, :, :32], rtol=2e-3, atol=0)


def test_one_key_300_times_larger_leaves_the_other_rows_alone():
    q, k, v = qkv(64, 1000)
    k[0, 0, 7] *= 300
    exact = oracle(q, k, v)[0]
    scores = (q @ k.mT)[0, 0]
    rows = scores[:, 7] < -0.3 * scores[:, 7].abs().max()  # clearly not attending to that key
    assert rows.sum() > 10
    for scheme, bound in ((FP16_FP32, 0.02), (FP16_FP32_MMA, 0.15)):
        assert workloads.relative_l2(emulate(q, k, v, scheme)[0][:, :, rows], exact[:, :, rows]) < bound


# --- the arguments of a call


@each_scheme
@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 128, 200, 256])
def test_head_dims_between_the_compiled_ones(head_dim, scheme):
    q, k, v = qkv(9, 77, head_dim)
    out, lse, exact, exact_lse = attention(q, k, v, scheme)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert workloads.relative_l2(out, exact) < 0.06
    assert (lse - exact_lse).abs().max() < 0.05


@each_scheme
def test_causal_masks_and_grouped_queries(scheme):
    q, k, v = qkv(65, 130, heads=4, heads_kv=2)
    keep = randn(4, 1, 130, seed=5) > 0
    bias = 2 * randn(1, 4, 65, 130, seed=6)
    for arguments in ({"is_causal": True}, {"attn_mask": keep}, {"attn_mask": bias}, {"attn_mask": bias[0, 0], "is_causal": True}):
        out, lse, exact, exact_lse = attention(q, k, v, scheme, **arguments)
        assert workloads.relative_l2(out, exact) < 0.06, arguments.keys()
        assert (lse - exact_lse).abs().max() < 0.1


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, scheme):
    q, k, v = (t.to(dtype) for t in qkv(33, 100))
    out, lse, exact, _ = attention(q, k, v, scheme)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert workloads.relative_l2(out, exact) < 0.06


@each_scheme
@pytest.mark.parametrize("sm_scale", [0.0, -0.125, 1.0, 1e-30])
def test_softmax_scales(sm_scale, scheme):
    q, k, v = qkv(17, 90)
    out, lse, exact, exact_lse = attention(q, k, v, scheme, sm_scale=sm_scale)
    assert workloads.relative_l2(out, exact) < 0.15  # at 1.0 the logits have a standard deviation of 8 nats
    assert (lse - exact_lse).abs().max() < 0.02 * max(1.0, float(exact_lse.abs().max()))


# --- edges


@each_scheme
def test_one_key_gives_its_value(scheme):
    q, k, v = qkv(5, 1)
    out, lse, _, exact_lse = attention(q, k, v, scheme)
    torch.testing.assert_close(out, v.expand_as(out), rtol=1e-3, atol=1e-6)
    assert (lse - exact_lse).abs().max() < 0.05


@each_scheme
def test_fully_masked_rows_are_zero(scheme):
    q, k, v = qkv(4, 200)
    v = v + 5  # with V's mean taken out, zero must not come back as the mean
    keep = torch.ones(4, 200, dtype=torch.bool)
    keep[1], keep[2, :150] = False, False  # row 2 sees nothing but the last tiles
    for mask in (keep, torch.zeros(4, 200).masked_fill(~keep, -math.inf)):
        out, lse, exact, _ = attention(q, k, v, scheme, attn_mask=mask)
        assert (out[0, 0, 1] == 0).all() and lse[0, 0, 1] == -math.inf
        assert workloads.relative_l2(out, exact) < 0.02
        assert lse[0, 0, [0, 2, 3]].isfinite().all()


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_of_finfo_min_is_not_a_masked_row(dtype, scheme):
    q, k, v = qkv(3, 100)
    mask = torch.zeros(3, 100, dtype=dtype)
    mask[1] = torch.finfo(dtype).min
    out, lse, exact, _ = attention(0.1 * q, k, v + 1, scheme, attn_mask=mask)
    assert workloads.relative_l2(out, exact) < 0.05  # the row keeps SDPA's average
    assert lse.isfinite().all() and lse[0, 0, 1] < -6e4


@each_scheme
def test_flat_rows_of_the_largest_v_fit_the_accumulator(scheme):
    """Every P is p_max and every V is v_max: the most that a tile can add up to."""
    q, k, v = torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 1537, 64), torch.full((1, 1, 1537, 64), 3e5)
    v[:, :, :, 1::2] *= -1
    for tile in (64, LARGEST_TILE):
        tiled = scheme if scheme.pv == "int8" else replace(scheme, kv_tile=tile, v_mean=False)
        out, _ = emulate(q, k, v, tiled)
        torch.testing.assert_close(out, v[:, :, :2], rtol=2e-3, atol=0)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.accumulate == "fp16"], ids=lambda scheme: scheme.pv)
def test_head_room_of_fp16_accumulators(scheme):
    assert scheme.promote == 0  # promoted every tile
    assert LARGEST_TILE * scheme.p_max * scheme.v_max * 2 < torch.finfo(torch.float16).max


@each_scheme
def test_operands_fit_their_types(scheme):
    limit = {"fp16": torch.finfo(torch.float16).max, "fp8": E4M3_MAX, "int8": 127}[scheme.pv]
    assert scheme.v_max <= limit and scheme.p_max <= (255 if scheme.pv == "int8" else limit)
    if scheme.pv == "fp8":  # the row's largest weight must not be rounded
        assert float(torch.tensor(scheme.p_max).to(torch.float8_e4m3fn)) == scheme.p_max


# --- the parts


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthogonal_and_defined_by_its_formula(head_dim):
    r = hadamard.matrix(head_dim)
    assert torch.equal(r @ r.T * hadamard.gain(head_dim), torch.eye(head_dim))
    for i, j in ((0, 0), (1, 1), (3, 5), (head_dim - 1, head_dim - 1)):
        b = [i >> bit & 1 for bit in range(8)]
        sign = b[0] * b[3] + b[1] * b[4] + b[2] * b[5] + b[6] * b[7] + bin(i & j).count("1")
        assert r[i, j] == (-1) ** sign / (2 * head_dim)


@pytest.mark.parametrize("granularity, keys", [("token", 1), ("fragment", 16), ("tile", 64)])
def test_keys_that_share_a_scale(granularity, keys):
    k = randn(130, 64)
    _, scale, _ = quantize_k(k, replace(FP16_FP32, k_scale=granularity))
    first = scale[:64, 0]
    assert [int((first == s).sum()) for s in first.unique()] == [keys] * (64 // keys)
    if granularity == "fragment":  # keys 2t and 2t + 1 of every eight, t = 1, of the second 64
        assert (scale[[66 + 8 * j + e for j in range(8) for e in (0, 1)]] == scale[66]).all()


@each_scheme
def test_quantised_v_comes_back(scheme):
    v = randn(500, 40) * 10 ** randn(40) + 3
    values, scale, mean = quantize_v(v, scheme)
    assert values.abs().max() <= scheme.v_max
    error = ((values * scale + mean)[:, :40] - v).norm() / v.norm()
    assert error < {"fp16": 4e-4, "fp8": 0.03, "int8": 0.01}[scheme.pv]
