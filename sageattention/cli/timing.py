"""How `bench` and its calibration time work on a GPU."""

from __future__ import annotations

from collections.abc import Callable

# Cycles of a GPU to wait for each second of the host's: twice what its clock does; and the longest such second.
CYCLES, LONGEST_S = 4e9, 0.01


def gpu_ms(work: Callable[[], object]) -> float:
    """The time between two CUDA events around `work`, in ms."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def queued_ms(work: Callable[[], object], host_s: float) -> float:
    """As `gpu_ms`, but all of `work` is launched before the GPU comes to it, as in a model, whose launches run ahead.

    Args:
        host_s: the time that launching takes, in seconds; the GPU is kept waiting so much longer.
    """
    import torch

    from .. import torch_internals

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch_internals.gpu_sleep(int(CYCLES * min(host_s, LONGEST_S)))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
