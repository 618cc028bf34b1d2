"""Calls that write their output into q: the bits of a call that does not, and nothing else of q's memory touched (marker gpu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sageattention import available_variants, dispatch, prepare, sparse_dispatch
from sageattention.backends.cuda import sparse
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu
Qkv = list[torch.Tensor]


def ready(able: Callable[[Any], object]) -> list[str]:
    """The variants that can and run here; without a GPU all that can, for the tests to be listed as skipped."""
    own = [name for name, variant in VARIANTS.items() if able(variant)]
    if not torch.cuda.is_available():
        return own
    return [found.name for found in available_variants("cuda") if found.status == "ready" and found.name in own]


def made(layout: str, fused: bool, heads: tuple[int, int], lengths: tuple[int, int], dim: int, dtype: torch.dtype, batch: int = 2) -> Qkv:
    """q, k and v of (q's, k's and v's) heads and lengths; `fused`: as parts of one memory, the lengths being one."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device="cuda").to(dtype)

    if not fused:
        shapes = [(n, h) if layout == "NHD" else (h, n) for h, n in ((heads[0], lengths[0]), *[(heads[1], lengths[1])] * 2)]
        return [normal(batch, *shape, dim) for shape in shapes]
    if layout == "HND":
        assert heads[0] == heads[1]
        return list(normal(batch, heads[0], lengths[0], 3, dim).unbind(3))
    sizes = [h * dim for h in (heads[0], heads[1], heads[1])]
    return [t.unflatten(-1, (-1, dim)) for t in normal(batch, lengths[0], sum(sizes)).split(sizes, -1)]


def check(given: Qkv, run: Callable[..., Any], expected: torch.Tensor) -> None:
    """`run`: of a call that is the last to have its tensors, but for `given`."""
    address, strides, offset = given[0].data_ptr(), given[0].stride(), given[0].storage_offset()
    before = torch.empty(0, dtype=given[0].dtype, device="cuda").set_(given[0].untyped_storage()).clone()
    out, *_ = run(given.clear)
    assert (out.data_ptr(), out.stride()) == (address, strides)
    assert torch.equal(out, expected)
    after = torch.empty(0, dtype=out.dtype, device="cuda").set_(out.untyped_storage()).clone()
    for whole in (before, after):
        whole.as_strided(out.shape, strides, offset).zero_()
    assert torch.equal(before, after)


DENSE = [
    # layout, fused, heads, lengths, head_dim, dtype, causal, batch
    ("NHD", True, (56, 56), (15_001, 15_001), 128, torch.bfloat16, False, 1),  # several groups of heads
    ("NHD", True, (24, 8), (30_001, 30_001), 128, torch.float16, True, 1),
    ("HND", True, (16, 16), (9_999, 9_999), 128, torch.bfloat16, False, 2),
    ("HND", False, (16, 4), (5_000, 20_000), 64, torch.float16, False, 4),
    ("NHD", False, (8, 8), (4_097, 4_097), 256, torch.bfloat16, True, 2),
    ("NHD", True, (6, 2), (3_333, 3_333), 80, torch.float32, False, 2),
    ("HND", False, (10, 10), (4_096, 77), 64, torch.float16, False, 2),  # few keys
    ("NHD", True, (5, 5), (2_001, 2_001), 40, torch.bfloat16, False, 3),
    ("NHD", True, (40, 40), (2_048, 2_048), 128, torch.bfloat16, False, 1),  # work tiles that CTAs share
]


@pytest.mark.parametrize("call", DENSE, ids=lambda call: f"{call[0]}-{call[2]}-{call[3]}-d{call[4]}")
@pytest.mark.parametrize("variant", ready(lambda variant: variant.has_kernels))
def test_dense_calls(variant: str, call: tuple) -> None:
    layout, fused, heads, lengths, dim, dtype, causal, batch = call
    for masked in (False, True):
        given = made(layout, fused, heads, lengths, dim, dtype, batch)
        mask = torch.arange(lengths[1], device="cuda")[None, None, None] < lengths[1] - 30 if masked else None
        how: dict[str, Any] = {"tensor_layout": layout, "is_causal": causal, "attn_mask": mask, "variant": variant}
        expected, _ = prepare(*given, **how).run()
        if variant.endswith("triton"):  # compiled for such calls: before that they are not taken over
            prepare(*(t.clone() for t in given), **how).run(lambda: None)
        check(given, prepare(*given, **how).run, expected)


SPARSE: dict[str, dict[str, Any]] = {
    "sol": {"tau": 0.8},
    "order": {"selection": "mass", "order": "random", "sinks": 70, "query_sinks": (300, 700)},
    "no tail": {"selection": "topk", "keep": 0.2, "tail": False},
    "key mask": {"selection": "mass", "key_mask": "random"},
    "all": {"sinks": "all"},
}


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("variant", ready(lambda variant: variant.sparse_kernels))
def test_sparse_calls(variant: str, name: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        monkeypatch.setattr(sparse, "MEMORY_LIMIT", 0)
    tokens = 20_001
    for layout, heads in (("NHD", (16, 4)), ("HND", (12, 12))):
        given, how = made(layout, True, heads, (tokens, tokens), 128, torch.bfloat16), SPARSE[name].copy()
        g = torch.Generator("cuda").manual_seed(1)
        if "order" in how:
            how["order"] = torch.randperm(tokens, generator=g, device="cuda").int()
        if "key_mask" in how:
            how["key_mask"] = torch.rand(2, tokens, generator=g, device="cuda") < 0.9
        if how.get("sinks") == "all":
            how["sinks"] = tokens
        how |= {"tensor_layout": layout, "variant": variant}
        expected = sparse_dispatch.prepare(*given, **how).run().out
        check(given, sparse_dispatch.prepare(*given, **how).run, expected)


def test_a_thousand_calls_are_equal_bit_for_bit() -> None:
    """Groups of heads on two streams, memory that is used again at once: each call starts from the same q."""
    source = made("NHD", True, (56, 56), (15_001, 15_001), 128, torch.bfloat16, batch=1)
    expected, _ = prepare(*source, "NHD", variant="auto").run()
    assert not prepare(*source, "NHD").left_to_model
    for turn in range(1000):
        given = [t.clone() for t in source]
        call = prepare(*given, "NHD")
        out, _ = call.run(given.clear)
        assert call.into_q
        if turn % 50 == 0 or turn > 990:
            assert torch.equal(out, expected)


def test_a_capture_leaves_q_as_it_is() -> None:
    given = made("NHD", True, (8, 8), (3000, 3000), 128, torch.bfloat16)
    call: dispatch.Call = prepare(*given, "NHD", variant=ready(lambda variant: variant.backend == "cuda")[0])
    expected, _ = prepare(*given, "NHD", variant=call.plan.variant.name).run()
    before = given[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call.run(given.clear)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, expected)
    assert not call.into_q and torch.equal(call.q, before)
