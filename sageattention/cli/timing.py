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


def captured(work: Callable[[], object]) -> Callable[[], object] | None:
    """`work` as a replay of a CUDA graph, without gaps between launches; None where it can't be captured.

    torch.cuda.graph collects garbage first, which takes longer than what is timed here.
    """
    import torch

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # whatever is made at the first call on a stream
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            work()
        except RuntimeError:
            refused = True
        else:
            refused = False
        try:
            graph.capture_end()
        except RuntimeError:
            refused = True
    torch.cuda.current_stream().wait_stream(stream)
    if refused:
        torch.cuda.synchronize()
        return None
    return graph.replay
