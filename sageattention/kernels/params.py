"""The kernels' by-value arguments, field for field as csrc/kernel/params.cuh declares them (the build asserts every offset).

A class's name is the C++ struct's name. Pointers are plain integers; strides count elements.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
from collections.abc import Callable
from ctypes import c_double, c_float, c_int32, c_int64, c_uint32, c_uint64
from typing import Any

POINTER = c_uint64


class Tokens(ctypes.Structure):
    """A tensor [B, H, N, D] whose last stride is 1."""

    _fields_ = [("data", POINTER), ("stride_b", c_int64), ("stride_h", c_int64), ("stride_n", c_int64)]


class TileLists(ctypes.Structure):
    """Which KV tiles a block of queries visits, as bits [batch | 1, head | 1, band | 1, 2, words]."""

    _fields_ = [
        ("bits", POINTER), ("stride_b", c_int64), ("stride_h", c_int64), ("stride_band", c_int64),
        ("words", c_int32), ("band_rows", c_int32),
    ]  # fmt: skip


class LiveKeys(ctypes.Structure):
    """Which keys take part in the statistics of K and V."""

    _fields_ = [("bits", POINTER), ("stride_b", c_int64), ("stride_h", c_int64), ("rows", c_int32), ("words", c_int32)]


class ClassifyParams(ctypes.Structure):
    """Before all others where there is a dense mask: tile lists and live keys."""

    _fields_ = [
        ("mask", POINTER), ("stride_b", c_int64), ("stride_h", c_int64), ("stride_q", c_int64), ("stride_k", c_int64),
        ("lists", POINTER), ("live", POINTER), ("kept", POINTER), ("bias", POINTER),
        ("heads", c_int32), ("bands", c_int32), ("len_q", c_int32), ("len_kv", c_int32),
        ("mask_kind", c_int32), ("causal", c_int32), ("vectors", c_int32), ("absent", c_int32), ("tile", c_int32),
        ("words", c_int32), ("live_words", c_int32), ("bias_len", c_int32), ("parts", c_int32), ("part_bytes", c_int32),
        ("row_groups", c_int32),
    ]  # fmt: skip


class PoolParams(ctypes.Structure):
    """First launches of a block-sparse call: block means of K, block sums of V."""

    _fields_ = [
        ("k", Tokens), ("v", Tokens),
        ("k_mean", POINTER), ("v_sum", POINTER), ("k_shift", POINTER), ("k_var", POINTER), ("counts", POINTER), ("order", POINTER),
        ("live", LiveKeys),
        ("bh_count", c_int32), ("heads", c_int32), ("len", c_int32), ("head_dim", c_int32), ("blocks", c_int32), ("pitch", c_int32),
        ("dtype", c_int32), ("vectorized", c_int32),
    ]  # fmt: skip


class RouteParams(ctypes.Structure):
    """Then the router: lists of exact blocks, and the state in which each row's softmax begins."""

    _fields_ = [
        ("q", Tokens),
        ("k_mean", POINTER), ("v_sum", POINTER), ("k_shift", POINTER), ("k_var", POINTER), ("counts", POINTER), ("order", POINTER),
        ("live", LiveKeys), ("sinks", POINTER), ("query_sinks", POINTER),
        ("block_mask", POINTER), ("mask_stride_b", c_int64), ("mask_stride_h", c_int64),
        ("thresholds", POINTER), ("threshold", c_double),
        ("scratch", POINTER), ("lists", POINTER), ("tail", POINTER), ("exact_blocks", POINTER),
        ("bh_count", c_int32), ("heads", c_int32), ("heads_per_kv", c_int32),
        ("len_q", c_int32), ("len_kv", c_int32), ("head_dim", c_int32), ("dtype", c_int32), ("vectorized", c_int32),
        ("rows", c_int32), ("lists_of_head", c_int32), ("blocks", c_int32), ("words", c_int32),
        ("pitch", c_int32), ("strips", c_int32), ("ctas", c_int32),
        ("selection", c_int32), ("causal", c_int32), ("q_start", c_int32), ("neighbours", c_int32), ("scale", c_float),
    ]  # fmt: skip


class PackedSequences(ctypes.Structure):
    """The sequences that a packed launch computes at once."""

    _fields_ = [("sequences", POINTER), ("q_blocks", POINTER), ("runs", POINTER), ("counts", POINTER)]


