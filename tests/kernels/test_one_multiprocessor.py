"""Every kernel ends on a card of which all multiprocessors but one are taken: no block waits for one that has not begun (marker gpu)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sageattention import available_variants, sageattn
from sageattention.device import libcuda
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu

# Each block says that it has begun and stays until word 0 is set, at most ten seconds.
OCCUPY = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry occupy(.param .u64 words) {
    .reg .pred %p;
    .reg .b32 %r<3>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [words];
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.u64 %rd2, %rd1, %rd2;
    mov.u32 %r2, 1;
    st.volatile.global.u32 [%rd2+4], %r2;
    mov.u64 %rd3, %globaltimer;
    add.u64 %rd3, %rd3, 10000000000;
wait:
    ld.volatile.global.u32 %r2, [%rd1];
    setp.ne.u32 %p, %r2, 0;
    @%p bra done;
    mov.u64 %rd4, %globaltimer;
    setp.lt.u64 %p, %rd4, %rd3;
    @%p bra wait;
done:
    ret;
}
\0"""
LIMIT = 8.0  # seconds; a call takes some milliseconds


def ready() -> list[str]:
    """The variants with CUDA kernels that run here; without a GPU all of them, to be listed."""
    own = [name for name, variant in VARIANTS.items() if variant.backend == "cuda"]
    if not torch.cuda.is_available():
        return own
    return [found.name for found in available_variants("cuda") if found.status == "ready" and found.name in own]


@contextmanager
def all_but_one_taken() -> Iterator[torch.Tensor]:
    """Blocks that fill the shared memory of every multiprocessor but one; yields the word that lets them go."""
    blocks = torch.cuda.get_device_properties(0).multi_processor_count - 1
    shared = libcuda.device_attribute(0, libcuda.SHARED_MEMORY_PER_BLOCK_OPTIN)
    words = torch.zeros(1 + blocks, dtype=torch.int32).pin_memory()
    context, stream = libcuda.primary_context(0), torch.cuda.Stream()
    with libcuda.current(context):
        function = libcuda.get_function(libcuda.load_module(OCCUPY, "occupy"), "occupy")
        libcuda.allow_shared(function, "occupy", shared)
        address = ctypes.c_void_p(words.data_ptr())
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(address))
        libcuda.check(
            libcuda.library().cuLaunchKernel(function, blocks, 1, 1, 32, 1, 1, shared, stream.cuda_stream, parameters, None),
            "cuLaunchKernel(occupy)",
        )
    try:
        begun = time.monotonic()
        while not words[1:].all():
            assert time.monotonic() - begun < LIMIT, "the blocks that take the multiprocessors do not all begin"
        yield words
    finally:
        words[0] = 1
        stream.synchronize()


@pytest.mark.parametrize("form", ["plain", "causal", "masked"])
@pytest.mark.parametrize("variant", ready())
def test_a_call_ends(variant: str, form: str) -> None:
    q, k, v = (torch.randn(1, 12, 3000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.rand(1, 1, 1, 3000, device="cuda") < 0.7 if form == "masked" else None
    stream, ended = torch.cuda.Stream(), torch.cuda.Event()

    def call() -> torch.Tensor:
        with torch.cuda.stream(stream):
            out = sageattn(q, k, v, attn_mask=mask, is_causal=form == "causal", variant=variant)
            ended.record()
        return out

    torch.cuda.synchronize()
    expected = [call() for _ in range(3)].pop()  # the call below finds its memory in torch's pool
    torch.cuda.synchronize()
    with all_but_one_taken():
        begun = time.monotonic()
        out = call()
        while not ended.query() and time.monotonic() - begun < LIMIT:
            time.sleep(0.001)
        alone = ended.query()
    torch.cuda.synchronize()
    assert alone and torch.equal(out, expected)
