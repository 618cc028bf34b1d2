"""What a router on the device gives, against the algorithm in fp64: for tests on emulated and on real cards."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch

from sageattention.backends.cuda import route as device_route
from sageattention.backends.cuda.route import TAIL_HEAD, Routed
from sageattention.backends.sparse_reference import geometry_of, selections
from sageattention.numerics import block_bits
from sageattention.numerics.block_selection import Selection
from sageattention.numerics.sparse import route, undecided
from sageattention.numerics.sparse_geometry import BlockView, Geometry
from sageattention.planning.problem import Problem
from sageattention.planning.sparse_problem import SparseProblem, SparseTensors

KEYWORDS = [name for name in inspect.signature(SparseProblem.from_call).parameters if name not in ("problem", "q")]
DEFAULTS: dict[str, Any] = dict.fromkeys(KEYWORDS) | {
    "selection": "sol", "similarity": 0.0, "q_block": 128, "tail": True, "sinks": (), "query_sinks": (),
}  # fmt: skip


class Call(NamedTuple):
    """A checked call of `sageattn_sparse` on [B, H, N, D] tensors."""

    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    sparse: SparseProblem
    tensors: SparseTensors
    view: BlockView

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal=False, sm_scale=None, device=(), **given) -> Call:
        """`device`: in place of the tensors' own, (type, index)."""
        dense = Problem.from_tensors(q, k, v, is_causal=is_causal, sm_scale=sm_scale, return_lse=True)
        if device:
            dense = dense._replace(device=device[0], device_index=device[1])
        sparse, tensors = SparseProblem.from_call(dense, q, **{**DEFAULTS, **given})
        return cls((q, k, v), sparse, tensors, BlockView(q.shape[2], k.shape[2], geometry_of(sparse, tensors, 128), q.device))

    def route(self, plan) -> tuple[Routed, torch.Tensor]:
        """What the kernels give, and their number of exact blocks."""
        exact = torch.zeros((), dtype=torch.int64, device=self.qkv[0].device)
        return device_route.fused(*self.qkv, self.sparse, self.tensors, plan, self.view, exact), exact

    def check(self, routed: Routed, exact: torch.Tensor) -> None:
        """Hold it against the algorithm in fp64."""
        p = self.sparse.problem
        share = check(
            routed, *self.qkv, selections(self.sparse, self.tensors), self.view.geometry, tail=self.sparse.tail,
            block_mask=self.tensors.block_mask, sm_scale=p.sm_scale,
        )  # fmt: skip
        assert exact == block_bits.unpack(routed.lists[..., 0, :], self.view.n).sum()
        assert abs(exact.item() / device_route.visible_blocks(self.sparse) - share) <= 0.01


def check(
    routed: Routed, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: list[Selection], geometry: Geometry, *, tail: bool,
    block_mask: torch.Tensor | None = None, sm_scale: float | None = None,
) -> float:  # fmt: skip
    """Tensors are [B, H, N, D], all finite. Returns the share of the visible blocks that are exact."""
    view, d = BlockView(q.shape[2], k.shape[2], geometry, q.device), q.shape[3]
    expected = route(q, k, v, rules, geometry, tail=tail, block_mask=block_mask, sm_scale=sm_scale)
    exact, wanted = (block_bits.unpack(bits, view.n) for bits in (routed.lists[..., 0, :], expected.bits))
    assert torch.equal(routed.lists[..., 0, :], block_bits.pack(exact)), "bits beyond the last block"
    differ = exact ^ wanted
    if block_mask is None:
        assert not (differ & ~undecided(q, k, v, rules, geometry, sm_scale=sm_scale)).any()
    else:
        assert not differ.any()
    uneven = block_bits.unpack(routed.lists[..., 1, :], view.n)
    for b in range(q.shape[0]):
        live = view.live_keys(b)
        live = torch.ones(k.shape[2], dtype=torch.bool, device=q.device) if live is None else live
        filled = torch.nn.functional.pad(live, (0, -live.numel() % 64)).view(-1, 64).all(1)
        assert torch.equal(uneven[b] & exact[b], view.of_lists(~(view.whole & filled)) & exact[b])
    torch.testing.assert_close(routed.k_mean[..., :d].double(), expected.k_shift, rtol=1e-5, atol=1e-5)
    assert not routed.k_mean[..., d:].any()
    assert (routed.tail is None) == (not tail)
    if tail:
        same = ~differ.any(-1).repeat_interleave(view.rows, -1)[..., : view.m]
        m, l, o = routed.tail[..., 0], routed.tail[..., 1], routed.tail[..., TAIL_HEAD:]
        assert not o[..., d:].any()
        torch.testing.assert_close(m[same].double(), expected.tail.m[same], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(l[same].double(), expected.tail.l[same], rtol=1e-4, atol=1e-5)
        size = v.double().abs().max() * torch.where(same, expected.tail.l, 1).max().clamp_min(1)
        torch.testing.assert_close(o[same][..., :d].double() / size, expected.tail.o[same] / size, rtol=1e-4, atol=1e-5)
    return wanted.double().sum().item() / max(1, (view.of_lists(view.visible).sum() * q.shape[0] * q.shape[1]).item())
