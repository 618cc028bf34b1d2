"""What `csrc/build.py` compiles: every kernel image, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator

from .binaries import Entry, Image
from .family import MASKS, Kernels
from .mma import MMA_FP8, MMA_FP16, MMA_INT8
from .params import ClassifyParams, KeysParams, ValuesParams
from .wgmma import WGMMA_FP8, WGMMA_FP16

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_75", "compute_80", "compute_89")
# The PTX of architectures whose machine code is there is for running their kernels on a later card, which itself takes the last one.
TEST_TARGETS = ("compute_75", "compute_80")
KERNELS: tuple[Kernels, ...] = (WGMMA_FP16, MMA_FP16, MMA_FP8, WGMMA_FP8, MMA_INT8)

VALUES_THREADS = 128
# Threads whose registers fit a multiprocessor, by head dimension; on 7.5, where the whole rotation is in fp32, the compiler lacks two.
KEYS_THREADS, VALUES_RESIDENT = {64: 768, 128: 768, 256: 512}, 768


def _keys_entry(kernels: Kernels, arch: int, head_dim: int, masked: bool) -> Entry:
    layout = kernels.layout.format(d=head_dim)
    threads, resident = 4 * kernels.unit_keys(head_dim), KEYS_THREADS[head_dim]
    if arch == 75 and head_dim > 64:
        resident -= threads
    if masked:  # looking at which keys are live takes registers
        resident = min(resident, 512)
    expression = f"quantise_keys<{layout}, {str(masked).lower()}>"
    return Entry(kernels.keys_symbol(head_dim, masked), expression, KeysParams, threads, max(1, resident // threads))


def _values_entry(kernels: Kernels, head_dim: int) -> Entry:
    expression = f"quantise_values<{kernels.layout.format(d=head_dim)}, Values::{kernels.pv}>"
    return Entry(kernels.values_symbol(head_dim), expression, ValuesParams, VALUES_THREADS, VALUES_RESIDENT // VALUES_THREADS)


CLASSIFY = Entry("classify_mask", "classify_band", ClassifyParams, 256, 4, local=8)


def _images(target: str) -> Iterator[Image]:
    """Every image for one target of the compiler."""
    arch, built = int(target.split("_")[1].rstrip("a")), [k for k in KERNELS if k.built_for(target)]
    for name in dict.fromkeys(k.quantiser for k in built):
        made = [(k, d) for k in built if k.quantiser == name for d in k.head_dims]
        keys = {k.keys_symbol(d, masked): _keys_entry(k, arch, d, masked) for k, d in reversed(made) for masked in (True, False)}
        entries = (CLASSIFY, *reversed(keys.values()), *(_values_entry(k, d) for k, d in made))
        yield Image(name, target, "kernel/quantise.cuh", entries, released=target not in TEST_TARGETS)
    for k in built:
        for d in k.head_dims:
            entries = tuple(k.entry(k, arch, d, mask, accumulate) for mask in MASKS for accumulate in k.accumulators)
            yield Image(k.attend_image(d), target, k.source, entries, released=target not in TEST_TARGETS)


# The images for tests are compiled only where their architecture is named.
IMAGES: tuple[Image, ...] = tuple(image for target in TARGETS for image in _images(target))
