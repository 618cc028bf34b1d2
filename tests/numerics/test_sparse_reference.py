"""The plain-torch block-sparse algorithm against its definition, token by token, and its laws."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from sparse_brute import Call  # noqa: E402

from sageattention.numerics import block_bits  # noqa: E402
from sageattention.numerics.block_selection import Selection  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402
from sageattention.numerics.sparse import Geometry, attend, coarse, exact_share, route, undecided  # noqa: E402

KINDS = ("sol", "topk", "mass", "cdf", "static")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(len_q=200, len_kv=None, heads=1, heads_kv=None, head_dim=16, batch=1, seed=0):
    """Tokens that resemble their neighbours, so that blocks differ and routing has something to find."""
    len_kv = len_kv or len_q

    def walk(heads, tokens, seed):
        slow = randn(batch, heads, tokens // 32 + 2, head_dim, seed=seed).repeat_interleave(32, 2)[:, :, :tokens]
        return 1.5 * slow + 0.5 * randn(batch, heads, tokens, head_dim, seed=seed + 1)

    return (
        walk(heads, len_q, seed),
        walk(heads_kv or heads, len_kv, seed + 10),
        randn(batch, heads_kv or heads, len_kv, head_dim, seed=seed + 2),
    )


def run(call: Call, dtype=torch.float64):
    """(out, lse, exact blocks) by the package."""
    geometry = Geometry(
        call.q_block, call.is_causal, call.q_start, call.sinks, call.query_sinks, call.neighbours, call.order, call.key_mask, call.block_len
    )
    selection = Selection(call.kind, call.tau, call.keep, call.similarity)
    chosen = route(
        call.q, call.k, call.v, selection, geometry, tail=call.tail, block_mask=call.block_mask, sm_scale=call.sm_scale, dtype=dtype
    )
    out, lse = attend(call.q, call.k, call.v, chosen, geometry, sm_scale=call.sm_scale, dtype=dtype)
    return out, lse, block_bits.unpack(chosen.bits, -(-call.k.shape[2] // 64))


def check(call: Call):
    out, lse, exact = run(call)
    true_out, true_lse, true_exact = call.attention()
    assert torch.equal(exact, true_exact)
    torch.testing.assert_close(out, true_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, true_lse, rtol=1e-9, atol=1e-9)
    return exact


def random_call(kind: str, seed: int) -> Call:
    """A call with every feature drawn at random."""
    draw = random.Random(f"{kind} {seed}")
    batch, heads_kv, len_q = draw.choice((1, 2)), draw.choice((1, 2)), draw.randint(1, 330)
    len_kv = draw.choice((len_q, draw.randint(1, 400)))
    heads = heads_kv * draw.choice((1, 2))
    call = Call(*qkv(len_q, len_kv, heads, heads_kv, 8, batch, seed), kind, q_block=draw.choice((64, 128)), tail=draw.random() < 0.6)
    call.tau, call.keep, call.sm_scale = draw.choice((0.3, 1.0, 1.3)), draw.choice((0.0, 0.1, 0.3, 0.9, 1.0)), draw.choice((0.1, 0.3, -0.2))
    call.similarity = draw.choice((0.0, 0.55, 0.75))
    call.is_causal = draw.random() < 0.3
    call.neighbours = None if kind == "static" else draw.choice((None, 0, 1, 2))
    call.q_start = draw.choice((0, 64, 37, None)) if len_q != len_kv else 0
    n = -(-len_kv // 64)
    if draw.random() < 0.4:
        call.sinks = [(start := draw.randrange(len_kv), draw.randint(start, len_kv))]
    if draw.random() < 0.4:
        call.query_sinks = [(start := draw.randrange(len_q), draw.randint(start, len_q))]
    generator = torch.Generator().manual_seed(seed)
    if draw.random() < 0.4:
        call.key_mask = torch.rand(batch, len_kv, generator=generator) < draw.choice((0.02, 0.7))
    if draw.random() < 0.3:
        call.block_len = torch.randint(0, 65, (n,) if draw.random() < 0.5 else (batch, n), generator=generator)
    if draw.random() < 0.4 and len_q == len_kv and not call.is_causal:
        call.order = torch.randperm(len_q, generator=generator).int()
    if kind == "static":
        call.block_mask = (
            torch.rand(draw.choice((1, batch)), draw.choice((1, heads)), -(-len_q // call.q_block), n, generator=generator) < 0.4
        )
    return call


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_are_as_defined(kind, seed):
    check(random_call(kind, seed))


# --- laws


@pytest.mark.parametrize("q_block", (64, 128))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "selection", (Selection("topk", keep=1.0), Selection("mass", tau=0.0), Selection("sol", tau=-1e6)), ids=lambda s: s.kind
)
def test_all_blocks_exact_is_dense(selection, causal, q_block):
    q, k, v = qkv(330, 270, heads=4, heads_kv=2, batch=2)
    mask = torch.rand(2, 270, generator=torch.Generator().manual_seed(1)) < 0.8
    geometry = Geometry(q_block, causal, None, key_mask=mask)
    chosen = route(q, k, v, selection, geometry)
    assert exact_share(chosen, 330, 270, geometry) == 1
    out, lse = attend(q, k, v, chosen, geometry)
    exact, exact_lse = oracle(q, k, v, is_causal=causal, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ("sol", "topk", "mass", "cdf"))
def test_order_is_the_same_as_permuted_tensors(kind):
    """A row map changes where rows are read and written, nothing else."""
    call = Call(*qkv(300, heads=2), kind=kind, q_block=128, sinks=[(40, 90)], query_sinks=[(290, 300)])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    call.key_mask = torch.rand(1, 300, generator=torch.Generator().manual_seed(4)) < 0.9
    out, lse, exact = run(replace(call, order=order.int()))

    # The sinks' blocks under the order, as ranges of the permuted tensors.
    def blocks(ranges, size):
        return [
            (i, min(i + size, 300)) for i in range(0, 300, size) if any(a <= int(t) < z for t in order[i : i + size] for a, z in ranges)
        ]

    permuted = replace(
        call, q=call.q[:, :, order], k=call.k[:, :, order], v=call.v[:, :, order], key_mask=call.key_mask[:, order],
        sinks=blocks(call.sinks, 64), query_sinks=blocks(call.query_sinks, 128),
    )  # fmt: skip
    out_permuted, lse_permuted, exact_permuted = run(permuted)
    assert torch.equal(exact, exact_permuted)
    assert torch.equal(out[:, :, order], out_permuted) and torch.equal(lse[:, :, order], lse_permuted)


def test_tail_of_equal_keys_is_exact():
    """Where the keys of a block are equal, and so are the queries of one, the tail says exactly what its tokens say."""
    q, k, v = qkv(320)
    q, k = (t[:, :, ::64].repeat_interleave(64, 2) for t in (q, k))
    chosen = route(q, k, v, Selection("topk", keep=0.0), Geometry(64, neighbours=None))
    assert block_bits.unpack(chosen.bits, 5).sum() == 5
    out, lse = attend(q, k, v, chosen, Geometry(64))
    exact, exact_lse = oracle(q, k, v)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-10, atol=1e-12)


def test_tail_brings_the_output_nearer_to_dense():
    q, k, v = qkv(1500, heads=4)
    exact, _ = oracle(q, k, v, sm_scale=0.1)
    errors = []
    for tail in (True, False):
        chosen = route(q, k, v, Selection("topk", keep=0.1), Geometry(128), tail=tail, sm_scale=0.1)
        errors.append(float((attend(q, k, v, chosen, Geometry(128), sm_scale=0.1)[0] - exact).norm() / exact.norm()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("kind", ("sol", "topk", "mass", "cdf"))
def test_budgets_per_head_are_those_of_each_head_alone(kind):
    q, k, v = qkv(400, heads=4, heads_kv=2)
    rules = [Selection(kind, tau, keep) for tau, keep in ((0.5, 0.2), (1.0, 0.4), (1.5, 0.6), (2.0, 0.8))]
    together = route(q, k, v, rules, Geometry()).bits
    for h, rule in enumerate(rules):
        alone = route(q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1], rule, Geometry()).bits
        assert torch.equal(together[:, h], alone[:, 0])


def test_topk_includes_ties():
    q, k, v = (torch.ones(1, 1, 640, 8, dtype=torch.float64) for _ in range(3))
    chosen = route(q, k, v, Selection("topk", keep=0.2), Geometry(64, neighbours=None))
    assert block_bits.unpack(chosen.bits, 10).all()


@pytest.mark.parametrize("keep, of_ten", [(0.0, 1), (0.04, 1), (0.26, 3), (0.99, 9), (1.0, 10)])
def test_topk_counts_blocks_that_are_no_sinks(keep, of_ten):
    q, k, v = qkv(64 * 12)
    chosen = route(q, k, v, Selection("topk", keep=keep), Geometry(64, neighbours=None, sinks=[(0, 65)]))
    exact = block_bits.unpack(chosen.bits, 12)[0, 0]
    assert exact[:, :2].all() and (exact[:, 2:].sum(-1) == of_ten).all()


def test_a_list_of_128_rows_weighs_both_halves():
    """The half that is sure of a block outweighs the half that hardly looks at it; a mean of all 128 queries would not see either."""
    q, k, v = randn(1, 1, 128, 16) * 0, randn(1, 1, 640, 16, seed=1) * 0.01, randn(1, 1, 640, 16, seed=2)
    direction = torch.nn.functional.normalize(randn(16, seed=3), dim=0)
    q[..., :64, :], q[..., 64:, :] = 20 * direction, -20 * direction
    k[..., 256:320, :] += direction
    k[..., 512:576, :] -= direction
    chosen = route(q, k, v, Selection("topk", keep=0.2), Geometry(128, q_start=None))
    assert block_bits.unpack(chosen.bits, 10)[0, 0, 0].nonzero().flatten().tolist() == [4, 8]


# --- ends and bad numbers


def test_no_block_and_no_tail_gives_zero():
    call = Call(*qkv(130, 300), kind="static", block_mask=torch.zeros(1, 1, 3, 5, dtype=torch.bool), tail=False, q_start=None)
    out, lse, _ = run(call)
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -math.inf).all()
    out, lse, _ = run(replace(call, tail=True))  # the tail alone answers
    assert (out != 0).all() and lse.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_live_key_gives_zero(kind):
    call = Call(*qkv(130, 300, batch=2), kind=kind, q_start=None, key_mask=torch.zeros(2, 300, dtype=torch.bool))
    call.key_mask[1, 7] = True
    call.block_mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    out, lse, _ = run(call)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and (lse[0] == -math.inf).all()
    torch.testing.assert_close(out[1], call.v[1, :, 7:8].expand_as(out[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", (1, 63, 64))
def test_one_block_is_dense(kind, tokens):
    call = Call(*qkv(tokens), kind=kind, block_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool), keep=0.3, tau=5.0)
    torch.testing.assert_close(run(call)[0], oracle(call.q, call.k, call.v, sm_scale=call.sm_scale)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ("sol", "topk", "mass", "cdf"))
def test_all_keys_sinks_or_all_queries_sinks_is_dense(kind):
    call = Call(*qkv(300), kind=kind)
    exact = oracle(call.q, call.k, call.v, sm_scale=call.sm_scale)[0]
    for sinks in ({"sinks": [(0, 300)]}, {"query_sinks": [(0, 300)]}):
        torch.testing.assert_close(run(replace(call, **sinks))[0], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ("sol", "topk", "mass", "cdf"))
@pytest.mark.parametrize("q_block", (64, 128))
def test_nan_gives_what_dense_gives(kind, q_block):
    call = Call(*qkv(400), kind=kind, q_block=q_block, tau=3.0)
    call.q[0, 0, 200, 3] = math.nan
    out, lse, exact = run(call)
    lists = slice(200 // q_block * q_block, (200 // q_block + 1) * q_block)
    assert exact[0, 0, 200 // q_block].all() and not exact.all()
    dense, dense_lse = oracle(call.q, call.k, call.v, sm_scale=call.sm_scale)
    torch.testing.assert_close(out[:, :, lists], dense[:, :, lists], rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(lse[:, :, lists], dense_lse[:, :, lists], rtol=1e-10, atol=1e-12, equal_nan=True)
    assert out[0, 0, [i for i in range(400) if i != 200]].isfinite().all()
    call.k[0, 0, 5, 0] = math.nan
    assert run(call)[0].isnan().all()


def test_a_masked_key_may_hold_anything():
    call = Call(*qkv(300), kind="sol", key_mask=torch.ones(1, 300, dtype=torch.bool))
    call.key_mask[0, 70:75] = False
    clean = run(call)
    call.k[0, 0, 70:75], call.v[0, 0, 70:75] = math.nan, math.inf
    assert all(torch.equal(a, b) for a, b in zip(run(call), clean))


@pytest.mark.parametrize("kind", ("sol", "topk", "mass", "cdf"))
def test_the_largest_bf16_stays_finite(kind):
    q, k, v = ((t * (3e38 / 8)).bfloat16() for t in qkv(300))
    call = Call(q, k, v, kind=kind)
    out, lse, _ = run(call)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("q_block", (64, 128))
@pytest.mark.parametrize("kind", ("sol", "topk", "mass", "cdf"))
def test_fp32_chooses_as_fp64_but_for_undecided_blocks(kind, q_block):
    call = Call(*(t.float() for t in qkv(3000, heads=2)), kind=kind, q_block=q_block)
    narrow, wide = run(call, torch.float32), run(call)
    assert narrow[0].dtype == torch.float32
    rule, geometry = Selection(kind, call.tau, call.keep), Geometry(q_block)
    near = undecided(call.q, call.k, call.v, rule, geometry, sm_scale=call.sm_scale)
    assert not ((narrow[2] != wide[2]) & ~near).any()
    assert near.float().mean() < 0.05


def test_undecided_blocks_lie_near_the_threshold():
    call = Call(*qkv(640), kind="sol", tau=0.5)
    near = undecided(call.q, call.k, call.v, Selection("sol", 0.5), Geometry(64), tolerance=0.1, sm_scale=call.sm_scale)[0, 0]
    q, k = (t[0, 0].unflatten(0, (-1, 64)).mean(1) for t in (call.q, call.k))
    k = k - k.mean(0)
    scale = call.sm_scale / math.log(2)
    sigma, threshold = q @ k.T * scale, 0.5 * (q**2 @ (k**2).mean(0) * scale**2 + 1e-6).sqrt()[:, None]
    assert torch.equal(near, (sigma - threshold).abs() <= 0.1 * (sigma.abs() + threshold))
    assert near.any() and not near.all()


def test_bits_are_packed_with_the_sign_as_the_last():
    chosen = torch.rand(3, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[0, 0, 31] = True
    packed = block_bits.pack(chosen)
    assert packed.dtype == torch.int32 and packed.shape == (3, 5, 3) and packed[0, 0, 0] < 0
    assert torch.equal(block_bits.unpack(packed, 70), chosen)
    for t in (0, 31, 32, 69):
        assert torch.equal((packed[..., t // 32] >> t % 32 & 1).bool(), chosen[..., t])


def test_coarse_attends_to_block_means():
    q, k, v = qkv(150, 200)
    length = torch.tensor([64, 3, 0, 8])
    out = coarse(q, k, v, Geometry(q_start=None, block_len=length), sm_scale=0.3)
    blocks = [(0, 64), (64, 67), (192, 200)]
    k_mean, v_mean = (torch.stack([t[0, 0, a:z].mean(0) for a, z in blocks]) for t in (k, v))
    for start, stop in ((0, 64), (64, 128), (128, 150)):
        row = torch.softmax(q[0, 0, start:stop].mean(0) @ k_mean.T * 0.3, -1) @ v_mean
        torch.testing.assert_close(out[0, 0, start:stop], row.expand(stop - start, -1))
