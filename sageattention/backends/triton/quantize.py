"""Quantising K and V in two launches.

`statistics` reads V and a strided sample of K; `quantize_kv` reads both and writes K as INT8 (rotated, shifted by the k_mean, one
scale per token) and V as fp16 (one scale per channel). Workspace, with H = heads in the group, T = padded tokens per head:
  k8 [H, T, D] int8, k_scale [H, T] fp32 (times K_SCALE_SHIFT), k_scale_max [H] fp32, k_mean [H, D] fp32 (rotated),
  v16 [H, T, D] fp16, v_scale [H, D] fp32; partial_amax [H, SPLITS, D] fp32
Packed sequences (VARLEN) lie one after another in T, each rounded up by one tile, so that no tile holds two of them; then the
statistics are per (sequence, head).
CAUSAL (packed sequences; of others `tokens` are those that count): no sequence has more keys than queries.
SOME_LIVE: a key whose byte of `live` is 0 takes no part in any statistic and is written as zeros.
"""

import triton
import triton.language as tl

from ...numerics import constants
from .blocks import AMAX_MIN, K_SCALE_SHIFT, rotate, round_rows

WORD = tl.constexpr(32)  # a key of K's sample that is not live is replaced by one of the same 32
SPLITS = 16  # programs per head that share V in `statistics`; one more has the sample of K
ROWS = 64  # tokens per program in `quantize_kv`, at most: a program's are all of one tile
K_MEAN_TOKENS = tl.constexpr(constants.K_MEAN_TOKENS)


