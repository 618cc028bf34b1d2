"""The named shapes and input kinds: seeded, complete, and as their names say."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from sageattention.cli import video, workloads  # noqa: E402
from sageattention.cli.mask_forms import MASK_FORMS  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402

SMALL = workloads.Shape("small", 1, 2, 33, 65, 64)


@pytest.mark.parametrize("kind", workloads.KINDS)
def test_same_seed_same_tensors(kind):
    first, again, other = (workloads.make(kind, SMALL, seed=seed) for seed in (1, 1, 2))
    assert [tuple(t.shape) for t in first] == [(1, 2, 33, 64), (1, 2, 65, 64), (1, 2, 65, 64)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", workloads.KINDS)
def test_every_kind_bounds_every_pv_type(kind):
    assert set(workloads.KINDS[kind].bounds) == {"fp16", "fp8", "int8"}


def test_sink_stands_eight_nats_above_the_tail():
    q, k, _ = workloads.make("sink", SMALL, dtype=torch.float32)
    logits = q @ k.mT / SMALL.head_dim**0.5
    torch.testing.assert_close(logits[..., 0], torch.full_like(logits[..., 0], 8.0))
    assert logits[..., 1:].abs().max() < 1


def test_logits6_has_six_nats():
    q, k, _ = workloads.make("logits6", replace(SMALL, len_q=256, len_kv=256))
    assert abs(float((q.float() @ k.float().mT).std()) / SMALL.head_dim**0.5 - 6) < 0.5


def test_large_v_does_not_fit_fp16():
    with pytest.raises(ValueError, match="float16"):
        workloads.make("large_v", SMALL, dtype=torch.float16)


@pytest.mark.parametrize("tokens", [1, 65, 3001, 15360, 37700, 75600, 104050, 219500])
def test_video_grid_holds_all_tokens(tokens):
    prefix, frames, height, width = video.grid_of(tokens)
    assert prefix + frames * height * width == tokens
    assert tokens < 3000 or (128 <= prefix <= tokens // 10 and 1.5 < width / height < 1.7)


def test_video_heads_differ_in_reach():
    shape = workloads.Shape("video", 1, 8, 4000, 4000, 64)
    q, k, _ = workloads.make("video", shape, dtype=torch.float32)
    prefix = video.grid_of(4000).prefix
    rows = slice(prefix, None, 29)
    weight = torch.softmax(q[0, :, rows] @ k[0].mT / 8, -1)
    assert (weight[..., :prefix].sum(-1).mean(-1) - 0.2)[[0, 1, 2, 3, 4, 5, 7]].abs().max() < 0.15
    assert weight[6, :, 0].mean() > 0.2  # the sink
    mass = torch.nn.functional.pad(weight, (0, -4000 % 64)).unflatten(-1, (-1, 64)).sum(-1).sort(-1, descending=True).values
    share = ((mass.cumsum(-1) < 0.9).sum(-1) + 1).float().mean(-1) / mass.shape[-1]
    assert 0.04 < share.min() < 0.12 and 0.25 < share.max() < 0.4


def test_video_of_fewer_queries_takes_spaced_ones():
    shape = workloads.Shape("video", 1, 2, 300, 300, 64)
    q, k, v = workloads.make("video", shape, dtype=torch.float32)
    few = workloads.make("video", replace(shape, len_q=30), dtype=torch.float32)
    assert torch.equal(few[0], q[:, :, torch.linspace(0, 299, 30).long()]) and torch.equal(few[1], k) and torch.equal(few[2], v)


def test_metrics():
    q, k, v = workloads.make("coherent_v", SMALL)
    exact = oracle(q, k, v)[0]
    assert workloads.relative_l2(exact, exact) == 0
    assert workloads.gain(0.9 * exact, exact) == pytest.approx(0.9)
    assert workloads.relative_l2(0.9 * exact, exact) == pytest.approx(0.1)


def test_heads_that_share_keys_and_views_of_one_tensor():
    shape = replace(SMALL, heads=6, heads_kv=2, len_q=65, fused=True)
    fused, plain = workloads.make("normal", shape), workloads.make("normal", replace(shape, heads_kv=0, fused=False))
    assert [t.shape[1] for t in fused] == [6, 2, 2]
    assert torch.equal(fused[0], plain[0]) and all(torch.equal(f, p[:, ::3]) for f, p in zip(fused[1:], plain[1:]))
    assert len({t.untyped_storage().data_ptr() for t in fused}) == 1
    assert all(t.stride() == (10 * 64 * 65, 64, 10 * 64, 1) for t in fused)


@pytest.mark.parametrize("shape", workloads.MODELS.values(), ids=lambda shape: shape.name)
def test_shapes_of_models_are_calls(shape):
    assert shape.heads % shape.kv_heads == 0
    assert shape.len_q == shape.len_kv or not shape.fused
    assert shape.name not in workloads.SHAPES


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, len_q=4608, len_kv=4608)], ids=["short", "krea2"])
@pytest.mark.parametrize("form", MASK_FORMS.values(), ids=lambda form: form.name)
def test_masks_as_models_hand_them_over(form, shape):
    square = shape.len_q == shape.len_kv
    assert form.fits(shape) == (square or form.name not in ("text", "causal"))
    keywords = form.keywords(shape, torch.bfloat16, "cpu")
    q, k = torch.empty(1, 2, shape.len_q, 64, device="meta"), torch.empty(1, 2, shape.len_kv, 64, device="meta")
    mask = keywords.pop("attn_mask", None)
    assert keywords == ({"is_causal": True} if mask is None else {})
    if mask is None:
        return
    assert mask.expand(1, 2, shape.len_q, shape.len_kv).shape[2:] == (q.shape[2], k.shape[2])
    kept = mask if mask.dtype == torch.bool else mask == 0
    share = {"key bool": 1 - 200 / 4608, "key finfo.min": 1 - 200 / 4608, "text": 0.895, "random": 0.5}[form.name]
    if square:
        assert float(kept.float().mean()) == pytest.approx(share, abs=2e-3)
    assert kept.any(-1).all()  # no row without a key


@pytest.mark.parametrize("shape", [SMALL, *workloads.SHAPES.values()], ids=lambda shape: shape.name)
def test_flops_are_those_that_torch_counts(shape):
    q = torch.empty(shape.batch, shape.heads, shape.len_q, shape.head_dim, device="meta")
    k = torch.empty(shape.batch, shape.heads, shape.len_kv, shape.head_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT), k.flatten(0, 1))
    assert shape.flops == counter.get_total_flops()
