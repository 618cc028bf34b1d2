"""The named shapes and input kinds: seeded, complete, and as their names say."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from sageattention.cli import workloads  # noqa: E402
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


def test_metrics():
    q, k, v = workloads.make("coherent_v", SMALL)
    exact = oracle(q, k, v)[0]
    assert workloads.relative_l2(exact, exact) == 0
    assert workloads.gain(0.9 * exact, exact) == pytest.approx(0.9)
    assert workloads.relative_l2(0.9 * exact, exact) == pytest.approx(0.1)


def test_shapes_are_the_customary_flops():
    assert workloads.SHAPES["wan_480p"].flops == 4 * 40 * 32760 * 32760 * 128