@triton.jit
def _locate(
    group, head0, heads, cu_seqlens, cu_seqlens_q, tokens, slots, BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """For one program: (batch, kv head, first token in the input, number of tokens, first slot in the workspace)."""
    index = (head0 + group).to(tl.int64)
    batch, head = index // heads, index % heads
    if VARLEN:
        first = tl.load(cu_seqlens + batch).to(tl.int64)
        count = (tl.load(cu_seqlens + batch + 1) - first).to(tl.int32)
        if CAUSAL:  # nobody sees a key beyond the sequence's last query
            count = tl.minimum(count, (tl.load(cu_seqlens_q + batch + 1) - tl.load(cu_seqlens_q + batch)).to(tl.int32))
        slot = head * slots + first + batch * BLOCK_N
        return batch * 0, head, first, count, slot
    else:
        return batch, head, batch * 0, tokens, group.to(tl.int64) * slots


@triton.jit
def _first_live(live, first, count, stride, tokens, BLOCK: tl.constexpr):
    """Of samples of `stride` keys, from number `first` on, each one's first live key in the 32 that it begins in, or `tokens`."""
    start = (first + tl.arange(0, BLOCK)) * stride
    key = start[:, None] + tl.arange(0, WORD)[None, :]
    end = tl.minimum(tl.minimum(start + stride, start // WORD * WORD + WORD), count)
    alive = tl.load(live + key, mask=key < end[:, None], other=0)
    return tl.min(tl.where(alive != 0, key, tokens), 1)


@triton.jit
def statistics(
    k,  # [B, Nk, Hkv, HEAD_DIM] by strides
    v,  # the same
    live,  # [B, Hkv, Nk] uint8 by strides, SOME_LIVE only
    k_mean,  # [H, D] fp32
    partial_amax,  # [H, SPLITS, D] fp32
    k_scale_max,  # [H] fp32, set to 0 here for `quantize_kv` to raise
    cu_seqlens, cu_seqlens_q,  # [B + 1] of keys and of queries, VARLEN only
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    live_stride_b, live_stride_h,
    head0, heads, tokens, slots,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, VARLEN: tl.constexpr,
    CAUSAL: tl.constexpr, SOME_LIVE: tl.constexpr,
):  # fmt: skip
    split, group = tl.program_id(0) % (SPLITS + 1), tl.program_id(0) // (SPLITS + 1)
    batch, head, first, count, _ = _locate(group, head0, heads, cu_seqlens, cu_seqlens_q, tokens, slots, BLOCK_N, VARLEN, CAUSAL)
    rows, channels = tl.arange(0, BLOCK), tl.arange(0, D)
    inside = channels < HEAD_DIM
    live += batch * live_stride_b + head * live_stride_h
    at = group.to(tl.int64) * D + channels
    if split == SPLITS:
        k += batch * k_stride_b + head * k_stride_h
        stride = tl.maximum(tl.cdiv(count, K_MEAN_TOKENS), 1)
        samples = tl.cdiv(count, stride)
        counted, any_live = samples, samples * 0 + tokens
        if SOME_LIVE:
            counted = samples * 0
            for start in range(0, samples, BLOCK):
                counted += tl.sum((_first_live(live, start, count, stride, tokens, BLOCK) < tokens).to(tl.int32), 0)
            if counted == 0:  # then any live key will do, the first
                for start in range(0, count, BLOCK):
                    alive = tl.load(live + start + rows, mask=start + rows < count, other=0)
                    any_live = tl.minimum(any_live, tl.min(tl.where(alive != 0, start + rows, tokens), 0))
        weight = 1.0 / tl.maximum(counted, 1).to(tl.float32)
        total = tl.zeros([BLOCK, D], tl.float32)  # reduced over the rows once, at the end: a reduction is slower than a step
        for start in range(0, samples, BLOCK):
            key, counts = (start + rows) * stride, start + rows < samples
            if SOME_LIVE:
                key = _first_live(live, start, count, stride, tokens, BLOCK)
                key = tl.where((counted == 0) & (start + rows == 0), any_live, key)
                counts = key < tokens
            ptrs = k + (first + key)[:, None] * k_stride_n + channels[None, :]
            x = tl.load(ptrs, mask=counts[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += x * weight
        mean = tl.sum(total, 0)
        # An MMA wants 16 rows: rotate 16 copies and take any, which a maximum of equal numbers is. Their sum could overflow.
        tl.store(k_mean + at, tl.max(rotate(tl.broadcast_to(mean[None, :], (16, D)), 16, D), 0))
        tl.store(k_scale_max + group, 0.0)
    else:
        v += batch * v_stride_b + head * v_stride_h
        share = tl.cdiv(count, SPLITS)
        end = tl.minimum((split + 1) * share, count)
        amax = tl.zeros([BLOCK, D], tl.float32)
        for start in range(split * share, end, BLOCK):
            token = start + rows
            counts = token < end
            if SOME_LIVE:
                counts = counts & (tl.load(live + token, mask=counts, other=0) != 0)
            ptrs = v + (first + token)[:, None] * v_stride_n + channels[None, :]
            x = tl.load(ptrs, mask=counts[:, None] & inside[None, :], other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(x))
        tl.store(partial_amax + (group.to(tl.int64) * SPLITS + split) * D + channels, tl.max(amax, 0))


@triton.jit
def quantize_kv(
    k,  # [B, Nk, Hkv, HEAD_DIM] by strides
    v,  # the same
    live,  # [B, Hkv, Nk] uint8 by strides, SOME_LIVE only
    k_mean,  # [H, D] fp32
    partial_amax,  # [H, SPLITS, D] fp32
    k8, k_scale, k_scale_max, v16, v_scale,  # see the module's text
    cu_seqlens, cu_seqlens_q,  # [B + 1] of keys and of queries, VARLEN only
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    live_stride_b, live_stride_h,
    head0, heads, tokens, slots,
    V_MAX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    VARLEN: tl.constexpr, CAUSAL: tl.constexpr, SOME_LIVE: tl.constexpr,
):  # fmt: skip
    blocks = 2 * tl.cdiv(tokens, BLOCK_N) * (BLOCK_N // ROWS)
    part, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    block = part // 2
    batch, head, first, count, slot = _locate(group, head0, heads, cu_seqlens, cu_seqlens_q, tokens, slots, BLOCK_N, VARLEN, CAUSAL)
    if block * ROWS >= tl.cdiv(count, BLOCK_N) * BLOCK_N:
        return
    channels = tl.arange(0, D)
    token = block * ROWS + tl.arange(0, ROWS)
    valid = token < count
    if SOME_LIVE:
        valid = valid & (tl.load(live + batch * live_stride_b + head * live_stride_h + token, mask=valid, other=0) != 0)
    inside = valid[:, None] & (channels < HEAD_DIM)[None, :]
    per_channel = group.to(tl.int64) * D + channels
    out = (slot + token)[:, None] * D + channels[None, :]

    if part % 2 == 0:
        ptrs = k + batch * k_stride_b + head * k_stride_h + (first + token)[:, None] * k_stride_n + channels[None, :]
        x = rotate(tl.load(ptrs, mask=inside, other=0.0), ROWS, D)
        x = tl.where(valid[:, None], x - tl.load(k_mean + per_channel)[None, :], 0.0)
        x8, scale = round_rows(x, tl.max(tl.abs(x), 1))
        scale *= K_SCALE_SHIFT
        tl.store(k8 + out, x8)
        tl.store(k_scale + slot + token, scale)
        tl.atomic_max(k_scale_max + group, tl.max(scale, 0))
    else:
        ptrs = v + batch * v_stride_b + head * v_stride_h + (first + token)[:, None] * v_stride_n + channels[None, :]
        y = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        partial = (group.to(tl.int64) * SPLITS + tl.arange(0, SPLITS))[:, None] * D + channels[None, :]
        amax = tl.max(tl.load(partial_amax + partial), 0)
        inverse = tl.where(amax > AMAX_MIN, V_MAX / tl.maximum(amax, AMAX_MIN), 0.0)
        tl.store(v16 + out, (y * inverse[None, :]).to(tl.float16))
        if block == 0:
            tl.store(v_scale + per_channel, amax * (1.0 / V_MAX))
