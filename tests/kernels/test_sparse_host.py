"""What block-sparse calls, routed by the reference, hand to the attention: the launches' arguments, on CPU tensors; nothing is launched."""

from __future__ import annotations

import ctypes
import inspect
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from sageattention import sparse_dispatch  # noqa: E402
from sageattention.backends.cuda import driver, host, sparse  # noqa: E402
from sageattention.device import capability  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.kernels.params import AttendParams, QuantizeKParams  # noqa: E402
from sageattention.numerics import block_bits  # noqa: E402
from sageattention.numerics.block_selection import Selection  # noqa: E402
from sageattention.numerics.sparse import Geometry, route  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.planning.sparse_plan import sparse_plan  # noqa: E402
from sageattention.planning.sparse_problem import SparseProblem  # noqa: E402

BATCH, HEADS, HEADS_KV, TOKENS, HEAD_DIM = 2, 4, 2, 1000, 80
BLOCKS, LISTS = 16, 8
ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1)).int()
KEYS = torch.arange(TOKENS).expand(BATCH, -1) % 700 < torch.tensor([[700], [300]])
KEYWORDS = inspect.signature(SparseProblem.from_call).parameters


def words(address: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(ctypes.string_at(address, 4 * size)), dtype=dtype).view(shape)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch):
    """A function that makes a call and gives, by group of heads, (arguments, what they point at) of K's quantising and of attention."""
    card = Capability("cuda", 90, 132, name="a card")
    found: list[tuple] = []

    def issue(device: int, chains: list) -> None:
        for chain in chains:
            k, attend = QuantizeKParams.from_buffer_copy(chain[0][4]), AttendParams.from_buffer_copy(chain[-1][4])
            lists = words(attend.lists.bits, BATCH, HEADS, LISTS, 2, attend.lists.words)
            tail = words(attend.tail, BATCH, HEADS, BLOCKS, 4 + 128, dtype=torch.float32) if attend.tail else None
            live = words(k.live.bits, BATCH, k.live.words) if k.live.bits else None
            k_mean = words(attend.k_mean, BATCH, HEADS_KV, 128, dtype=torch.float32)
            assert k.k_mean == attend.k_mean
            found.append((k, attend, lists, tail, live, k_mean))

    monkeypatch.setattr(capability, "of_device", lambda *device: card)
    monkeypatch.setattr(driver, "kernel", lambda *named: 1)
    monkeypatch.setattr(host, "issue", issue)
    monkeypatch.setattr(sparse, "has_kernels", lambda problem: False)

    def call(**given):
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(BATCH, h, TOKENS, HEAD_DIM, generator=g).bfloat16() for h in (HEADS, HEADS_KV, HEADS_KV))
        dense = Problem.from_tensors(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=True)
        rest = {"selection": "topk", "keep": 0.3, "similarity": 0.0, "q_block": 128, "tail": True, "sinks": (), "query_sinks": ()}
        blank = {name: None for name in KEYWORDS if name not in ("problem", "q")}
        problem, tensors = SparseProblem.from_call(dense, q, **{**blank, **rest, **given})
        share = sparse.run(q, k, v, problem, tensors, sparse_plan(problem, card)).share
        return (q, k, v), found, share

    return call


