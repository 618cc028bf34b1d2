"""Host side of the CUDA variants: workspace, groups of heads, launches.

What depends on the problem alone is a `Recipe`, what strides and alignment add to it makes a `Form`; both are worked out once. A call
allocates the output and one workspace, fills addresses into its form's parameter structs, and hands all its launches to the driver
at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...kernels.params import AttendParams, KeysParams, ValuesParams, packer
from ...planning.plan import Plan
from ...planning.problem import Problem
from ..call import Result, result_like
from . import driver
from .launcher import Launch
from .workspace import Recipe, recipe_of

_DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
_MASK_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
(_pack_keys, _keys_constants), (_pack_values, _values_constants), (_pack_attend, _attend_constants) = (
    packer(p) for p in (KeysParams, ValuesParams, AttendParams)
)


@dataclass(frozen=True)
class QuantizedKV:
    """K and V of all heads, in the layout of the plan's kernels. Owns no float tensor of the caller's.

    `problem` is the call that K and V were checked as.
    """

    problem: Problem
    plan: Plan
    buffer: torch.Tensor


def run(call) -> Result:
    """Quantise and attend."""
    q, k, v, mask, p, plan, forms = call
    out, lse = result_like(q, p)
    q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    mask_at = 0 if mask is None else mask.data_ptr()
    unaligned = (q_at | out_at) % 16, (k_at | v_at) % 16
    form = forms.get(unaligned)
    if form is None:
        recipe = recipe_of(p, plan)
        form = forms[unaligned] = _Form(
            recipe, _quantising(recipe, k, v, unaligned[1]), _attending(recipe, q, out, mask, unaligned[0]),
            recipe.workspace.size * min(2, len(recipe.groups)),
        )  # fmt: skip
    ring = torch.empty(form.size, dtype=torch.uint8, device=q.device)
    base, lse_at = ring.data_ptr(), 0 if lse is None else lse.data_ptr()
    recipe, size = form.recipe, form.recipe.workspace.size
    chains = [
        (*_quantise_launches(recipe, quantising, base + number % 2 * size, k_at, v_at),
         _attend_launch(recipe, attending, base + number % 2 * size, q_at, mask_at, out_at, lse_at))
        for number, (quantising, attending) in enumerate(zip(form.quantising, form.attending))
    ]  # fmt: skip
    _issue(recipe.device, chains)
    return out, lse


def quantize(k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: Plan) -> QuantizedKV:
    """Quantise K and V, all heads in one group."""
    if problem.empty:
        return QuantizedKV(problem, plan, torch.empty(0, dtype=torch.uint8, device=k.device))
    recipe = recipe_of(problem, plan, True)
    buffer = torch.empty(recipe.workspace.size, dtype=torch.uint8, device=k.device)
    k_at, v_at = k.data_ptr(), v.data_ptr()
    (quantising,) = _quantising(recipe, k, v, (k_at | v_at) % 16)
    _issue(recipe.device, [_quantise_launches(recipe, quantising, buffer.data_ptr(), k_at, v_at)])
    return QuantizedKV(problem, plan, buffer)


def attend_all(q: torch.Tensor, kv: QuantizedKV, problem: Problem, mask: torch.Tensor | None) -> Result:
    """Attend every head of `q` to K and V that were quantised before."""
    out, lse = result_like(q, problem)
    recipe = recipe_of(problem, kv.plan, True)
    q_at, out_at, lse_at = q.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr()
    (attending,) = _attending(recipe, q, out, mask, (q_at | out_at) % 16)
    launch = _attend_launch(recipe, attending, kv.buffer.data_ptr(), q_at, 0 if mask is None else mask.data_ptr(), out_at, lse_at)
    _issue(recipe.device, [((*launch[:5], False),)])  # anything may be ahead of it on the stream
    return out, lse


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _quantise_launches(r: Recipe, group: _Quantising, base: int, k: int, v: int) -> tuple[Launch, Launch]:
    """The first two launches of a group whose workspace starts at `base`."""
    w, (k_strides, v_strides, keys_tail) = r.workspace, group.keys
    kv, k_scale_parts, v_parts, done = base + w.kv, base + w.k_scale_parts, base + w.v_parts, base + w.v_parts_done
    keys = _pack_keys(
        k, k_strides, v, v_strides, kv, base + w.anchor, k_scale_parts, v_parts, done, base + w.v_codes, base + w.partials_done, keys_tail
    )  # fmt: skip
    values = _pack_values(
        v, v_strides, k_scale_parts, v_parts, done, kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean, base + w.v_codes,
        group.values,
    )  # fmt: skip
    return (r.keys, group.key_blocks, 1, 1, keys, False), (r.values, group.value_blocks, 1, 1, values, True)


def _attend_launch(r: Recipe, group: _Attending, base: int, q: int, mask: int, out: int, lse: int) -> Launch:
    w, (q_strides, mask_strides, out_strides, tail) = r.workspace, group.constants
    params = _pack_attend(
        q, q_strides, base + w.kv, base + w.k_scale_max, base + w.v_amax, base + w.v_mean, base + w.v_codes, base + w.anchor,
        base + w.partials if r.dones else 0, base + w.partials_done,
        mask, mask_strides, out, out_strides, lse, tail,
    )  # fmt: skip
    return r.attend, group.blocks, 1, 1, params, True


def _issue(device: int, chains: list) -> None:
    """Run the groups' launches. Several groups alternate between the caller's stream and a second one, so that a group is quantised,
    and its first blocks start, while the last blocks of the one before still run."""
    stream = torch._C._cuda_getCurrentRawStream(device)
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


class _Quantising(NamedTuple):
    """A group's quantising launches but for their addresses."""

    key_blocks: int  # those for V's statistics among them
    keys: tuple[bytes, ...]  # K's strides, V's strides, the struct's tail
    value_blocks: int
    values: bytes  # the tail; the strides are those of `keys`


