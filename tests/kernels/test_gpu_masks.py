"""Masks on a GPU: keys that nobody sees change nothing, lists follow the mask of the moment, and any list is walked right (marker gpu)."""

from __future__ import annotations

from dataclasses import replace

import masked
import matrix
import pytest
import tile_bits
import torch

from sageattention import Unsupported, attend, available_variants, dispatch, quantize_kv, sageattn
from sageattention.backends.cuda import host
from sageattention.cli import workloads
from sageattention.numerics import reference
from sageattention.planning.plan import CudaPlan
from sageattention.planning.problem import Problem
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
OWN = [v for v in VARIANTS.values() if v.backend in ("triton", "cuda")]
# Each accumulator that computes something else than the ones before it.
CANDIDATES = [(v.name, a) for v in OWN for a in dict(reversed([(s, a) for a, s in v.accum.items()])).values() or ("",)]
each_candidate = pytest.mark.parametrize("variant, accum", CANDIDATES)
each_variant = pytest.mark.parametrize("variant", [v.name for v in OWN])


@pytest.fixture(autouse=True)
def for_this_card(request: pytest.FixtureRequest) -> None:
    """Skips the variants that this card can't run; one whose kernel is missing fails."""
    variant = request.getfixturevalue("variant") if "variant" in request.fixturenames else ""
    refused = {found.name: found.reason for found in available_variants(DEVICE) if found.status == "unsupported"}
    if variant in refused:
        pytest.skip(refused[variant])


