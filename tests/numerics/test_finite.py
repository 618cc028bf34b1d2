"""Wherever fp32 attention is finite, every scheme is finite: property tests over the whole range of the input types."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

from hypothesis import assume, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sageattention import variants  # noqa: E402
from sageattention.numerics.reference import emulate, oracle  # noqa: E402

SCHEMES = {s: f"{v.name}-{a}" for v in variants.VARIANTS.values() for a, s in v.schemes.items()}
repeatable = settings(derandomize=True, deadline=None, database=None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ("plain", "equal rows", "one element", "zeros", "signs", "huge channel", "huge token", "mixed")


@dataclass(frozen=True)
class Values:
    """A recipe for one operand: its pattern, the decimal exponent of its size, and by how much a channel or token stands out."""

    pattern: str = "plain"
    exponent: float = 0.0
    outlier: float = 5.0

    def tensor(self, tokens: int, head_dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, head_dim, generator=generator, dtype=torch.float64)
        at = torch.randint(1 << 30, (2,), generator=generator).tolist()
        if self.pattern == "equal rows":
            x = x[:1].repeat(tokens, 1)
        elif self.pattern == "one element":
            x = torch.zeros_like(x).index_put((torch.tensor(at[0] % tokens), torch.tensor(at[1] % head_dim)), torch.tensor(1.0).double())
        elif self.pattern == "zeros":
            x = x * 0
        elif self.pattern == "signs":
            x = x.sign()
        elif self.pattern == "huge channel":
            x[:, at[1] % head_dim] *= 10.0**self.outlier
        elif self.pattern == "huge token":
            x[at[0] % tokens] *= 10.0**self.outlier
        elif self.pattern == "mixed":
            x = x * 10.0 ** (torch.rand(tokens, head_dim, generator=generator, dtype=torch.float64) * 40 - 20)
        limit = torch.finfo(dtype).max
        return (x * 10.0**self.exponent).clamp(-limit, limit).to(dtype)[None, None]


EXPONENTS = st.sampled_from([-45.0, -38.0, -30.0, -10.0, 0.0, 2.0, 4.0, 5.5, 8.0, 15.0, 19.0, 30.0, 35.0, 37.0, 38.0, 38.4])
VALUES = st.builds(Values, st.sampled_from(SHAPES), EXPONENTS | st.just(0.0), st.sampled_from([2.0, 5.0, 20.0, 30.0]))
SCALES = st.sampled_from([None, None, 0.0, -1.0, 1.0, 1e-30, 1e30, 1e38, -1e20, 1e-45])
MASKS = st.sampled_from(["none", "none", "bool", "finfo.min", "row of finfo.min", "bias", "huge bias", "-inf"])


def mask_of(kind: str, dtype: torch.dtype, len_q: int, len_kv: int, seed: int) -> torch.Tensor | None:
    """A mask that leaves every row at least one key."""
    generator = torch.Generator().manual_seed(seed)
    noise, limit = torch.randn(len_q, len_kv, generator=generator), torch.finfo(dtype)
    drop = noise > 0
    drop[:, 0] = False
    if kind == "none":
        return None
    if kind == "bool":
        return ~drop
    if kind == "row of finfo.min":
        return torch.full((len_q, len_kv), limit.min, dtype=dtype)
    if kind == "bias":
        return (5 * noise).to(dtype)
    if kind == "huge bias":
        return (noise * (limit.max / 8)).to(dtype)
    return torch.zeros(len_q, len_kv, dtype=dtype).masked_fill(drop, limit.min if kind == "finfo.min" else -math.inf)


def fp32_attention(q, k, v, mask, scale):
    scores = (q.float() @ k.float().mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (torch.softmax(scores, -1) @ v.float()).to(q.dtype)


def check(q, k, v, *, mask=None, sm_scale=None, is_causal=False):
    """Every scheme is finite, and no output is larger than V, give or take its rounding."""
    largest = v.float().abs().max()
    for scheme, name in SCHEMES.items():
        out, lse = emulate(q, k, v, scheme, attn_mask=mask, sm_scale=sm_scale, is_causal=is_causal)
        assert out.isfinite().all(), name
        assert lse.isfinite().all(), name
        assert out.float().abs().max() <= 1.08 * largest + 1e-30, name


@settings(repeatable, max_examples=300)
@given(
    values=st.tuples(VALUES, VALUES, VALUES),
    dtype=st.sampled_from(DTYPES),
    lengths=st.tuples(st.sampled_from([1, 2, 5]), st.sampled_from([1, 2, 7, 63, 64, 65, 130, 577])),
    head_dim=st.sampled_from([1, 2, 3, 40, 64, 65, 128, 256]),
    sm_scale=SCALES,
    mask=st.tuples(MASKS, st.sampled_from(DTYPES)),
    is_causal=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@example((Values("signs", 38.4),) * 3, torch.bfloat16, (2, 65), 128, 1e-38, ("none", torch.float32), False, 0)
@example((Values("zeros"), Values("plain", 38), Values()), torch.bfloat16, (2, 65), 128, 1e38, ("none", torch.float32), False, 0)
@example((Values("plain", -2), Values(), Values("plain", 5.5)), torch.bfloat16, (5, 130), 64, None, ("finfo.min", torch.float32), False, 0)
def test_finite_wherever_fp32_attention_is(values, dtype, lengths, head_dim, sm_scale, mask, is_causal, seed):
    q, k, v = (x.tensor(n, head_dim, dtype, seed + i) for i, (x, n) in enumerate(zip(values, (lengths[0], lengths[1], lengths[1]))))
    mask = mask_of(*mask, *lengths, seed + 3)
    reference_mask = mask
    if is_causal:
        keep = torch.ones(lengths, dtype=torch.bool).tril()
        reference_mask = keep if mask is None else mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -math.inf)
    assume(fp32_attention(q, k, v, reference_mask, head_dim**-0.5 if sm_scale is None else sm_scale).isfinite().all())
    check(q, k, v, mask=mask, sm_scale=sm_scale, is_causal=is_causal)


def row(*values, dtype=torch.bfloat16):
    return torch.tensor(values, dtype=dtype)[None, None]


def test_products_that_cancel_in_fp32_but_overflow_when_rotated():
    """q = [1e30, 0] against k = [0, ±1e30]: every score is 0."""
    v = row([1.0, 2.0], [3.0, 4.0])
    check(row([1e30, 0.0]), row([0.0, 1e30], [0.0, -1e30]), v)
    check(row([1e30, 0.0]), row([0.0, 1e30], [0.0, 1e30]), v)  # here the k_mean is not 0


def test_rounding_noise_of_huge_orthogonal_vectors():
    """q · k is 0, but what INT8 leaves of it is a few steps of 1e57: the score has to be cut off."""
    generator = torch.Generator().manual_seed(0)
    in_q = torch.rand(64, generator=generator) < 0.5  # q and k share no channel
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator).bfloat16() for n in (4, 9, 9))
    q, k = q * in_q * 1e30, k * ~in_q * 1e30
    assert (q.float() @ k.float().mT == 0).all()
    check(q, k, v)


@pytest.mark.parametrize("key", [3e38, -3e38, 1e35])
def test_the_largest_k(key):
    """(q8 · k8) · k_scale would overflow before q_scale brings it back."""
    q, k, v = torch.zeros(1, 1, 3, 128), torch.zeros(1, 1, 5, 128), torch.randn(1, 1, 5, 128)
    q[..., 0], k[:, :, 1, 0] = 1.0, key
    check(q.bfloat16(), k.bfloat16(), v.bfloat16())
    if key > 0:  # that key takes all, as it should; where it takes nothing, its size has drowned what tells the others apart
        exact = oracle(q, k, v)[0]
        for scheme, name in SCHEMES.items():
            assert (emulate(q, k, v, scheme)[0] - exact).norm() < 0.05 * exact.norm(), name


@pytest.mark.parametrize("size", [3e38, 3e5, 1e-38, 1e-40])
def test_v_of_any_size(size):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 64, generator=generator) for n in (7, 300))
    v = torch.randn(1, 1, 300, 64, generator=generator).clamp(-1, 1) * size
    check(q, k, v)
    if size > 1:
        exact = oracle(q, k, v)[0] / size
        for scheme, name in SCHEMES.items():
            assert (emulate(q, k, v, scheme)[0] / size - exact).norm() < 0.1 * exact.norm(), name


def test_v_at_both_ends_of_the_range():
    """V minus its mean would be more than fits, so the mean stays in: e4m3's half step of 1/16 is what is left."""
    v = torch.full((1, 1, 8, 64), -3.38e38)
    v[:, :, 0] = 2e38
    q, k = torch.ones(1, 1, 2, 64), torch.zeros(1, 1, 8, 64)
    k[:, :, 0] = 10.0  # all the weight on the one that is far from the mean
    check(q, k, v)
    for scheme, name in SCHEMES.items():
        torch.testing.assert_close(emulate(q, k, v, scheme)[0], v[:, :, :2] * 0 + 2e38, rtol=1 / 16, atol=0, msg=name)


def test_flat_tail_beside_a_sink_key():
    """One key e^9 above 4096 flat ones, which hold a third of the weight: none of it may get lost."""
    q, k = torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 4097, 64)
    q[..., 0], k[:, :, 0, 0] = 8.0, 9.0
    v = torch.zeros(1, 1, 4097, 64)
    v[:, :, 1:] = 1.0
    check(q, k, v)
    exact = oracle(q, k, v)[0]
    for scheme, name in SCHEMES.items():
        assert (emulate(q, k, v, scheme)[0] / exact - 1).abs().max() < 0.12, name  # INT8's own error of a logit of 9 is 2 %


@settings(repeatable, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 70), st.sampled_from([1, 33, 64, 80, 128]), st.integers(0, 1 << 20))
def test_any_length_is_close_to_the_oracle(len_kv, len_q, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, head_dim, generator=generator) for n in (len_q, len_kv, len_kv))
    exact, exact_lse = oracle(q, k, v)
    for scheme, name in SCHEMES.items():
        out, lse = emulate(q, k, v, scheme)
        assert (out - exact).norm() <= 0.06 * out.numel() ** 0.5, name  # V is standard normal; a short row's output may be near 0
        assert (lse - exact_lse).abs().max() < 0.15, name