class PlaceSequencesParams(ctypes.Structure):
    """Before all others of a packed call: where each sequence lies, and the work lists."""

    _fields_ = [
        ("cu_seqlens_q", POINTER), ("cu_seqlens_k", POINTER),
        ("sequences", POINTER), ("q_blocks", POINTER), ("runs", POINTER), ("counts", POINTER),
        ("batch", c_int32), ("sequences_per_group", c_int32), ("wide_q", c_int32), ("wide_k", c_int32),
        ("total_q", c_int32), ("total_k", c_int32), ("max_len_q", c_int32), ("max_len_k", c_int32),
        ("block_m", c_int32), ("tile", c_int32), ("run_keys", c_int32),
        ("max_q_blocks", c_int32), ("max_kv_tiles", c_int32), ("max_runs", c_int32),
    ]  # fmt: skip


class QuantizeKParams(ctypes.Structure):
    """First launch: statistics of V, K → tiles."""

    _fields_ = [
        ("k", Tokens), ("v", Tokens),
        ("kv", POINTER), ("k_mean", POINTER), ("k_scale_partial", POINTER), ("v_stats", POINTER), ("v_stats_ready", POINTER),
        ("v_quant_sum", POINTER), ("v_stats_live", POINTER), ("split_kv_ready", POINTER), ("order", POINTER),
        ("packed", PackedSequences), ("live", LiveKeys),
        ("bh_first", c_int32), ("bh_count", c_int32), ("heads", c_int32), ("len", c_int32), ("head_dim", c_int32),
        ("dtype", c_int32), ("vectorized", c_int32),
        ("kv_tiles", c_int32), ("tile_bytes", c_int32), ("ctas_per_head", c_int32),
        ("k_mean_given", c_int32), ("k_mean_samples", c_int32), ("k_mean_step", c_int32),
        ("split_kv_flags", c_int32), ("v_chunks", c_int32), ("v_chunk_tokens", c_int32),
    ]  # fmt: skip


class QuantizeVParams(ctypes.Structure):
    """Second launch: V → tiles."""

    _fields_ = [
        ("v", Tokens),
        ("k_scale_partial", POINTER), ("v_stats", POINTER), ("v_stats_ready", POINTER), ("v_stats_live", POINTER), ("kv", POINTER),
        ("k_scale_max", POINTER), ("v_amax", POINTER), ("v_mean", POINTER), ("v_quant_sum", POINTER),
        ("live_keys", POINTER), ("order", POINTER), ("packed", PackedSequences), ("live", LiveKeys),
        ("bh_first", c_int32), ("bh_count", c_int32), ("heads", c_int32), ("len", c_int32), ("head_dim", c_int32),
        ("dtype", c_int32), ("vectorized", c_int32),
        ("k_ctas_per_head", c_int32), ("v_chunks", c_int32),
        ("kv_tiles", c_int32), ("ctas_per_head", c_int32), ("run_keys", c_int32),
        ("subtract_v_mean", c_int32), ("v_max", c_float),
    ]  # fmt: skip


class AttendParams(ctypes.Structure):
    """Third launch: attention, Q quantised in its prologue."""

    _fields_ = [
        ("q", Tokens),
        ("kv", POINTER), ("k_scale_max", POINTER), ("v_amax", POINTER), ("v_mean", POINTER), ("v_quant_sum", POINTER),
        ("live_keys", POINTER), ("k_mean", POINTER), ("split_kv_workspace", POINTER), ("split_kv_ready", POINTER),
        ("next_work_idx", POINTER),
        ("mask", POINTER), ("mask_stride_b", c_int64), ("mask_stride_h", c_int64), ("mask_stride_q", c_int64), ("mask_stride_k", c_int64),
        ("kept", POINTER), ("kept_stride_b", c_int64), ("kept_stride_h", c_int64), ("kept_stride_q", c_int64),
        ("lists", TileLists), ("order", POINTER), ("tail", POINTER),
        ("packed", PackedSequences),
        ("out", POINTER), ("out_stride_b", c_int64), ("out_stride_h", c_int64), ("out_stride_n", c_int64),
        ("lse", POINTER),
        ("bh_first", c_int32), ("bh_count", c_int32), ("heads_kv", c_int32), ("heads_per_kv", c_int32),
        ("len_q", c_int32), ("len_kv", c_int32), ("head_dim", c_int32),
        ("dtype", c_int32), ("q_vectorized", c_int32), ("out_vectorized", c_int32),
        ("causal", c_int32), ("mask_kind", c_int32),
        ("kv_tiles", c_int32), ("q_tiles", c_int32), ("full_waves", c_int32),
        ("rcp_q_tiles", c_uint32), ("rcp_heads_per_kv", c_uint32), ("rcp_heads_kv", c_uint32),
        ("score_scale", c_float), ("sign", c_float), ("sm_scale", c_float), ("score_limit", c_float),
        ("inv_v_max", c_float), ("log2_p_max", c_float), ("rescale_threshold", c_float), ("mask_pairs", c_int32),
    ]  # fmt: skip