def call(variant: str, accum: str = "", layout: str = "HND", **given) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, Nq, D], lse) of tensors in HND."""
    where = dict(given)
    if layout == "NHD":
        where |= {name: given[name].transpose(1, 2).contiguous() for name in "qkv"}
    prepared = dispatch.prepare(
        **{"is_causal": False, "attn_mask": None, "sm_scale": None, **where}, tensor_layout=layout, return_lse=True,
        variant=variant, accum=accum,
    )  # fmt: skip
    out, lse = prepared.run()
    return out if layout == "HND" else out.transpose(1, 2), lse


def wide(case: masked.Case, **changes) -> masked.Case:
    """Sixteen times the heads: the error of a few is a matter of chance."""
    return replace(case, heads=16 * case.heads, heads_kv=16 * case.heads_kv, **changes)


# --- keys that nobody sees


@each_candidate
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("case", masked.CASES, ids=lambda case: case.name)
def test_error_is_that_of_the_keys_cut_off(case: masked.Case, head_dim: int, layout: str, variant: str, accum: str) -> None:
    case = wide(case, head_dim=head_dim)
    spoilt, cut = case.spoilt(DEVICE), case.cut(DEVICE)
    exact = reference.oracle(**cut)[0]
    out, lse = call(variant, accum, layout, **spoilt)
    alone, alone_lse = call(variant, accum, layout, **cut)
    seeing = alone_lse.isfinite()  # a causal query may see hidden keys alone
    assert out.isfinite().all() and torch.equal(lse.isfinite(), seeing)
    assert workloads.relative_l2(out, exact) <= 1.05 * workloads.relative_l2(alone, exact)
    assert (lse - alone_lse)[seeing].abs().mean() <= 0.02


@each_candidate
@pytest.mark.parametrize("form", masked.FORMS)
@pytest.mark.parametrize("heads, heads_kv", [(4, 4), (8, 2), (6, 1)])
def test_each_form_of_mask_with_shared_keys(heads: int, heads_kv: int, form: str, variant: str, accum: str) -> None:
    case = masked.Case("", 900, masked.one_in(3), masked.times(50, 50), form, heads=heads, heads_kv=heads_kv, batch=2, len_q=300)
    exact = reference.oracle(**case.cut(DEVICE))[0]
    out, _ = call(variant, accum, **case.spoilt(DEVICE))
    alone, _ = call(variant, accum, **case.cut(DEVICE))
    assert workloads.relative_l2(out, exact) <= 1.05 * workloads.relative_l2(alone, exact)


@each_candidate
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_fewer_queries_than_a_band_of_the_lists(is_causal: bool, variant: str, accum: str) -> None:
    """Then a mask that tells queries apart has one list, too."""
    q, k, v = (torch.randn(2, 8, n, 64, device=DEVICE, dtype=torch.bfloat16) for n in (40, 300, 300))
    for rows in (1, 40):
        mask = torch.rand(2, 1, rows, 300, device=DEVICE) > 0.3
        mask[..., 0] = True
        exact = reference.oracle(q, k, v, is_causal=is_causal, attn_mask=mask)[0]
        out, _ = call(variant, accum, q=q, k=k, v=v, is_causal=is_causal, attn_mask=mask)
        assert workloads.relative_l2(out, exact) <= 0.06


@each_variant
def test_what_hidden_keys_hold_changes_no_bit(variant: str) -> None:
    for form in masked.FORMS:
        case = masked.Case("", 1500, masked.one_in(4), masked.times(1, 1), form, heads=4, heads_kv=2, len_q=500)
        plain = call(variant, **case.spoilt(DEVICE))
        for spoil in (masked.alike, masked.times(50, 50), masked.filled(3e38), masked.filled(float("nan"))):
            assert all(torch.equal(a, b) for a, b in zip(plain, call(variant, **replace(case, spoil=spoil).spoilt(DEVICE)))), form


@each_variant
def test_each_batch_item_has_a_mask_of_its_own(variant: str) -> None:
    t, _ = matrix.tensors(matrix.Case(128, heads_q=4, heads_kv=2, len_q=300, len_kv=1000), DEVICE)
    keep = torch.ones(2, 1, 1, 1000, dtype=torch.bool, device=DEVICE)
    keep[0, ..., 100:], keep[1, ..., :900] = False, False
    both, _ = call(variant, **t, attn_mask=keep)
    for b in range(2):
        own = {name: x[b : b + 1] for name, x in t.items()}
        alone, _ = call(variant, **own, attn_mask=keep[b : b + 1])
        exact = reference.oracle(**own, attn_mask=keep[b : b + 1])[0]
        assert workloads.relative_l2(both[b : b + 1], exact) <= 1.05 * workloads.relative_l2(alone, exact)


@each_candidate
@pytest.mark.parametrize("additive", [False, True])
def test_rows_without_a_key_are_zero(additive: bool, variant: str, accum: str) -> None:
    t, _ = matrix.tensors(matrix.Case(128, heads_q=4, heads_kv=2, len_q=700, len_kv=1000), DEVICE)
    keep = torch.rand(1, 1, 700, 1000, device=DEVICE) < 0.5
    keep[:, :, 128:384], keep[:, :, 5] = False, False  # whole blocks of queries, and one row
    mask = torch.zeros_like(keep, dtype=torch.bfloat16).masked_fill(~keep, -torch.inf) if additive else keep
    out, lse = call(variant, accum, **t, attn_mask=mask)
    empty = ~keep[0, 0].any(-1)
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -torch.inf).all()
    assert workloads.relative_l2(out, reference.oracle(**t, attn_mask=mask)[0]) <= 0.08


@each_candidate
@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min])
def test_rows_of_one_finite_bias_are_softmax_over_all_keys(lowest: float, variant: str, accum: str) -> None:
    t, _ = matrix.tensors(matrix.Case(128, heads_q=4, heads_kv=2, len_q=300, len_kv=1000), DEVICE)
    mask = torch.zeros(1, 1, 300, 1000, device=DEVICE)
    mask[..., 100:], mask[:, :, 7] = lowest, lowest
    out, _ = call(variant, accum, **t, attn_mask=mask)
    plain = reference.oracle(**t, attn_mask=torch.where(torch.arange(300, device=DEVICE)[:, None] == 7, 0.0, mask))[0]
    if lowest < -1e30:  # fp32 keeps nothing of a score beside it: the plain average
        plain[:, :, 7] = t["v"].double().mean(2).repeat_interleave(2, 1)
    assert workloads.relative_l2(out[:, :, 7], plain[:, :, 7]) <= 0.08
    assert workloads.relative_l2(out, plain) <= 0.08


# --- lists follow the mask of the moment


def masks_of(len_q: int, len_kv: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(seed)
    key = torch.rand(2, 1, 1, len_kv, generator=g, device=DEVICE) < 0.5
    dense = torch.rand(1, 4, len_q, len_kv, generator=g, device=DEVICE) < 0.5
    text = torch.ones(1, 1, len_q, len_kv, dtype=torch.bool, device=DEVICE)
    text[..., :100, :] = torch.ones(100, len_kv, dtype=torch.bool, device=DEVICE).tril(seed)
    bias = torch.randn(1, 1, len_q, len_kv, generator=g, device=DEVICE).masked_fill(~key[:1], -torch.inf)
    return {"key": key, "dense": dense, "text": text, "bias": bias}


@each_variant
@pytest.mark.parametrize("form", ["key", "dense", "text", "bias"])
def test_a_thousand_repeats_give_the_same_bits(form: str, variant: str) -> None:
    t, _ = matrix.tensors(matrix.Case(128, heads_q=4, heads_kv=2, len_q=300, len_kv=700), DEVICE)
    mask = masks_of(300, 700, 0)[form]
    expected = call(variant, **t, attn_mask=mask)
    different = 0
    for _ in range(1000):
        different += not all(torch.equal(a, b) for a, b in zip(call(variant, **t, attn_mask=mask), expected))
    assert different == 0


@each_variant
@pytest.mark.parametrize("form", ["key", "dense", "text", "bias"])
def test_a_graph_replayed_after_its_mask_was_overwritten(form: str, variant: str) -> None:
    t, _ = matrix.tensors(matrix.Case(128, heads_q=4, heads_kv=2, len_q=300, len_kv=700), DEVICE)
    first, second = (masks_of(300, 700, seed)[form] for seed in (0, 1))
    expected = sageattn(**t, attn_mask=second, variant=variant)
    static = first.clone()
    sageattn(**t, attn_mask=static, variant=variant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sageattn(**t, attn_mask=static, variant=variant)
    graph.replay()
    assert torch.equal(out, sageattn(**t, attn_mask=first, variant=variant))
    static.copy_(second)
    graph.replay()
    assert torch.equal(out, expected)


@each_variant
@pytest.mark.parametrize("form", ["key", "dense", "bias"])
def test_compiled(form: str, variant: str) -> None:
    t, _ = matrix.tensors(matrix.Case(128, heads_q=4, heads_kv=2, len_q=300, len_kv=700), DEVICE)
    mask = masks_of(300, 700, 0)[form]
    torch._dynamo.reset()  # it compiles the same code for few variants only
    compiled = torch.compile(lambda q, k, v, mask: sageattn(q, k, v, attn_mask=mask, variant=variant) * 2, fullgraph=True)
    assert torch.equal(compiled(**t, mask=mask), sageattn(**t, attn_mask=mask, variant=variant) * 2)


# --- halves


@each_variant
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_halves_that_know_the_key_mask_are_the_call(layout: str, variant: str) -> None:
    case = masked.Case("", 1100, masked.one_in(4), masked.filled(float("nan")), heads=4, heads_kv=2, batch=2, len_q=300)
    given = case.spoilt(DEVICE)
    mask = given["attn_mask"]
    whole, whole_lse = call(variant, **given)
    q, k, v = (given[name] if layout == "HND" else given[name].transpose(1, 2).contiguous() for name in "qkv")
    kv = quantize_kv(k, v, layout, variant=variant, key_mask=mask[:, 0, 0])
    k.zero_(), v.zero_()
    out, lse = attend(q, kv, attn_mask=mask, return_lse=True)
    out = out if layout == "HND" else out.transpose(1, 2)
    exact = reference.oracle(**case.cut(DEVICE))[0]
    assert workloads.relative_l2(out, exact) <= 1.01 * workloads.relative_l2(whole, exact)
    assert (lse - whole_lse).abs().max() <= 1e-2


@each_variant
def test_a_mask_that_hides_more_than_the_key_mask_stays_right(variant: str) -> None:
    case = masked.Case("", 1100, masked.last(300), masked.times(50, 50), heads=4, heads_kv=2, len_q=300)
    given = case.spoilt(DEVICE)
    kv = quantize_kv(given["k"], given["v"], variant=variant, key_mask=given["attn_mask"][:, 0, 0])
    more = given["attn_mask"] & (torch.rand(1, 1, 300, 1100, device=DEVICE) < 0.5)
    exact = reference.oracle(given["q"], given["k"], given["v"], attn_mask=more)[0]
    assert workloads.relative_l2(attend(given["q"], kv, attn_mask=more), exact) <= 0.08
    with pytest.raises(Unsupported, match="key_mask"):
        attend(given["q"], kv)


@each_variant
@pytest.mark.parametrize("mask", ["bool", "additive", "row", "causal+bool"])
def test_halves_that_know_no_mask(mask: str, variant: str) -> None:
    t, given = matrix.tensors(matrix.Case(80, mask=mask, heads_q=4), DEVICE)
    kv = quantize_kv(t["k"], t["v"], variant=variant)
    out, lse = attend(t["q"], kv, attn_mask=given, is_causal="causal" in mask, return_lse=True)
    exact, exact_lse = reference.oracle(**t, attn_mask=given, is_causal="causal" in mask)
    assert workloads.relative_l2(out, exact) <= 0.08
    empty = exact_lse == -torch.inf
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()


# --- lists that no mask gives


@pytest.mark.parametrize("variant, accum", [c for c in CANDIDATES if VARIANTS[c[0]].backend == "cuda"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", [(700, 1500), (1000, 1536), (40, 64)], ids=str)
@pytest.mark.parametrize("kind", tile_bits.KINDS)
def test_attention_by_any_list(
    kind: str, lengths: tuple[int, int], head_dim: int, variant: str, accum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, _ = matrix.tensors(matrix.Case(head_dim, heads_q=4, heads_kv=2, len_q=lengths[0], len_kv=lengths[1]), DEVICE)
    t = {name: x[:1] for name, x in t.items()}
    mask = torch.ones(1, 4, *lengths, dtype=torch.bool, device=DEVICE)
    problem = Problem.from_tensors(**t, attn_mask=mask, return_lse=True)
    chosen = dispatch.plan_for(problem, variant, accum)
    assert isinstance(chosen, CudaPlan)
    bits, pairs = tile_bits.made_up(kind, *lengths, 4, chosen.tile.block_m, chosen.tile.block_n)
    tile_bits.install(monkeypatch, bits)
    pairs = pairs.to(DEVICE)
    out, lse = host.attend(t["q"], host.quantize(t["k"], t["v"], problem, chosen, mask), problem, mask)
    exact, exact_lse = reference.oracle(**t, attn_mask=pairs)
    nothing = ~pairs.any(-1)
    assert (out[nothing] == 0).all() and (lse[nothing] == -torch.inf).all()
    if nothing.all():
        return
    emulated, _ = reference.emulate(**t, scheme=chosen.scheme, attn_mask=pairs)
    assert workloads.relative_l2(out, emulated) <= 2 * matrix.EMULATION_BOUND[chosen.scheme.pv] + matrix.OUTPUT_STEP["bfloat16"]
    assert workloads.relative_l2(out, exact) <= 1.05 * workloads.relative_l2(emulated, exact) + matrix.OUTPUT_STEP["bfloat16"]
    assert (lse - exact_lse)[~nothing].abs().mean() <= 0.02
