"""A stand-in for torch.cuda whose time is the calls' own, for the tests of `bench` and of calibration."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sageattention import torch_internals
from sageattention.cli.bench import MIB
from sageattention.cli.candidates import Attention


class Gpu:
    """Counts milliseconds; every attention call and every replay of a captured one adds its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: list[float] | None = None

    def spend(self, ms: float) -> None:
        if self.capturing is not None:
            self.capturing.append(ms)
        else:
            self.now += ms


def install(monkeypatch: pytest.MonkeyPatch, free: int = 8 << 30) -> Gpu:
    """Put the stand-in in torch.cuda's place, with `free` bytes of memory."""
    clock = Gpu()

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    class CUDAGraph:
        def replay(self):
            clock.now += sum(self.captured) * 0.8  # without launch gaps

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(target, stream=None):
        clock.capturing = target.captured = []
        try:
            yield
        finally:
            clock.capturing = None

    fakes = {
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "Stream": Stream,
        "graph": graph,
        "stream": lambda s: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: 10 * MIB,
        "max_memory_allocated": lambda device=None: 13 * MIB,
        "mem_get_info": lambda device=None: (free, 2 * free),
        "empty_cache": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: clock.capturing is not None,
    }
    monkeypatch.setattr(torch_internals, "gpu_sleep", lambda cycles: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock


def attention(gpu: Gpu, name: str, ms: float, factor: float = 1.0) -> Attention:
    def call(q, k, v, **keywords):
        gpu.spend(ms)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **keywords) * factor

    return Attention(name, call, None)
