"""INT8 QKᵀ, FP16 PV attention in Triton: one kernel, one main loop.

Online softmax in base 2 (FlashAttention-2, arXiv:2307.08691). Q is rotated and quantised in the prologue, so it is read once.
"""

import triton
import triton.language as tl

from ...numerics import constants
from .blocks import AMAX_MIN, INT8_MAX, K_SCALE_SHIFT, LOG2E, k_mean_score, mask_scores, rotate, round_rows

SCORE_LIMIT = tl.constexpr(constants.SCORE_LIMIT)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _step(
    acc, l, m, q8, q_scale, k8_ptrs, k_scale_ptrs, v16_ptrs, mask_ptrs, mask_stride_n, start, row, count,
    LOG2_P_MAX: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    INT8_DOT: tl.constexpr, len_q,
):  # fmt: skip
    """One KV tile. EDGE: some of its keys are past the end or after the query (causal); the workspace itself is padded."""
    offset = tl.cast(start, tl.int64)
    k8 = tl.load(k8_ptrs + offset * D)
    scale = tl.load(k_scale_ptrs + start)
    if INT8_DOT:
        s = tl.dot(q8, k8, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
    else:  # sm_75 has no INT8 dot in Triton: INT8 products are exact in fp16 × fp16 → fp32
        s = tl.dot(q8.to(tl.float16), k8.to(tl.float16)) * scale[None, :]
    if EDGE or MASK != 0:
        s = s * q_scale[:, None]
        key = start + tl.arange(0, BLOCK_N)
        if MASK != 0:
            in_range = (row < len_q)[:, None] & (key < count)[None, :]
            s = mask_scores(s, mask_ptrs + offset * mask_stride_n, in_range, MASK == 2)
        if EDGE:
            s = tl.where((key < count)[None, :], s, float("-inf"))
            if CAUSAL:
                s = tl.where(row[:, None] >= key[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # a row masked so far: −inf − (−inf) must not happen
        p = tl.exp2(s - (finite - LOG2_P_MAX)[:, None])
    else:
        new = tl.maximum(m, tl.max(s, 1) * q_scale)
        finite = new
        p = tl.exp2(s * q_scale[:, None] - (finite - LOG2_P_MAX)[:, None])
    alpha = tl.exp2(m - finite)
    p16 = p.to(tl.float16)
    l = l * alpha + tl.sum(p, 1)
    v16 = tl.load(v16_ptrs + offset * D)
    acc = tl.dot(p16, v16, acc=acc * alpha[:, None])
    return acc, l, new


@triton.jit
def attend(
    q,  # [B, Nq, Hq, HEAD_DIM] by strides
    out,  # the same, of q's dtype
    lse,  # [B, Hq, Nq] fp32, LSE only; VARLEN: [Hq, total_q]
    mask,  # [B, Hq, Nq, Nk] by strides (0 where broadcast); bool as uint8, or float
    k8, k_scale, k_scale_max, k_mean, v16, v_scale,  # as `triton_quant` wrote them
    cu_seqlens_q, cu_seqlens_k,  # [B + 1], VARLEN only
    q_stride_b, q_stride_h, q_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    head0, heads_q, heads_kv, len_q, len_kv, slots, total_q,
    factor,  # |sm_scale| · 4·D, finite
    sign,  # of sm_scale
    out_limit,  # largest finite value of the output's dtype
    LOG2_P_MAX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 additive
    CAUSAL: tl.constexpr, LSE: tl.constexpr, VARLEN: tl.constexpr, INT8_DOT: tl.constexpr,
):  # fmt: skip
    ratio = heads_q // heads_kv
    blocks = tl.cdiv(len_q, BLOCK_M)
    local = tl.program_id(0) // blocks
    group = local // ratio
    index = (head0 + group).to(tl.int64)
    batch, head_kv = index // heads_kv, index % heads_kv
    head = head_kv * ratio + local % ratio
    start_m = tl.program_id(0) % blocks * BLOCK_M
    lse_base = (batch * heads_q + head) * len_q
    if VARLEN:
        first = tl.load(cu_seqlens_q + batch).to(tl.int64)
        len_q = (tl.load(cu_seqlens_q + batch + 1) - first).to(tl.int32)
        first_k = tl.load(cu_seqlens_k + batch).to(tl.int64)
        count = (tl.load(cu_seqlens_k + batch + 1) - first_k).to(tl.int32)
        if CAUSAL:
            count = tl.minimum(count, len_q)
        slot = head_kv * slots + first_k + batch * BLOCK_N
        base, out_base = first * q_stride_n, first * out_stride_n
        lse_base = head.to(tl.int64) * total_q + first
    else:
        count = len_kv
        slot = group.to(tl.int64) * slots
        base, out_base = batch * q_stride_b, batch * out_stride_b
    if start_m >= len_q:
        return

    row, channels, keys = start_m + tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, BLOCK_N)
    inside = (row < len_q)[:, None] & (channels < HEAD_DIM)[None, :]
    x = tl.load(q + base + head * q_stride_h + row.to(tl.int64)[:, None] * q_stride_n + channels[None, :], mask=inside, other=0.0)
    x = rotate(x, BLOCK_M, D) * sign
    q8, unit = round_rows(x, tl.max(tl.abs(x), 1))
    if LSE:
        shift = k_mean_score(x, unit, tl.load(k_mean + group.to(tl.int64) * D + channels), factor)
    largest = tl.maximum(tl.load(k_scale_max + group), AMAX_MIN)
    q_scale = tl.minimum(unit * factor * (LOG2E / K_SCALE_SHIFT), (SCORE_LIMIT / (INT8_MAX * INT8_MAX * D)) / largest)

    k8_ptrs = k8 + slot * D + channels[:, None] + keys[None, :] * D
    v16_ptrs = v16 + slot * D + keys[:, None] * D + channels[None, :]
    k_scale_ptrs = k_scale + slot + keys
    mask_ptrs = mask
    if MASK != 0:
        mask_ptrs = mask + batch * mask_stride_b + head.to(tl.int64) * mask_stride_h
        mask_ptrs = mask_ptrs + row.to(tl.int64)[:, None] * mask_stride_m + keys.to(tl.int64)[None, :] * mask_stride_n

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    end = tl.minimum(count, start_m + BLOCK_M) if CAUSAL else count
    whole = tl.minimum(count, start_m) if CAUSAL else count
    whole = whole // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, l, m = _step(
            acc, l, m, q8, q_scale, k8_ptrs, k_scale_ptrs, v16_ptrs, mask_ptrs, mask_stride_n, start, row, count,
            LOG2_P_MAX, D, BLOCK_N, MASK, CAUSAL, False, INT8_DOT, len_q,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        acc, l, m = _step(
            acc, l, m, q8, q_scale, k8_ptrs, k_scale_ptrs, v16_ptrs, mask_ptrs, mask_stride_n, start, row, count,
            LOG2_P_MAX, D, BLOCK_N, MASK, CAUSAL, True, INT8_DOT, len_q,
        )  # fmt: skip

    scale = tl.load(v_scale + group.to(tl.int64) * D + channels)
    reached = l > 0.0
    safe = tl.where(reached, l, 1.0)
    y = acc * (1.0 / safe)[:, None] * scale[None, :]
    y = tl.minimum(tl.maximum(y, -out_limit), out_limit)  # the largest finite V must not round up to inf
    ptrs = out + out_base + head * out_stride_h + row.to(tl.int64)[:, None] * out_stride_n + channels[None, :]
    tl.store(ptrs, y.to(out.dtype.element_ty), mask=inside)
    if LSE:
        value = tl.where(reached, LN2 * (m + tl.log2(safe) - LOG2_P_MAX) + shift, float("-inf"))
        tl.store(lse + lse_base + row, value, mask=row < len_q)