class ResidentKv(ctypes.Structure):
    """K and V of a launch that quantises them itself."""

    _fields_ = [
        ("k", Tokens), ("v", Tokens), ("cu_seqlens_q", POINTER), ("cu_seqlens_k", POINTER),
        ("sequences", c_int32), ("wide_q", c_int32), ("wide_k", c_int32),
        ("total_q", c_int32), ("total_k", c_int32), ("max_len_q", c_int32), ("max_len_k", c_int32),
    ]  # fmt: skip


class ResidentParams(ctypes.Structure):
    """The only launch of a call whose K and V stay in shared memory."""

    _fields_ = [("kv", ResidentKv), ("attend", AttendParams)]


class NarrowMaskParams(ctypes.Structure):
    """Of narrow_mask, before torch's own attention."""

    _fields_ = [
        ("mask", POINTER), ("mask_stride_b", c_int64), ("mask_stride_h", c_int64), ("mask_stride_q", c_int64), ("mask_stride_k", c_int64),
        ("out", POINTER),
        ("heads", c_int32), ("len_q", c_int32), ("len_kv", c_int32), ("ctas_per_row", c_int32),
        ("mask_dtype", c_int32), ("out_dtype", c_int32), ("limit", c_float),
    ]  # fmt: skip


class RepairRowsParams(ctypes.Structure):
    """Of repair_rows, after torch's own attention."""

    _fields_ = [
        ("mask", POINTER), ("mask_stride_b", c_int64), ("mask_stride_h", c_int64), ("mask_stride_q", c_int64), ("mask_stride_k", c_int64),
        ("out", POINTER), ("out_stride_b", c_int64), ("out_stride_h", c_int64), ("out_stride_n", c_int64),
        ("v", POINTER), ("v_stride_b", c_int64), ("v_stride_h", c_int64), ("v_stride_n", c_int64),
        ("heads", c_int32), ("heads_per_kv", c_int32), ("len_q", c_int32), ("len_kv", c_int32), ("head_dim", c_int32), ("rows", c_int32),
        ("mask_kind", c_int32), ("dtype", c_int32), ("causal", c_int32), ("limit", c_float),
    ]  # fmt: skip


class MergeParams(ctypes.Structure):
    """Of merge_attention."""

    _fields_ = [
        ("out", POINTER), ("out_stride_b", c_int64), ("out_stride_h", c_int64), ("out_stride_n", c_int64),
        ("other", POINTER), ("other_stride_b", c_int64), ("other_stride_h", c_int64), ("other_stride_n", c_int64),
        ("lse", POINTER), ("other_lse", POINTER),
        ("heads", c_int32), ("len", c_int32), ("head_dim", c_int32), ("rows", c_int32), ("row_lanes", c_int32),
        ("dtype", c_int32), ("vectorized", c_int32),
    ]  # fmt: skip


def packer(struct_type: type[ctypes.Structure]) -> tuple[Callable[..., bytes], Callable[..., tuple[bytes, ...]]]:
    """(pack, constants): a struct packed in two steps, because only its pointers change from one call to the next.

    `constants` takes the values of all other fields, in order, and gives the bytes between the pointers, run by run. `pack` takes
    pointers and runs in the order in which they lie in the struct.
    """
    codes: dict[Any, str] = {c_uint64: "Q", c_int64: "q", c_int32: "i", c_uint32: "I", c_float: "f", c_double: "d"}

    def letters(t: type[ctypes.Structure]) -> str:
        kinds = (field[1] for field in t._fields_)
        return "".join(letters(kind) if issubclass(kind, ctypes.Structure) else codes[kind] for kind in kinds)

    fields = letters(struct_type)
    runs = [struct.Struct("<" + run) for run in re.findall("[^Q]+", fields)]
    counts = [len(run) for run in re.findall("[^Q]+", fields)]
    # padding is at the end only: the 8-byte fields come first
    padding = ctypes.sizeof(struct_type) - struct.calcsize("<" + fields)
    whole = "<" + re.sub("[^Q]+", lambda run: f"{struct.calcsize('<' + run[0])}s", fields) + f"{padding}x"

    def constants(*values: float) -> tuple[bytes, ...]:
        if len(values) != sum(counts):
            raise ValueError(f"{struct_type.__name__} has {sum(counts)} fields beside its pointers, got {len(values)}")
        rest = iter(values)
        return tuple(run.pack(*itertools.islice(rest, count)) for run, count in zip(runs, counts))

    return struct.Struct(whole).pack, constants
