"""The static model: what calls cost on a card that could not be timed, from the data sheets of its architecture.

A multiprocessor does the products at the rate of its tensor cores, then the softmax at that of its other pipes; nothing hides behind
anything. Where a figure is unknown it is such that quantising looks worse than it is.
"""

from __future__ import annotations

from ..numerics.scheme import Scheme
from ..variants import VARIANTS, Candidate
from .cost import ALIGNED, BLOCK, MI, RESIDENT, TORCH, TORCH_WIDE, UNALIGNED, Cost, Kind

# Dense multiply-accumulates per clock and multiprocessor, by operands and accumulator, of the GeForce card of each architecture
# (white papers: Turing, A100, GA102, Ada, H100, Blackwell, RTX Blackwell). Professional cards of 7.5, 8.6, 8.9 and 12.0 accumulate in
# fp32 at the full rate, so that 16-bit attention is twice as fast there. 9.0 by wgmma, 10.0 by mma.sync as 8.0: nothing else is known.
MMA_RATES: dict[int, dict[tuple[str, str], int]] = {
    75: {("int8", "int32"): 1024, ("fp16", "fp16"): 512, ("fp16", "fp32"): 256},
    80: {("int8", "int32"): 2048, ("fp16", "fp16"): 1024, ("fp16", "fp32"): 1024},
    86: {("int8", "int32"): 1024, ("fp16", "fp16"): 512, ("fp16", "fp32"): 256},
    89: {("int8", "int32"): 1024, ("fp16", "fp16"): 512, ("fp16", "fp32"): 256, ("fp8", "fp16"): 1024, ("fp8", "fp32"): 512},
    90: {("int8", "int32"): 4096, ("fp16", "fp16"): 2048, ("fp16", "fp32"): 2048, ("fp8", "fp16"): 4096, ("fp8", "fp32"): 4096},
}
MMA_RATES |= {100: MMA_RATES[80] | {("fp8", "fp16"): 1024, ("fp8", "fp32"): 1024}, 120: MMA_RATES[89]}
# What torch's kernels reach beyond that: cuDNN's use the tensor memory of 10.0, which no variant does.
TORCH_RATES = {arch: rates["fp16", "fp32"] for arch, rates in MMA_RATES.items()} | {100: 4096}

CLOCKS = {75: 1.6, 80: 1.4, 86: 1.7, 89: 2.4, 90: 1.7, 100: 1.8, 120: 2.4}  # GHz under load
MULTIPROCESSORS = {75: 46, 80: 108, 86: 68, 89: 76, 90: 132, 100: 148, 120: 70}  # of a middling card, where the number is not known
BANDWIDTH = 8.0  # GB/s of memory for each multiprocessor; cards have 8 (RTX 4090) to 36 (H200)

# Instructions for a score beside the products, of 128 a clock and multiprocessor: exponential, maximum, sum, conversion, scales; what a
# masked tile adds to ours, and how much longer torch's masked kernels take than its others, those of odd rows still (as on 9.0).
SOFTMAX, SOFTMAX_QUANTIZED, SOFTMAX_TRITON = 11, 14, 28
MASKED = {"bool": 25, "additive": 45}
TORCH_MASKED = {"keys": 2.0, ALIGNED: 2.0, UNALIGNED: 3.2}
ISSUED = 128
# How much longer a block takes for its keys where it is alone on the card: nobody else brings keys into the cache.
IDLE, IDLE_QUANTIZED = 0.1, 1.0
# What a block takes longer whose head dimension is padded; how much longer torch's kernels of many channels take for them.
PADDED = 1.0
WIDE = 0.2
# How much of the work waits for the last wave: blocks are not divisible. On 9.0 it is two thirds for torch and for us.
IN_WAVES = 0.67
# Microseconds: a call with its launches, and what a block does before and behind its loop.
CALL, CALL_QUANTIZED, CALL_RESIDENT, CALL_CONVERTED = 5.0, 25.0, 8.0, 8.0
BLOCK_ENDS, BLOCK_ENDS_QUANTIZED = 2.0, 5.0
# Bytes moved for each element of q (with the output) and of k (with v), and for each byte of a mask: read, written, read again.
TORCH_BYTES, QUANTIZED_BYTES = (4, 4, 5), (4, 10, 3)


def static_cost(arch: int, candidate: Candidate, kind: Kind, multiprocessors: int) -> Cost:
    """What a candidate, torch's attention among them, costs on a card of the family `arch`."""
    head_dim, mask = kind
    us = MI / CLOCKS[arch] / 1e3  # of a million clocks
    byte = MI / (BANDWIDTH * multiprocessors) / 1e3
    if candidate == TORCH:
        factor = us * TORCH_MASKED.get(mask, 1.0)
        pair, channels = factor * SOFTMAX / ISSUED, factor * 64 * 2 / TORCH_RATES[arch]
        call, ends, padded, moved = CALL, BLOCK_ENDS, 0.0, TORCH_BYTES
        alone = IDLE_QUANTIZED if mask == UNALIGNED else IDLE
    else:
        triton = VARIANTS[candidate.variant].backend == "triton"
        pair = us * (SOFTMAX_TRITON if triton else SOFTMAX_QUANTIZED + MASKED.get(mask, 0)) / ISSUED
        channels = us * 64 * products(arch, candidate)
        call, ends, padded, moved = CALL_QUANTIZED, BLOCK_ENDS_QUANTIZED, PADDED, QUANTIZED_BYTES
        alone = IDLE_QUANTIZED
        if mask == RESIDENT:
            call = CALL_RESIDENT
    whole = pair + channels * head_dim / 64  # of a million pairs
    busy, smooth = IN_WAVES * whole * BLOCK * 1024 / MI, 1 - IN_WAVES
    return Cost(
        call=call,
        waves=IN_WAVES * ends,
        wave_keys=busy,
        idle_keys=alone * busy,
        blocks=smooth * ends,
        padded=padded,
        pairs=smooth * pair,
        products=smooth * channels,
        grouped=0.0 if candidate == TORCH or mask == RESIDENT else busy,
        query=moved[0] * byte,
        key=moved[1] * byte,
        mask=moved[2] * byte,
        converted=CALL_CONVERTED if mask in (ALIGNED, UNALIGNED) else 0.0,
        converted_mask=moved[2] * byte if mask in (ALIGNED, UNALIGNED) else 0.0,
        wide=WIDE * busy if candidate == TORCH and head_dim > TORCH_WIDE else 0.0,
    )


def products(arch: int, candidate: Candidate) -> float:
    """Clocks that a multiprocessor's tensor cores take for one multiply-accumulate of Q·K and one of P·V."""
    rates, scheme = MMA_RATES[arch], scheme_of(candidate)
    return 1 / rates["int8", "int32"] + 1 / rates[scheme.pv, {"fp8": "fp32"}.get(scheme.accumulate, scheme.accumulate)]


def scheme_of(candidate: Candidate) -> Scheme:
    """How a candidate rounds."""
    variant = VARIANTS[candidate.variant]
    scheme = variant.accum[candidate.accum] if candidate.accum else variant.scheme
    assert scheme is not None  # a candidate quantises
    return scheme
