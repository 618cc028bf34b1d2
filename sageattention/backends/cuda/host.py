"""Host side of the CUDA variants: workspace, groups of heads, launches.

What depends on the problem alone is a `LaunchPlan`, what strides and alignment add to it makes a `Form`; both are worked out once. A call
allocates the output and one workspace, fills addresses into its form's parameter structs, and hands all its launches to the driver
at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import torch_internals
from ...kernels.params import AttendParams, QuantizeKParams, QuantizeVParams, packer
from ...layout import strides
from ...numerics.constants import DTYPES, MASK_KINDS
from ...planning.plan import CudaPlan
from ...planning.problem import Problem
from ..call import PreparedCall, QuantizedKV, Result, result_like
from . import driver
from .launcher import Launch
from .workspace import LaunchPlan, launch_plan_of

_MASK_KINDS = {getattr(torch, name): number for name, number in MASK_KINDS.items()}
(_pack_quantize_k, _quantize_k_constants), (_pack_quantize_v, _quantize_v_constants), (_pack_attend, _attend_constants) = (
    packer(p) for p in (QuantizeKParams, QuantizeVParams, AttendParams)
)


@dataclass(frozen=True)
class CudaQuantizedKV(QuantizedKV[CudaPlan]):
    """K and V of all heads, in the layout of the plan's kernels."""

    buffer: torch.Tensor


def run(call: PreparedCall[CudaPlan]) -> Result:
    """Quantise and attend."""
    q, k, v, mask, p, bound = call.q, call.k, call.v, call.mask, call.problem, call.bound
    out, lse = result_like(q, p)
    q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    mask_at = 0 if mask is None else mask.data_ptr()
    unaligned = (q_at | out_at) % 16, (k_at | v_at) % 16
    form = bound.get(unaligned)
    if form is None:
        launch_plan = launch_plan_of(p, call.plan)
        form = bound[unaligned] = BoundCall(
            launch_plan, _bind_quantize(launch_plan, k, v, unaligned[1]), _bind_attend(launch_plan, q, out, mask, unaligned[0]),
            launch_plan.workspace.size * min(2, len(launch_plan.groups)),
        )  # fmt: skip
    ring = torch.empty(form.size, dtype=torch.uint8, device=q.device)
    base, lse_at = ring.data_ptr(), 0 if lse is None else lse.data_ptr()
    launch_plan, size = form.launch_plan, form.launch_plan.workspace.size
    chains: list[tuple[Launch, ...]] = [
        (*_quantize_launches(launch_plan, quantize_bound, base + number % 2 * size, k_at, v_at),
         _attend_launch(launch_plan, attend_bound, base + number % 2 * size, q_at, mask_at, out_at, lse_at))
        for number, (quantize_bound, attend_bound) in enumerate(zip(form.quantize_bound, form.attend_bound))
    ]  # fmt: skip
    _issue(launch_plan.device, chains)
    return out, lse


def quantize(k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: CudaPlan) -> CudaQuantizedKV:
    """Quantise K and V, all heads in one group."""
    if problem.empty:
        return CudaQuantizedKV(problem, plan, torch.empty(0, dtype=torch.uint8, device=k.device))
    launch_plan = launch_plan_of(problem, plan, True)
    buffer = torch.empty(launch_plan.workspace.size, dtype=torch.uint8, device=k.device)
    k_at, v_at = k.data_ptr(), v.data_ptr()
    (quantize_bound,) = _bind_quantize(launch_plan, k, v, (k_at | v_at) % 16)
    _issue(launch_plan.device, [_quantize_launches(launch_plan, quantize_bound, buffer.data_ptr(), k_at, v_at)])
    return CudaQuantizedKV(problem, plan, buffer)


def attend(q: torch.Tensor, kv: CudaQuantizedKV, problem: Problem, mask: torch.Tensor | None) -> Result:
    """Attend every head of `q` to K and V that were quantised before."""
    out, lse = result_like(q, problem)
    launch_plan = launch_plan_of(problem, kv.plan, True)
    q_at, out_at, lse_at = q.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr()
    (attend_bound,) = _bind_attend(launch_plan, q, out, mask, (q_at | out_at) % 16)
    launch = _attend_launch(launch_plan, attend_bound, kv.buffer.data_ptr(), q_at, 0 if mask is None else mask.data_ptr(), out_at, lse_at)
    _issue(launch_plan.device, [((*launch[:5], False),)])  # anything may be ahead of it on the stream
    return out, lse


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _quantize_launches(r: LaunchPlan, group: BoundQuantize, base: int, k: int, v: int) -> tuple[Launch, Launch]:
    """The first two launches of a group whose workspace starts at `base`."""
    w, (k_strides, v_strides, quantize_k_tail) = r.workspace, group.keys
    kv, k_scale_partial, v_stats, done = base + w.kv, base + w.k_scale_partial, base + w.v_stats, base + w.v_stats_ready
    keys = _pack_quantize_k(
        k, k_strides, v, v_strides, kv, base + w.k_mean, k_scale_partial, v_stats, done, base + w.v_quant_sum, base + w.split_kv_ready,
        quantize_k_tail,
    )  # fmt: skip
    values = _pack_quantize_v(
        v, v_strides, k_scale_partial, v_stats, done, kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean, base + w.v_quant_sum,
        group.values,
    )  # fmt: skip
    return (r.keys, group.key_blocks, 1, 1, keys, False), (r.values, group.value_blocks, 1, 1, values, True)