@pytest.mark.parametrize(
    "given",
    [{}, {"tail": False}, {"order": ORDER}, {"key_mask": KEYS}, {"sinks": 70, "neighbours": 0}],
    ids=lambda given: ",".join(given) or "plain",
)
def test_kernels_get_the_route(handed, given):
    tensors, [(k, attend, lists, tail, live, k_mean)], share = handed(**given)
    geometry = Geometry(order=given.get("order"), key_mask=given.get("key_mask"), neighbours=given.get("neighbours", 1))
    if "sinks" in given:
        geometry = Geometry(sinks=[(0, 70)], neighbours=0)
    chosen = route(*(t.double() for t in tensors), Selection("topk", keep=0.3), geometry, tail=given.get("tail", True))
    exact = block_bits.unpack(chosen.bits, BLOCKS)
    assert torch.equal(block_bits.unpack(lists[..., 0, :], BLOCKS), exact)
    assert share == pytest.approx(exact.double().mean().item())
    assert (bool(attend.order), bool(k.order)) == ("order" in given,) * 2 and k.k_mean_given == 1
    torch.testing.assert_close(k_mean[..., :HEAD_DIM].double(), chosen.k_shift, rtol=1e-4, atol=1e-5)
    assert not k_mean[..., HEAD_DIM:].any()
    if chosen.tail is None:
        assert tail is None
    else:
        torch.testing.assert_close(tail[..., 0].double(), chosen.tail.m, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tail[..., 1].double(), chosen.tail.l, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tail[..., 4 : 4 + HEAD_DIM].double(), chosen.tail.o, rtol=1e-3, atol=1e-3)
        assert not tail[..., 4 + HEAD_DIM :].any()
    uneven = block_bits.unpack(lists[..., 1, :], BLOCKS)
    present = torch.nn.functional.pad(KEYS, (0, 24)) if "key_mask" in given else torch.arange(1024).expand(BATCH, -1) < TOKENS
    assert torch.equal(uneven, ~present.view(BATCH, 1, 1, BLOCKS, 64).all(-1).expand_as(uneven))
    assert (live is None) == ("key_mask" not in given)
    if live is not None:
        assert torch.equal(block_bits.unpack(live, TOKENS), KEYS)


def test_a_list_of_64_queries_serves_128(handed):
    mask = torch.rand(BATCH, HEADS, BLOCKS, BLOCKS, generator=torch.Generator().manual_seed(3)) < 0.2
    _, [(_, _, lists, _, _, _)], _ = handed(selection="static", keep=None, q_block=64, block_mask=mask)
    assert torch.equal(block_bits.unpack(lists[..., 0, :], BLOCKS), mask.unflatten(2, (LISTS, 2)).any(3))


SOME = torch.arange(TOKENS) % 3 > 0
NOTHING_LEFT_OUT = {
    "all of topk": {"selection": "topk", "keep": 1.0},
    "sinks": {"sinks": TOKENS},
    "query sinks": {"query_sinks": (0, TOKENS), "order": ORDER},
    "key mask": {"sinks": TOKENS, "key_mask": SOME.expand(BATCH, -1)},
}
SOMETHING_LEFT_OUT = {
    "most": {"selection": "topk", "keep": 0.999},
    "shares of heads": {"selection": "topk", "keep": torch.ones(HEADS)},
    "sinks in parts": {"sinks": [(0, 500), (500, TOKENS - 1)]},
    "padded tiles": {"sinks": TOKENS, "block_len": torch.full((BLOCKS,), 64, dtype=torch.int32)},
}


@pytest.mark.parametrize("name", [*NOTHING_LEFT_OUT, *SOMETHING_LEFT_OUT])
def test_calls_that_leave_nothing_out_are_dense(name, monkeypatch):
    given, card, made = (NOTHING_LEFT_OUT | SOMETHING_LEFT_OUT)[name], Capability("cuda", 90, 132, name="a card"), []
    q, k, v = (torch.randn(BATCH, h, TOKENS, HEAD_DIM).bfloat16() for h in (HEADS, HEADS_KV, HEADS_KV))
    sparse_result = object()

    def dense(*tensors, **options):
        made.append(options)
        return SimpleNamespace(run=lambda release=None: (q.clone(), None))

    monkeypatch.setattr(sparse_dispatch, "machine", lambda problem: card)
    monkeypatch.setattr(sparse_dispatch.sparse_cuda, "run", lambda *call: sparse_result)
    monkeypatch.setattr(sparse_dispatch.dispatch, "prepare", dense)
    blank = {name: None for name in KEYWORDS if name not in ("problem", "q")}
    rest = {"selection": "sol", "similarity": 0.0, "q_block": 128, "tail": True, "sinks": (), "query_sinks": ()}
    call = sparse_dispatch.prepare(
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, variant="auto", **{**blank, **rest, **given}
    )  # fmt: skip
    result = call.run()
    if name in SOMETHING_LEFT_OUT:
        assert result is sparse_result and not made
        return
    assert torch.equal(result.out, q) and result.lse is None and result.share == 1
    (options,) = made
    assert options["variant"] == "sageattn_qk_int8_pv_fp8_cuda_sm90" and not options["return_lse"]
    assert ("key_mask" in given) == (options["attn_mask"] is not None)
    if "key_mask" in given:
        assert torch.equal(options["attn_mask"], given["key_mask"][:, None, None])
