"""Whether the output of a call may take q's place in memory, so that its peak is q, k, v and a workspace.

A call that is given its tensors for good (`Operands.take_over`) has no use for q behind the output: a row of O depends on one row of Q, and
whoever stores it has read that one before – of two CTAs that share a work tile the one that stores waits for the other – and nobody else
reads it. The router of a block-sparse call has been through Q before its attention begins. Only the log-sum-exp, and what a caller adds to
the output, would read Q again. Rows beyond a sequence's end repeat its last one, stored or not, and count nowhere.
"""

from __future__ import annotations

import torch

from .. import torch_internals
from ..layout import AXES, strides
from ..planning.problem import Problem


def takes_output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> bool:
    """Whether the output of a call, the last that is done with its tensors, may be written into q.

    Args:
        q, k, v: as for `torch_internals.alone`.
    """
    if problem.return_lse or not torch_internals.alone(q, k, v):
        return False
    pitch = row_pitch(q, problem.layout)
    if not pitch or not (apart(q, pitch, k, problem.layout) and apart(q, pitch, v, problem.layout)):
        return False
    # A graph is replayed on the q that it was captured with, unless a kernel in it writes that.
    return not (q.is_cuda and torch.cuda.is_current_stream_capturing())


def row_pitch(q: torch.Tensor, layout: str) -> int:
    """Elements from one row to the next where q is contiguous but for that, as an output is expected to be; else 0. A row is a token's
    heads in "NHD", a head's token in "HND"."""
    batch, heads, tokens, dim = (q.shape[axis] for axis in (0, *AXES[layout], 3))
    stride_b, stride_h, pitch = strides(q, layout)
    if layout == "NHD":
        expected = (batch, stride_b, tokens * pitch), (heads, stride_h, dim)
    else:
        expected = (batch, stride_b, heads * stride_h), (heads, stride_h, tokens * pitch)
    dense = all(size == 1 or stride == wanted for size, stride, wanted in expected)
    return pitch if dense and pitch >= _columns(q, layout) else 0


def apart(q: torch.Tensor, pitch: int, other: torch.Tensor, layout: str) -> bool:
    """Whether q, of a `row_pitch`, has no element in common with another tensor of its type: they lie one behind the other, or in different
    columns of the same rows, as parts of a fused projection do."""
    columns = _columns(q, layout)
    start = (other.data_ptr() - q.data_ptr()) // q.element_size()
    steps = [((size - 1) * stride, stride) for size, stride in zip(other.shape, other.stride())]
    if start >= (q.numel() // columns - 1) * pitch + columns or start + sum(length for length, _ in steps) < 0:
        return True
    column, width = start % pitch, sum(length for length, stride in steps if stride % pitch) + 1
    return column >= columns and column + width <= pitch


def _columns(q: torch.Tensor, layout: str) -> int:
    return q.shape[3] * (q.shape[2] if layout == "NHD" else 1)
