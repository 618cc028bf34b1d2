"""What `csrc/tools/build.py` compiles: every kernel image, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator

from .binaries import Entry, Image
from .family import MASKS, KernelFamily
from .mma import MMA_FP8, MMA_FP16, MMA_INT8
from .params import ClassifyParams, QuantizeKParams, QuantizeVParams
from .wgmma import WGMMA_FP8, WGMMA_FP16

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_75", "compute_80", "compute_89")
# The PTX of architectures whose machine code is there is for running their kernels on a later card, which itself takes the last one.
TEST_TARGETS = ("compute_75", "compute_80")
KERNELS: tuple[KernelFamily, ...] = (WGMMA_FP16, MMA_FP16, MMA_FP8, WGMMA_FP8, MMA_INT8)

QUANTIZE_V_THREADS = 128
# Threads whose registers fit a multiprocessor, by head dimension; on 7.5, where the whole rotation is in fp32, the compiler lacks two.
QUANTIZE_K_RESIDENT, QUANTIZE_V_RESIDENT = {64: 768, 128: 768, 256: 512}, 768


def _quantize_k_entry(kernels: KernelFamily, arch: int, head_dim: int, masked: bool) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    threads, resident = 4 * kernels.scale_block_keys(head_dim), QUANTIZE_K_RESIDENT[head_dim]
    if arch == 75 and head_dim > 64:
        resident -= threads
    if masked:  # looking at which keys are live takes registers
        resident = min(resident, 512)
    expression = f"quantize_k<{layout}, {str(masked).lower()}>"
    return Entry(kernels.quantize_k_symbol(head_dim, masked), expression, QuantizeKParams, threads, max(1, resident // threads))


def _quantize_v_entry(kernels: KernelFamily, head_dim: int) -> Entry:
    expression = f"quantize_v<{kernels.layout.format(d=head_dim)}, PvType::{kernels.pv}>"
    return Entry(
        kernels.quantize_v_symbol(head_dim), expression, QuantizeVParams, QUANTIZE_V_THREADS, QUANTIZE_V_RESIDENT // QUANTIZE_V_THREADS
    )


CLASSIFY = Entry("classify_mask", "classify_band", ClassifyParams, 256, 2)


def _images(target: str) -> Iterator[Image]:
    """Every image for one target of the compiler."""
    arch, built = int(target.split("_")[1].rstrip("a")), [k for k in KERNELS if k.built_for(target)]
    for name in dict.fromkeys(k.quantizer for k in built):
        made = [(k, d) for k in built if k.quantizer == name for d in k.head_dims]
        keys = {k.quantize_k_symbol(d, masked): _quantize_k_entry(k, arch, d, masked) for k, d in reversed(made) for masked in (True, False)}
        entries = (CLASSIFY, *reversed(keys.values()), *(_quantize_v_entry(k, d) for k, d in made))
        yield Image(name, target, "kernel/quantize.cuh", entries, released=target not in TEST_TARGETS)
    for k in built:
        for d in k.head_dims:
            entries = tuple(k.entry(k, arch, d, mask, accumulate) for mask in MASKS for accumulate in k.accumulators)
            yield Image(k.attend_image(d), target, k.source, entries, released=target not in TEST_TARGETS)


# The images for tests are compiled only where their architecture is named.
IMAGES: tuple[Image, ...] = tuple(image for target in TARGETS for image in _images(target))
