"""Block-sparse calls on the CUDA kernels against the fp64 reference (marker gpu)."""

from __future__ import annotations

import pytest
import torch
from routing import Call

from sageattention import available_variants, sageattn, sageattn_sparse
from sageattention.backends.cuda import sparse
from sageattention.block_order import cube_order
from sageattention.cli import workloads
from sageattention.planning.here import machine
from sageattention.planning.sparse_plan import sparse_plan
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu
# Relative L2; of the others 0.08. A block whose score is within rounding of the threshold may be exact for the one and not for the other.
BOUND = {"sageattn_qk_int8_pv_fp16_cuda": 0.04, "sageattn_qk_int8_pv_int8_cuda": 0.06}


@pytest.fixture(params=[v.name for v in VARIANTS.values() if v.sparse_kernels])
def variant(request: pytest.FixtureRequest) -> str:
    refused = {found.name: found.reason for found in available_variants("cuda") if found.status == "unsupported"}
    if request.param in refused:
        pytest.skip(refused[request.param])
    return request.param


def qkv(len_q=1500, len_kv=None, heads=4, heads_kv=2, head_dim=128, batch=2, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((heads, len_q), (heads_kv, len_kv or len_q), (heads_kv, len_kv or len_q))
    return tuple(torch.randn(batch, h, n, head_dim, generator=g, device="cuda").to(dtype) for h, n in shapes)


def block_mask(lists, blocks, heads=4, share=0.3, seed=1):
    return torch.rand(2, heads, lists, blocks, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") < share


def agree(variant, q, k, v, **call):
    """Against the reference. Blocks are given, or chosen by scores that lie apart: both then compute the same ones."""
    out, lse, share = sageattn_sparse(q, k, v, variant=variant, return_lse=True, return_share=True, **call)
    exact, exact_lse, exact_share = sageattn_sparse(q, k, v, variant="reference", return_lse=True, return_share=True, **call)
    assert abs(share - exact_share) <= 2e-3
    assert workloads.relative_l2(out, exact.double()) <= BOUND.get(variant, 0.08)
    finite = exact_lse.isfinite()
    assert torch.equal(finite, lse.isfinite()) and (lse - exact_lse)[finite].abs().mean() <= 0.02


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("q_block", [64, 128])
def test_given_blocks(q_block: int, head_dim: int, tail: bool, variant: str) -> None:
    q, k, v = qkv(head_dim=head_dim)
    mask = block_mask(-(-1500 // q_block), 24)
    if q_block == 64:  # the kernels' lists serve 128
        mask = mask[:, :, : 2 * (mask.shape[2] // 2)].unflatten(2, (-1, 2)).any(3).repeat_interleave(2, 2)
    agree(variant, q, k, v, selection="static", block_mask=mask, q_block=q_block, tail=tail)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    "call", [{}, {"tau": 0.5}, {"selection": "mass"}, {"selection": "topk", "keep": 0.3}, {"selection": "cdf", "keep": 0.6}], ids=str
)
def test_selections(call: dict, layout: str, variant: str) -> None:
    q, k, v = qkv()
    if layout == "NHD":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    agree(variant, q, k, v, tensor_layout=layout, **call)


def test_all_blocks_are_dense_attention(variant: str) -> None:
    """Whether the call says so, which the dense kernels then compute, or the scores."""
    q, k, v = qkv()
    dense = sageattn(q.double(), k.double(), v.double(), variant="sdpa")
    for call in ({"selection": "topk", "keep": 1.0}, {"sinks": 1500}, {"tau": -100.0}, {"selection": "mass", "tau": 0.0}):
        out, share = sageattn_sparse(q, k, v, variant=variant, return_share=True, **call)
        assert share == 1 and workloads.relative_l2(out, dense) <= BOUND.get(variant, 0.08), call


@pytest.mark.parametrize("around", [{}, {"order": "random"}, {"key_mask": "random"}, {"is_causal": True}], ids=str)
def test_a_call_that_leaves_nothing_out_is_a_dense_one(around: dict, variant: str) -> None:
    q, k, v = qkv()
    given = in_place(around, 1500)
    out, lse = sageattn_sparse(q, k, v, query_sinks=1500, return_lse=True, variant=variant, **given)
    mask = given["key_mask"][:, None, None] if "key_mask" in given else None
    dense = sageattn(q, k, v, attn_mask=mask, is_causal=given.get("is_causal", False), return_lse=True, variant=variant)
    assert torch.equal(out, dense[0]) and torch.equal(lse, dense[1])


def test_the_output_does_not_depend_on_what_else_is_asked_for(variant: str) -> None:
    q, k, v = qkv(3001)
    assert torch.equal(sageattn_sparse(q, k, v, variant=variant), sageattn_sparse(q, k, v, variant=variant, return_lse=True)[0])


def test_an_order(variant: str) -> None:
    order = cube_order(5, 20, 15, device="cuda")
    q, k, v = qkv()
    agree(variant, q, k, v, order=order, sinks=70, query_sinks=(1400, 1500))


def test_keys_that_do_not_exist(variant: str) -> None:
    q, k, v = qkv()
    keys = torch.rand(2, 1500, generator=torch.Generator("cuda").manual_seed(2), device="cuda") < 0.7
    keys[:, 640:768] = False
    for t in (k, v):
        t.masked_fill_(~keys[:, None, :, None], float("nan"))
    agree(variant, q, k, v, key_mask=keys)
    agree(variant, q, k, v, key_mask=keys, selection="static", block_mask=block_mask(12, 24), tail=False)


def test_padded_tiles(variant: str) -> None:
    q, k, v = qkv(1536)
    lengths = torch.randint(0, 65, (24,), generator=torch.Generator("cuda").manual_seed(3), device="cuda", dtype=torch.int32)
    agree(variant, q, k, v, block_len=lengths)


def test_a_coarse_gate(variant: str) -> None:
    q, k, v = qkv(heads_kv=4)
    agree(variant, q, k, v, selection="topk", keep=0.3, tail=False, coarse_gate=torch.rand_like(q))


@pytest.mark.parametrize("len_q, len_kv", [(1500, 1500), (700, 1500), (1500, 130)])
def test_causal_and_lengths_that_differ(len_q: int, len_kv: int, variant: str) -> None:
    q, k, v = qkv(len_q, len_kv)
    agree(variant, q, k, v)
    agree(variant, q, k, v, is_causal=True, q_start=0)


def test_rows_without_a_block_are_zero(variant: str) -> None:
    q, k, v = qkv()
    mask = block_mask(12, 24)
    mask[:, :, 3] = False
    out, lse = sageattn_sparse(q, k, v, selection="static", block_mask=mask, tail=False, return_lse=True, variant=variant)
    assert (out[:, :, 384:512] == 0).all() and (lse[:, :, 384:512] == -torch.inf).all()


def test_a_thousand_calls_are_equal_bit_for_bit(variant: str) -> None:
    """A graph of twenty, replayed fifty times."""
    q, k, v = qkv(5000, heads=8, heads_kv=8)
    call = in_place({"order": "random"}, 5000) | {"selection": "topk", "keep": 0.2, "variant": variant}
    first = sageattn_sparse(q, k, v, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [sageattn_sparse(q, k, v, **call) for _ in range(20)]
    for _ in range(50):
        for out in captured:
            out.zero_()
        graph.replay()
        assert all(torch.equal(first, out) for out in captured)


# --- the router alone -------------------------------------------------------------------------------------------------------------

SELECTIONS = {
    "sol": {"tau": 0.8},
    "mass": {"selection": "mass", "tau": 1.2},
    "topk": {"selection": "topk", "keep": 0.2},
    "cdf": {"selection": "cdf", "keep": 0.5},
    "tau of heads": {"tau": [0.5, 0.8, 1.0, 1.3]},
    "keep of heads": {"selection": "topk", "keep": [0.0, 0.1, 0.5, 1.0]},
}
AROUND = {
    "plain": {},
    "no tail": {"tail": False},
    "sinks": {"sinks": [(0, 100), (777, 778)], "query_sinks": (2900, 3000)},
    "order": {"order": "random", "sinks": 100, "neighbours": 0},
    "key mask": {"key_mask": "random", "neighbours": -1},
    "padded tiles": {"block_len": "random", "sinks": 64},
    "causal": {"is_causal": True, "sinks": 10},
}


def routed(q, k, v, **given):
    call = Call.of(q, k, v, **given)
    return call, *call.route(sparse_plan(call.sparse, machine(call.sparse.problem)))


def in_place(given: dict, tokens: int) -> dict:
    """Keywords with tensors on the card."""
    g = torch.Generator("cuda").manual_seed(4)
    made = {
        "order": lambda: torch.randperm(tokens, generator=g, device="cuda").int(),
        "key_mask": lambda: torch.rand(2, tokens, generator=g, device="cuda") < 0.8,
        "block_len": lambda: torch.randint(0, 65, (2, -(-tokens // 64)), generator=g, device="cuda", dtype=torch.int32),
    }
    given = {name: made[name]() if x == "random" else x for name, x in given.items()}
    return {name: torch.tensor(x, device="cuda") if name in ("tau", "keep") and isinstance(x, list) else x for name, x in given.items()}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_router(head_dim: int, selection: str, around: str) -> None:
    q, k, v = qkv(3001, head_dim=head_dim)
    call, found, exact = routed(q, k, v, **in_place(SELECTIONS[selection] | AROUND[around], 3001))
    call.check(found, exact)


@pytest.mark.parametrize("lengths", [(1, 1), (64, 64), (130, 3000), (3000, 130), (128, 64 * 1900)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_router_at_lengths_that_differ(dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    for given in (SELECTIONS["sol"], SELECTIONS["topk"]):
        call, found, exact = routed(*qkv(*lengths, dtype=dtype), **given)
        call.check(found, exact)


def test_a_thousand_routes_are_equal_bit_for_bit() -> None:
    q, k, v = qkv(3001)
    for selection in ("sol", "topk", "cdf"):
        _, first, _ = routed(q, k, v, **SELECTIONS[selection])
        for _ in range(334):
            _, again, _ = routed(q, k, v, **SELECTIONS[selection])
            assert torch.equal(first.lists, again.lists) and torch.equal(first.tail[..., :2], again.tail[..., :2])
            assert torch.equal(first.tail[..., 4:], again.tail[..., 4:]) and torch.equal(first.k_mean, again.k_mean)


@pytest.mark.parametrize("selection", ["sol", "mass", "topk", "cdf"])
def test_a_graph_routes_what_it_is_given(selection: str) -> None:
    q, k, v = qkv(3001)
    call = in_place({"order": "random", "key_mask": "random"}, 3001) | SELECTIONS[selection]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sageattn_sparse(q, k, v, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sageattn_sparse(q, k, v, return_lse=True, return_share=True, **call)
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for t in (q, k, v):
            t.copy_(torch.randn_like(t))
        call["key_mask"].copy_(torch.rand(2, 3001, device="cuda") < 0.7)
        graph.replay()
        eager = sageattn_sparse(q, k, v, return_lse=True, return_share=True, **call)
        assert all(torch.equal(one, other) for one, other in zip(captured, eager))
        seen.append(captured[0].clone())
    assert not torch.equal(*seen)


def test_a_call_in_parts_agrees(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(3001)
    call = in_place({"tau": [0.5, 0.8, 1.0, 1.3], "key_mask": "random", "order": "random", "sinks": 100}, 3001)
    whole = sageattn_sparse(q, k, v, variant=variant, return_lse=True, return_share=True, **call)
    monkeypatch.setattr(sparse, "MEMORY_LIMIT", 0)
    parts = sageattn_sparse(q, k, v, variant=variant, return_lse=True, return_share=True, **call)
    assert torch.equal(whole[2], parts[2])
    # Other work tiles are cut for the last wave, whose parts are added in another order.
    assert workloads.relative_l2(parts[0], whole[0].double()) <= 2e-3 and (parts[1] - whole[1]).abs().max() <= 1e-3


@pytest.mark.parametrize("tokens", [104_050, 219_500])
def test_long_videos_take_256_mib(tokens: int) -> None:
    q, k, v = (torch.randn(1, 56, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = sageattn_sparse(q, k, v, selection="topk", keep=0.05)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - 2 * out.numel() <= 256 << 20
    exact = sageattn_sparse(q[:, 55:], k[:, 55:], v[:, 55:], selection="topk", keep=0.05, variant="reference")
    assert workloads.relative_l2(out[:, 55:], exact.double()) <= 0.08
