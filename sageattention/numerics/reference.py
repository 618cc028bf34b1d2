"""What attention is (`oracle`, fp64) and what a variant's rounding makes of it (`emulate`), in plain PyTorch.

Both take [B, H, N, D] tensors on any device. The emulation follows its `Scheme` step by step: the rotation, the k_mean, the
INT8 rounding of Q and K with their scales, the online softmax over KV tiles, the types of P and V and of the
accumulator, and the interval at which it is promoted. The kernels are tested against it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import hadamard
from .constants import (
    AMAX_MIN,
    E4M3_MAX,
    FINITE_MAX,
    INT8_MAX,
    K_SCALE_SHIFT,
    LINE_EXCESS,
    LN2,
    LOG2E,
    MASK_LIMIT,
    QK_MAX,
    SCORE_LIMIT,
    TAIL_BOOST_LOG2,
    TAIL_THRESHOLD,
    k_mean_stride,
    pad_head_dim,
)
from .live_keys import live_keys, reachable
from .scheme import Scheme

LAZY_ROWS = 128  # queries of a block of the kernels with `lazy`
# An FP8 MMA cuts each product off below the accumulator's leading bits. Cutting the sum off after every second key, at this many
# significand bits, gives the shrinkage that was measured on Hopper: 1.1e-5 a key of a coherent sum (.98, .815, .70 at 2k, 16k, 32k).
FP8_ACCUMULATOR_BITS = 14
FP8_ACCUMULATOR_KEYS = 2


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp64, one (batch, head) at a time.

    Args:
        q: [B, Hq, Nq, D]; k, v: [B, Hkv, Nk, D], Hq a multiple of Hkv.
        attn_mask: bool (True keeps) or additive, broadcastable to [B, Hq, Nq, Nk].

    Returns:
        (out [B, Hq, Nq, D], lse [B, Hq, Nq] in natural log), both fp64. A fully masked row gives 0 and −inf.
    """
    batch, heads, len_q, head_dim = q.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    group = heads // k.shape[1] if heads else 1
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h].double() @ k[b, h // group].double().T * scale
            scores = _apply_mask(scores, _mask_of(attn_mask, b, h), is_causal, factor=1.0, limit=math.inf)
            lse[b, h] = torch.logsumexp(scores, -1)
            # not exp(scores − lse): beside a row of −3e38, even fp64 loses the logarithm of the number of keys
            weights = torch.softmax(scores, -1).masked_fill(lse[b, h, :, None] == -math.inf, 0.0)
            out[b, h] = weights @ v[b, h // group].double()
    return out, lse


def emulate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scheme: Scheme,
    *,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as a variant with this `Scheme` computes it.

    Returns:
        (out [B, Hq, Nq, D] in q's dtype, lse [B, Hq, Nq] fp32 in natural log).
    """
    batch, heads, len_q, head_dim = q.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    group = heads // k.shape[1] if heads else 1
    len_kv = reachable(len_q, k.shape[2], is_causal)
    k, v, live = k[:, :, :len_kv], v[:, :, :len_kv], None
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))[..., :len_kv]
        live = live_keys(attn_mask, k.shape[1], len_q, len_kv, is_causal)
    for b in range(batch):
        for h in range(heads):
            if h % group == 0:
                own = None if live is None else _of(live, b, h // group)
                own = None if own is None or own.all() else own
                keys, values = quantize_k(k[b, h // group], scheme, own), quantize_v(v[b, h // group], scheme, own)
            o, lse[b, h] = _attend_head(q[b, h], keys, values, scheme, _mask_of(attn_mask, b, h), is_causal, scale)
            limit = torch.finfo(q.dtype).max
            out[b, h] = o[:, :head_dim].clamp(-limit, limit).to(q.dtype)
    return out, lse


def rotate(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[N, d] of any dtype to fp32 [N, D]: zero-padded to a compiled head dimension and multiplied by the scheme's rotation."""
    head_dim = pad_head_dim(x.shape[-1])
    x = torch.nn.functional.pad(x.float(), (0, head_dim - x.shape[-1]))
    if scheme.rotate:
        return x @ hadamard.matrix(head_dim).to(x.device)
    return x * (0.5 * head_dim**-0.5)  # the rotation's gain, so that the score scale is one formula


def _k_mean_sample(k: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """The tokens whose mean K is shifted by: every stride-th, or, where some keys are not live, from each stride the first live one in
    the 32 keys that it begins in; at least one, if any key is live."""
    if live is None:
        return k[:: k_mean_stride(k.shape[0])]
    step = k_mean_stride(len(live))
    starts = range(0, len(live), step)
    found = [live[i : min(i + step, i // 32 * 32 + 32)].nonzero()[:1, 0] + i for i in starts]
    index = torch.cat(found)
    return k[index if len(index) else live.nonzero()[:1, 0]]


def quantize_k(k: torch.Tensor, scheme: Scheme, live: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K of one head, [N, d], to (k8 [N, D] as integers in fp32, scale [N, 1] times `K_SCALE_SHIFT`, rotated k_mean [D]).

    live: [N] bool, the keys that count; others become 0.
    """
    if live is not None:
        live = live.to(k.device)
        k = torch.where(live[:, None], k, 0)
    rotated = rotate(k, scheme)
    sample = _k_mean_sample(k, live).float()
    k_mean = rotate((sample / max(sample.shape[0], 1)).sum(0, keepdim=True), scheme)
    shifted = rotated - k_mean
    if live is not None:
        shifted = torch.where(live[:, None], shifted, 0)
    amax = shifted.abs().amax(-1, keepdim=True)
    if scheme.k_scale != "token":
        amax = _share(amax, scheme)
    k8, scale = QUANTIZE_QK[scheme.qk](shifted, amax)
    return k8, scale * K_SCALE_SHIFT, k_mean[0]


def quantize_v(v: torch.Tensor, scheme: Scheme, live: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V of one head, [N, d], to (values [N, D] rounded to the scheme's type, in fp32; scale [D]; mean [D]).

    live: [N] bool, the keys that count; others become 0.
    """
    head_dim = pad_head_dim(v.shape[-1])
    if live is not None:
        live = live.to(v.device)
        values = torch.zeros(v.shape[0], head_dim, dtype=torch.float32, device=v.device)
        if not live.any():
            return values, values.new_zeros(head_dim), values.new_zeros(head_dim)
        values[live], scale, mean = quantize_v(v[live], scheme)
        return values, scale, mean
    x = torch.nn.functional.pad(v.float(), (0, head_dim - v.shape[-1]))
    mean = x.new_zeros(head_dim)
    if scheme.v_mean:
        low, high = x.amin(0), x.amax(0)
        mean = (x / x.shape[0]).sum(0).clamp(low, high)  # however it was rounded
        centred = (0.5 * high - 0.5 * low) <= FINITE_MAX  # else V − mean could overflow
        mean = mean.where(centred, 0.0)
    x = x - mean
    amax = x.abs().amax(0)
    x = x * torch.where(amax > AMAX_MIN, scheme.v_max / amax.clamp_min(AMAX_MIN), 0.0)
    scale = amax / scheme.v_max
    if scheme.pv == "fp16":
        x = x.half().float()
    else:
        x = _e4m3(x) if scheme.pv == "fp8" else x.round()
    if scheme.v_mean and scheme.v_rounded:
        mean = mean - torch.where(centred, scale * (x / x.shape[0]).sum(0), 0.0)
    return x, scale, mean


def _share(amax: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The largest amax among the keys that share a scale; a last, partial group is filled up with zeros."""
    fragment = scheme.k_scale == "fragment"
    tokens, keys = amax.shape[0], scheme.fragment_keys if fragment else scheme.kv_tile
    padded = torch.nn.functional.pad(amax[:, 0], (0, -tokens % keys)).view(-1, keys // 8, 4, 2)
    dims = (1, 3) if fragment else (1, 2, 3)
    return padded.amax(dims, keepdim=True).expand_as(padded).reshape(-1)[:tokens, None]


def _int8(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = torch.where(amax > AMAX_MIN, INT8_MAX / amax.clamp_min(AMAX_MIN), 0.0)
    return (x * inverse).round(), amax * (1 / INT8_MAX)


QUANTIZE_QK = {"int8": _int8}  # by the type of Q and K: (x, amax) → (x in units of its scale, rounded; the scale)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _linear(score: torch.Tensor, maximum: torch.Tensor, p_max: float) -> torch.Tensor:
    """P in e4m3, its logarithm's fraction as mantissa: a straight line for each octave. Below 2^-6 the line goes on to 0 at 2^-7."""
    code = ((score - maximum) * 8 + 8 * (math.log2(p_max) + 7 - LINE_EXCESS)).round().clamp(0, 126)
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()


class _Step(NamedTuple):
    """The keys [start, stop) of one step of the softmax. begins: the accumulator is empty before it; lines: half of P is on lines."""

    start: int
    stop: int
    begins: bool
    lines: bool


def _steps(tokens: int, head_dim: int, scheme: Scheme) -> list[_Step]:
    """All keys, tile by tile."""
    steps, held = [], scheme.promote
    for start in range(0, tokens, scheme.kv_tile):
        stop = min(start + scheme.kv_tile, tokens)
        begins = held >= scheme.promote
        held = stop - start + (0 if begins else held)
        steps.append(_Step(start, stop, begins, False))
    return steps


def _step_size(head_dim: int, scheme: Scheme) -> int:
    """Keys of a step of a lazy scheme."""
    return max(scheme.lazy // head_dim, 1)


def _lazy_steps(rows: range, tokens: int, head_dim: int, scheme: Scheme, mask: torch.Tensor | None, is_causal: bool) -> list[_Step]:
    """The steps of one block of queries, in the kernel's order: tiles with masked keys first, each step with an accumulator of its own;
    then full ones, unless there is a single one, `promote` keys to an accumulator. Without a dense mask the last tile comes first. Keys
    that are there for no query, being masked for all or beyond the end, make no tile masked: they have no part in K and V."""
    size, tiles = _step_size(head_dim, scheme), [(i, min(i + scheme.kv_tile, tokens)) for i in range(0, tokens, scheme.kv_tile)]
    if is_causal:
        tiles = [t for t in tiles if t[0] <= rows[-1]]
    mixed: list[tuple[int, int]] = []
    full: list[tuple[int, int]] = []
    for start, stop in tiles:
        uneven = is_causal and (stop - start < scheme.kv_tile or stop - 1 > rows[0])
        if mask is not None:
            part = mask[rows[0] : rows[-1] + 1, start:stop] if mask.shape[0] > 1 else mask[:, start:stop] if mask.shape[1] > 1 else mask
            kept = part if part.dtype == torch.bool else part != -math.inf
            if is_causal:
                reached = torch.arange(start, stop, device=part.device) <= torch.arange(rows[0], rows[-1] + 1, device=part.device)[:, None]
                kept = kept & reached
            if not kept.any():
                continue
            if mask.shape[0] > 1 or is_causal:
                uneven = uneven or stop - start < scheme.kv_tile or not bool(kept.all())
            uneven = uneven or (part.dtype != torch.bool and bool((part.masked_fill(~kept, 0) != 0).any()))
        (mixed if uneven else full).append((start, stop))
    if mask is None:
        mixed, full = mixed[::-1], full[::-1]
    if len(full) == 1:
        mixed, full = mixed + full, []
    per_group = scheme.promote // scheme.kv_tile
    steps = [_Step(i, min(i + size, stop), True, False) for start, stop in mixed for i in range(start, stop, size)]
    for number, (start, stop) in enumerate(full):
        steps += [_Step(i, min(i + size, stop), i == start and number % per_group == 0, scheme.linear) for i in range(start, stop, size)]
    return steps


def _mask_of(mask: torch.Tensor | None, b: int, h: int) -> torch.Tensor | None:
    """The [Nq or 1, Nk or 1] slice of a broadcastable mask that belongs to batch b, head h."""
    if mask is None:
        return None
    return _of(mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)), b, h)


def _of(t: torch.Tensor, b: int, h: int) -> torch.Tensor:
    """The part of a tensor that broadcasts over batches and heads."""
    return t[b if t.shape[0] > 1 else 0, h if t.shape[1] > 1 else 0]


def _apply_mask(scores: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, factor: float, limit: float) -> torch.Tensor:
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        bias = mask.to(scores.dtype)
        finite = (bias * factor).clamp(-limit, limit)
        scores = scores + torch.where(bias == -math.inf, bias, finite)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    return scores


def _attend_head(
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scheme: Scheme,
    mask: torch.Tensor | None,
    is_causal: bool,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, head_dim = keys[0].shape
    if not scheme.lazy:
        return _attend_rows(q, range(len(q)), keys, values, scheme, mask, is_causal, sm_scale, _steps(tokens, head_dim, scheme))
    parts = []
    for start in range(0, len(q), LAZY_ROWS):
        rows = range(start, min(start + LAZY_ROWS, len(q)))
        steps = _lazy_steps(rows, tokens, head_dim, scheme, mask, is_causal)
        own = mask if mask is None or mask.shape[0] == 1 else mask[start : rows.stop]
        parts.append(_attend_rows(q[start : rows.stop], rows, keys, values, scheme, own, is_causal, sm_scale, steps))
    out, lse = zip(*parts)
    return torch.cat(out), torch.cat(lse)


def _attend_rows(
    q: torch.Tensor,
    numbers: range,
    keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scheme: Scheme,
    mask: torch.Tensor | None,
    is_causal: bool,
    sm_scale: float,
    steps: list[_Step],
) -> tuple[torch.Tensor, torch.Tensor]:
    k8, k_scale, k_mean = keys
    v, v_scale, v_mean = values
    tokens, head_dim = k8.shape
    size = _step_size(head_dim, scheme)
    factor = min(abs(sm_scale) * hadamard.gain(head_dim), FINITE_MAX)  # finite, so that 0 · factor is 0
    rotated = rotate(q, scheme) * math.copysign(1.0, sm_scale)
    q8, unit = QUANTIZE_QK[scheme.qk](rotated, rotated.abs().amax(-1, keepdim=True))
    largest = k_scale.amax().clamp_min(AMAX_MIN)
    q_scale = torch.minimum(unit * factor * (LOG2E / K_SCALE_SHIFT), SCORE_LIMIT / (QK_MAX[scheme.qk] ** 2 * head_dim) / largest)

    # `out` and the sums l are relative to the maximum m; P, the accumulator `acc` and its sums `acc_l` to `near`.
    m = near = torch.full_like(q_scale, -math.inf)
    l = torch.zeros_like(q_scale)
    out = torch.zeros(q.shape[0], head_dim, dtype=torch.float32, device=q.device)
    acc, acc_l = torch.zeros_like(out), torch.zeros_like(l)
    rows = torch.arange(numbers.start, numbers.stop, device=q.device)[:, None]
    for start, stop, begins, lines in steps:
        s = (q8 @ k8[start:stop].T) * k_scale[start:stop].T * q_scale
        s = _apply_mask(s, None if mask is None else mask[:, start:stop] if mask.shape[1] > 1 else mask, False, LOG2E, MASK_LIMIT)
        if is_causal:
            s = s.masked_fill(rows < torch.arange(start, stop, device=q.device), -math.inf)
        top = s.amax(-1, keepdim=True)
        if lines and (stop - start < size or mask is not None):  # absent keys have a score of 0
            top = torch.where((s == -math.inf).any(-1, keepdim=True) | (stop - start < size), top.clamp_min(0), top)
        if scheme.lazy:
            base = torch.maximum(m, near)
            raised = (top - math.log2(scheme.p_max)).ceil() + math.log2(scheme.p_max)  # P = 2^(score − a whole number)
            new = torch.where(top > base + scheme.rescale_threshold, raised, base) if begins else m
            moved = torch.where(top > near + scheme.rescale_threshold, torch.where(top > m + scheme.rescale_threshold, raised, m), near)
            far = (top < new - math.log2(scheme.p_max) - TAIL_THRESHOLD) & lines
            to = torch.where(far, new - TAIL_BOOST_LOG2, new) if begins else moved
        else:
            new = torch.maximum(m, top)
            to = top if scheme.p_tile_max else new
        alpha = torch.exp2(m - _finite(new))
        l, out = l * alpha, out * alpha
        if begins:
            worth = torch.exp2(near - _finite(new))
            out, l = out + acc * worth, l + acc_l * worth
        exact = torch.exp2(s - _finite(to)) * scheme.p_max
        p = _round_p(exact, scheme)
        if lines:
            on_line = torch.arange(start, stop, device=q.device) % 16 < 8
            p = torch.where(on_line, _linear(s, _finite(to), scheme.p_max), p)
        shrink = torch.zeros_like(near) if begins else torch.exp2(near - _finite(to))
        acc_l = acc_l * shrink + (exact if scheme.exact_sum else p).sum(-1, keepdim=True)
        acc = _accumulate(acc, shrink, p, v[start:stop], scheme)
        m, near = new, to
    new = torch.maximum(m, near) if scheme.lazy else m
    alpha = torch.exp2(m - _finite(new))
    worth = torch.exp2(near - _finite(new))
    m, l, out = new, l * alpha + acc_l * worth, out * alpha + acc * worth
    out = torch.where(l == 0, 0.0, out / l.clamp_min(1e-30) * v_scale + v_mean)  # not l > 0: a NaN stays one, as in every attention
    shift = _k_mean_score(rotated, unit, k_mean, factor)
    lse = torch.where(l == 0, -math.inf, LN2 * (m + torch.log2(l.clamp_min(1e-30) / scheme.p_max)) + shift)
    return out, lse[:, 0]


def _k_mean_score(rotated: torch.Tensor, unit: torch.Tensor, k_mean: torch.Tensor, factor: float) -> torch.Tensor:
    """sm_scale · (q · k_mean), [Nq, 1], by which the shift of K moved every score. Operands are normalised before the product."""
    largest = k_mean.abs().amax().clamp_min(AMAX_MIN)
    normal = torch.where(unit > AMAX_MIN, rotated / unit.clamp_min(AMAX_MIN), 0.0) @ (k_mean / largest)[:, None]
    score = (normal * (unit * factor).clamp_max(FINITE_MAX)).clamp(-FINITE_MAX, FINITE_MAX)
    return (score * largest).clamp(-FINITE_MAX, FINITE_MAX)


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """A row maximum to subtract: 0 where the row is masked so far, so that −inf − (−inf) never happens."""
    return torch.where(maximum == -math.inf, 0.0, maximum)


def _round_p(p: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.pv == "fp16":
        return p.half().float()
    return _e4m3(p) if scheme.pv == "fp8" else p.round()


def _accumulate(acc: torch.Tensor, alpha: torch.Tensor, p: torch.Tensor, v: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """acc · alpha + p @ v in the accumulator's type, one MMA depth at a time where that type rounds."""
    if scheme.accumulate in ("fp32", "int32"):
        return acc * alpha + p @ v
    if scheme.accumulate == "fp8":
        step, narrow = FP8_ACCUMULATOR_KEYS, _narrow_fp8
    else:
        step, narrow = 32 if scheme.pv == "fp8" else 16, _narrow_fp16
    acc = narrow(acc * alpha)
    for start in range(0, v.shape[0], step):
        acc = narrow(acc + p[:, start : start + step] @ v[start : start + step])
    return acc


def _narrow_fp16(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def _narrow_fp8(x: torch.Tensor) -> torch.Tensor:
    """Cut off, not rounded, after `FP8_ACCUMULATOR_BITS` significand bits: what makes coherent sums shrink."""
    keep = 24 - FP8_ACCUMULATOR_BITS
    return (x.contiguous().view(torch.int32) >> keep << keep).view(torch.float32)
