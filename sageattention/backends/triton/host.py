"""Host side of the Triton variant: workspace, groups of heads, launches."""

from __future__ import annotations

import contextlib
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, TritonError

from ...errors import CudaError, KernelMissing
from ...layout import strides
from ...numerics import hadamard
from ...numerics.constants import FINITE_MAX
from ...numerics.live_keys import live_keys, reachable
from ...planning.plan import TritonPlan
from ...planning.problem import Problem
from ..call import PreparedCall, QuantizedKV, Result, result_like
from .attend import attend as _attend_kernel
from .quantize import ROWS, SPLITS, quantize_kv, statistics

STATISTICS_BLOCK = 64  # tokens a step
# What the driver says where it can't load a kernel (errors 200, 209, 218, 221, 222 and 500): nothing has run then.
LOADING = ("kernel image", "PTX", "symbol not found")

_broken: dict[tuple, str] = {}  # what can't be built here (`_form`) → why


@dataclass(frozen=True)
class Packed:
    """Offsets of packed sequences, int32 or int64 [B + 1] each."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor


@dataclass(frozen=True)
class TritonQuantizedKV(QuantizedKV[TritonPlan]):
    """K and V of a group of heads, quantised as the module `quantize` describes.

    `head0` is the group's first head among batch · heads_kv; `len_kv` is how many of the problem's keys there are here.
    """

    head0: int
    len_kv: int
    slots: int
    k8: torch.Tensor
    k_scale: torch.Tensor
    k_scale_max: torch.Tensor
    k_mean: torch.Tensor
    v16: torch.Tensor
    v_scale: torch.Tensor


def run(call: PreparedCall[TritonPlan]) -> Result:
    """Quantise and attend, one group of heads after the other, so that the workspace stays within its limit."""
    p = call.problem
    out, lse = call.result()
    heads, step = p.batch * p.heads_kv, call.plan.heads_per_group
    len_kv = reachable(p.len_q, p.len_kv, p.causal)
    live = _live(call.mask, p, len_kv)
    for head0 in range(0, heads, step):
        kv = _quantize_heads(call.k, call.v, p, call.plan, head0, min(step, heads - head0), len_kv, live)
        _attend_heads(call.q, kv, p, out, lse, call.mask)
        del kv  # before the next group's: its memory is used again
    return out, lse


def load(problem: Problem, plan: TritonPlan) -> None:
    """Nothing: they are compiled at their first launch."""


def quantize(k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: TritonPlan, mask: torch.Tensor | None) -> TritonQuantizedKV:
    """Quantise all heads of K and V, in one group, and all keys. Keys that the mask hides from every query take no part."""
    live = _live(mask, problem, problem.len_kv)
    return _quantize_heads(k, v, problem, plan, 0, problem.batch * problem.heads_kv, problem.len_kv, live)


def attend(q: torch.Tensor, kv: TritonQuantizedKV, problem: Problem, mask: torch.Tensor | None) -> Result:
    """Attend every head of `q` to K and V that were quantised in one group."""
    out, lse = result_like(q, problem)
    _attend_heads(q, kv, problem, out, lse, mask)
    return out, lse


def run_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, problem: Problem, plan: TritonPlan) -> Result:
    """As `run`, for packed sequences: q [total_q, Hq, D], k and v [total_k, Hkv, D], lse [Hq, total_q]."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32) if problem.return_lse else None
    heads = problem.batch * problem.heads_kv
    q, k, v, result = q[None], k[None], v[None], out[None]
    kv = _quantize_heads(k, v, problem, plan, 0, heads, problem.len_kv, None, packed)
    _attend_heads(q, kv, problem, result, lse, None, packed)
    return out, lse


def _live(mask: torch.Tensor | None, p: Problem, len_kv: int) -> torch.Tensor | None:
    """Which of the first `len_kv` keys a mask [B | 1, H | 1, Nq | 1, Nk | 1] leaves to any query: uint8 [B | 1, Hkv | 1, len_kv]."""
    if mask is None or p.empty:
        return None
    return live_keys(mask[..., :len_kv], p.heads_kv, p.len_q, len_kv, p.causal).view(torch.uint8)