def _attend_launch(r: LaunchPlan, group: BoundAttend, base: int, q: int, mask: int, out: int, lse: int) -> Launch:
    w, (q_strides, mask_strides, out_strides, tail) = r.workspace, group.constants
    params = _pack_attend(
        q, q_strides, base + w.kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean, base + w.v_quant_sum, base + w.k_mean,
        base + w.split_kv_workspace if r.split_kv_flags else 0, base + w.split_kv_ready,
        mask, mask_strides, out, out_strides, lse, tail,
    )  # fmt: skip
    return r.attend, group.blocks, 1, 1, params, True


def _issue(device: int, chains: list[tuple[Launch, ...]]) -> None:
    """Run the groups' launches. Several groups alternate between the caller's stream and a second one, so that a group is quantised,
    and its first blocks start, while the last blocks of the one before still run."""
    stream = torch_internals.current_stream(device)
    if len(chains) == 1:
        driver.launch(device, stream, chains[0])
        return
    with torch.cuda.device(device):
        own, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_stream(own)
        for number, chain in enumerate(chains):
            driver.launch(device, side.cuda_stream if number % 2 else stream, chain)
        own.wait_stream(side)


_threads = threading.local()


def _side_stream(device: int) -> torch.cuda.Stream:
    """This thread's second stream on a device. One per thread: another thread's stream may be under capture."""
    streams = _threads.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


# --- what strides and alignment add -----------------------------------------------------------------------------------------------


class BoundQuantize(NamedTuple):
    """A group's quantising launches but for their addresses."""

    key_blocks: int  # those for V's statistics among them
    keys: tuple[bytes, ...]  # K's strides, V's strides, the struct's tail
    value_blocks: int
    values: bytes  # the tail; the strides are those of `keys`


class BoundAttend(NamedTuple):
    """A group's attention launch but for its addresses."""

    blocks: int
    constants: tuple[bytes, ...]  # q's strides, the mask's, the output's, the struct's tail


class BoundCall(NamedTuple):
    """Calls that differ in nothing but addresses."""

    launch_plan: LaunchPlan
    quantize_bound: tuple[BoundQuantize, ...]  # one for each group of heads
    attend_bound: tuple[BoundAttend, ...]
    size: int  # bytes of workspace


def _bind_quantize(r: LaunchPlan, k: torch.Tensor, v: torch.Tensor, unaligned: int) -> tuple[BoundQuantize, ...]:
    p = r.problem
    k_strides, v_strides = strides(k, p.layout), strides(v, p.layout)
    vectors = _vectors(p, unaligned, k_strides, v_strides)
    groups = []
    for first, bh_count in r.groups:
        shape = first, bh_count, p.heads_kv, p.len_kv, p.head_dim, DTYPES[p.dtype], vectors
        keys = _quantize_k_constants(*k_strides, *v_strides, *shape, *r.quantize_k_tail)
        values = _quantize_v_constants(*v_strides, *shape, *r.quantize_v_tail)
        groups.append(BoundQuantize(bh_count * (r.k_ctas_per_head + r.v_chunks), keys, bh_count * r.v_ctas_per_head, values[-1]))
    return tuple(groups)


def _bind_attend(r: LaunchPlan, q: torch.Tensor, out: torch.Tensor, mask: torch.Tensor | None, unaligned: int) -> tuple[BoundAttend, ...]:
    p = r.problem
    q_strides, out_strides = strides(q, p.layout), strides(out, p.layout)
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    kind, heads_per_kv = 0, p.heads_q // p.heads_kv
    if mask is not None:  # 0 where it broadcasts
        mask_strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        kind = _MASK_KINDS[mask.dtype]
    vectors = _vectors(p, unaligned, q_strides), _vectors(p, unaligned, out_strides)

    def group(first: int, bh_count: int) -> BoundAttend:
        items = r.q_tiles * bh_count * heads_per_kv
        blocks = min(items, r.grid_limit)
        full_waves = items // blocks - 1 if r.split_kv_flags else -(-items // blocks)
        return BoundAttend(
            blocks,
            _attend_constants(
                *q_strides, *mask_strides, *out_strides, first, bh_count, p.heads_kv, heads_per_kv, p.len_q, p.len_kv, p.head_dim,
                DTYPES[p.dtype], *vectors, p.causal, kind, r.tiles, r.q_tiles, full_waves,
                *((2**32 - 1) // d for d in (r.q_tiles, heads_per_kv, p.heads_kv)), *r.attend_tail,
            ),
        )  # fmt: skip

    return tuple(group(*g) for g in r.groups)


def _vectors(p: Problem, unaligned: int, *rows: tuple[int, int, int]) -> int:
    """1 where rows can be moved in pieces of 16 bytes."""
    per_piece = 16 // (4 if p.dtype == "float32" else 2)
    return int(not unaligned and p.head_dim % 8 == 0 and not any(stride % per_piece for strides in rows for stride in strides))
