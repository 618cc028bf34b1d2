"""How `bench` and its calibration time work on a GPU."""

from __future__ import annotations

from collections.abc import Callable


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