class _Attending(NamedTuple):
    """A group's attention launch but for its addresses."""

    blocks: int
    constants: tuple[bytes, ...]  # q's strides, the mask's, the output's, the struct's tail


class _Form(NamedTuple):
    """Calls that differ in nothing but addresses."""

    recipe: Recipe
    quantising: tuple[_Quantising, ...]  # one for each group of heads
    attending: tuple[_Attending, ...]
    size: int  # bytes of workspace


def _quantising(r: Recipe, k: torch.Tensor, v: torch.Tensor, unaligned: int) -> tuple[_Quantising, ...]:
    p, strides = r.problem, (_strides(k, r.problem), _strides(v, r.problem))
    vectors = _vectors(p, unaligned, *strides)
    groups = []
    for first, pairs in r.groups:
        shape = first, pairs, p.heads_kv, p.len_kv, p.head_dim, _DTYPES[p.dtype], vectors
        keys = _keys_constants(*strides[0], *strides[1], *shape, *r.keys_tail)
        values = _values_constants(*strides[1], *shape, *r.values_tail)
        groups.append(_Quantising(pairs * (r.key_runs + r.splits), keys, pairs * r.value_runs, values[-1]))
    return tuple(groups)


def _attending(r: Recipe, q: torch.Tensor, out: torch.Tensor, mask: torch.Tensor | None, unaligned: int) -> tuple[_Attending, ...]:
    p = r.problem
    q_strides, out_strides, mask_strides = _strides(q, p), _strides(out, p), (0, 0, 0, 0)
    kind, ratio = 0, p.heads_q // p.heads_kv
    if mask is not None:  # 0 where it broadcasts
        mask_strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        kind = _MASK_KINDS[mask.dtype]
    vectors = _vectors(p, unaligned, q_strides), _vectors(p, unaligned, out_strides)

    def group(first: int, pairs: int) -> _Attending:
        items = r.blocks_q * pairs * ratio
        blocks = min(items, r.grid_limit)
        rounds = items // blocks - 1 if r.dones else -(-items // blocks)
        return _Attending(
            blocks,
            _attend_constants(
                *q_strides, *mask_strides, *out_strides, first, pairs, p.heads_kv, ratio, p.len_q, p.len_kv, p.head_dim,
                _DTYPES[p.dtype], *vectors, p.causal, kind, r.tiles, r.blocks_q, rounds,
                *((2**32 - 1) // d for d in (r.blocks_q, ratio, p.heads_kv)), *r.attend_tail,
            ),
        )  # fmt: skip

    return tuple(group(*g) for g in r.groups)


def _strides(t: torch.Tensor, p: Problem) -> tuple[int, int, int]:
    """(batch, head, token)"""
    b, x, y, _ = t.stride()
    return (b, y, x) if p.layout == "NHD" else (b, x, y)


def _vectors(p: Problem, unaligned: int, *strides: tuple[int, int, int]) -> int:
    """1 where rows can be moved in pieces of 16 bytes."""
    per_piece = 16 // (4 if p.dtype == "float32" else 2)
    return int(not unaligned and p.head_dim % 8 == 0 and not any(s % per_piece for three in strides for s in three))