def _quantize_heads(
    k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: TritonPlan, head0: int, heads: int, len_kv: int,
    live: torch.Tensor | None = None, packed: Packed | None = None,
) -> TritonQuantizedKV:  # fmt: skip
    """Quantise the first `len_kv` keys of `heads` heads of K and V from `head0` on (counted over batch · heads_kv)."""
    tile, d = plan.tile, plan.head_dim
    rows = problem.heads_kv if packed else heads
    slots = k.shape[1] + problem.batch * tile.block_n if packed else -(-len_kv // tile.block_n) * tile.block_n

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    kv = TritonQuantizedKV(
        problem, plan, head0, len_kv, slots, empty(rows, slots, d, dtype=torch.int8), empty(rows, slots), empty(heads), empty(heads, d),
        empty(rows, slots, d, dtype=torch.float16), empty(heads, d),
    )  # fmt: skip
    maxima = empty(heads, SPLITS, d)
    cu_seqlens = (packed.cu_seqlens_k, packed.cu_seqlens_q) if packed else (kv.k_scale_max, kv.k_scale_max)
    kv_strides = (*strides(k, problem.layout), *strides(v, problem.layout))
    per_program = min(ROWS, tile.block_n)
    shape = {
        "HEAD_DIM": problem.head_dim, "D": d, "BLOCK_N": tile.block_n, "SPLITS": SPLITS, "VARLEN": packed is not None,
        "CAUSAL": packed is not None and problem.causal, "SOME_LIVE": live is not None,
    }  # fmt: skip
    live_strides = (0, 0) if live is None else tuple(0 if n == 1 else s for n, s in zip(live.shape[:2], live.stride()))
    live = kv.k_scale_max if live is None else live
    with _launching(k, problem, plan):
        statistics[((SPLITS + 1) * heads,)](
            k, v, live, kv.k_mean, maxima, kv.k_scale_max, *cu_seqlens, *kv_strides, *live_strides, head0, problem.heads_kv, len_kv, slots,
            BLOCK=STATISTICS_BLOCK, **shape,
        )  # fmt: skip
        quantize_kv[(2 * -(-len_kv // tile.block_n) * (tile.block_n // per_program) * heads,)](
            k, v, live, kv.k_mean, maxima, kv.k8, kv.k_scale, kv.k_scale_max, kv.v16, kv.v_scale, *cu_seqlens, *kv_strides, *live_strides,
            head0, problem.heads_kv, len_kv, slots, V_MAX=plan.scheme.v_max, ROWS=per_program, **shape,
        )  # fmt: skip
    return kv


def _attend_heads(
    q: torch.Tensor,
    kv: TritonQuantizedKV,
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    mask: torch.Tensor | None,
    packed: Packed | None = None,
) -> None:
    """Attend the query heads that belong to a quantised group; writes their part of `out` and `lse`."""
    plan, tile = kv.plan, kv.plan.tile
    heads = kv.k_scale_max.shape[0] * (problem.heads_q // problem.heads_kv)
    unused = kv.k_scale_max
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    if mask is not None:
        mask = mask.expand(problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
        mask = mask.view(torch.uint8) if kind == 1 else mask
    with _launching(q, problem, plan):
        _attend_kernel[(-(-problem.len_q // tile.block_m) * heads,)](
            q, out, unused if lse is None else lse, unused if mask is None else mask,
            kv.k8, kv.k_scale, kv.k_scale_max, kv.k_mean, kv.v16, kv.v_scale,
            packed.cu_seqlens_q if packed else unused, packed.cu_seqlens_k if packed else unused,
            *strides(q, problem.layout), *strides(out, problem.layout), *((0, 0, 0, 0) if mask is None else mask.stride()),
            kv.head0, problem.heads_q, problem.heads_kv, problem.len_q, kv.len_kv, kv.slots, q.shape[1],
            min(abs(problem.sm_scale) * hadamard.gain(plan.head_dim), FINITE_MAX), math.copysign(1.0, problem.sm_scale),
            torch.finfo(out.dtype).max,
            LOG2_P_MAX=math.log2(plan.scheme.p_max), HEAD_DIM=problem.head_dim, D=plan.head_dim,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MASK=kind, CAUSAL=problem.causal, LSE=lse is not None,
            VARLEN=packed is not None, INT8_DOT=plan.arch != 75, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _form(t: torch.Tensor, p: Problem) -> tuple:
    """What a call's kernels are compiled for: another form may build where one does not."""
    return t.device.type, p.device_index, p.head_dim, p.dtype, p.mask, p.causal, p.return_lse, p.varlen


@contextlib.contextmanager
def _launching(t: torch.Tensor, problem: Problem, plan: TritonPlan) -> Iterator[None]:
    """Around launches: on the tensor's device, and with a failure to build a kernel told from a failure to run it.

    Triton compiles at the first launch, with a C compiler, ptxas and a driver that a user's machine may lack or that may be too
    old. What could not be built once is not tried again: each try takes seconds.
    """
    key = _form(t, problem)
    if key in _broken:
        raise KernelMissing(plan.variant.name, _broken[key])
    try:
        with torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext():
            yield
    except InterpreterError:
        raise
    except (TritonError, CompilationError, OSError, ImportError, subprocess.CalledProcessError, RuntimeError) as error:
        refused = "[CUDA]" in str(error) or "CUDA error" in str(error)  # how Triton and torch say that the driver refused a call
        if refused and not any(reason in str(error) for reason in LOADING):
            raise CudaError(f"{plan.variant.name}: {error}") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        _broken[key] = f"Triton can't build it here ({type(error).__name__}: {first}); on Linux it needs a C compiler, such as gcc"
        raise KernelMissing(plan.variant.name, _broken[key]) from error
