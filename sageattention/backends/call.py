"""A call as a backend takes it, the tensors it gives back, and what a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from .. import layout
from ..planning.plan import KernelPlan, Plan
from ..planning.problem import Problem
from .into_q import takes_output

Result = tuple[torch.Tensor, torch.Tensor | None]  # out, in q's layout and dtype; lse [B, H, Nq] fp32
P = TypeVar("P", bound=Plan)
K = TypeVar("K", bound=KernelPlan)


@dataclass(eq=False, slots=True)
class Operands:
    """The tensors of one call.

    Attributes:
        into_q: the output takes q's place in memory.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    into_q: bool = field(default=False, kw_only=True)

    def take_over(self, release: Callable[[], object], problem: Problem) -> None:
        """Have the caller let go of q, k and v, and write the output into q where nobody misses it."""
        release()
        self.q, self.k, self.v = self.q.detach(), self.k.detach(), self.v.detach()  # no views of tensors that somebody may still have
        self.into_q = takes_output(self.q, self.k, self.v, problem)


@dataclass(eq=False, slots=True)
class PreparedCall(Operands, Generic[P]):
    """One checked attention call: its tensors, what it is, and what will run it."""

    mask: torch.Tensor | None  # broadcastable to [B, H, Nq, Nk], always 4-D
    problem: Problem
    plan: P
    bound: dict[Any, Any]  # what the backend has worked out for calls that differ from this one in nothing but addresses

    def result(self) -> Result:
        """Uninitialised (out, lse or None), or q in the output's place."""
        return (self.q, None) if self.into_q else result_like(self.q, self.problem)

    def hnd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as [B, H, N, D] views."""
        where = self.problem.layout
        return layout.to_hnd(self.q, where), layout.to_hnd(self.k, where), layout.to_hnd(self.v, where)


@dataclass(frozen=True)
class QuantizedKV(Generic[K]):
    """K and V, quantised by `plan`; each backend adds its buffers. Owns no float tensor of the caller's.

    `problem` is the call that K and V were checked as, `made_on` the CUDA stream that quantises them: the caller may be on another one
    by the time of `attend`.
    """

    problem: Problem
    plan: K
    made_on: torch.cuda.Stream | None = field(default=None, kw_only=True)

    def join(self, current: torch.cuda.Stream) -> None:
        """Let a stream wait for the quantising, and keep the buffers until it is through with them."""
        if self.made_on is None or current == self.made_on:
            return
        with torch.cuda.stream(self.made_on):
            captured = torch.cuda.is_current_stream_capturing()
        # A capture begins when all work before it is done, and can't wait for that.
        if captured or not torch.cuda.is_current_stream_capturing():
            current.wait_stream(self.made_on)
        for buffer in vars(self).values():
            if isinstance(buffer, torch.Tensor):
                buffer.record_stream(current)


class Backend(Protocol):
    """A way to run plans of one type."""

    def run(self, call: PreparedCall[Any]) -> Result:
        """Compute a call. KernelMissing: a kernel of its plan can't be had."""
        ...


class KernelBackend(Backend, Protocol):
    """One whose calls can be had in halves. Where a call is `into_q` they store a row of the output only after its query was read for the
    last time."""

    def load(self, problem: Problem, plan: Any) -> None:
        """Get the kernels of `run`, `quantize` and `attend`. KernelMissing: there is one that can't be had."""
        ...

    def quantize(self, k: torch.Tensor, v: torch.Tensor, problem: Problem, plan: Any, mask: torch.Tensor | None) -> QuantizedKV[Any]:
        """Quantise all heads of K and V; `mask` is the problem's, 4-D: keys that it hides from every query take no part."""
        ...

    def attend(self, q: torch.Tensor, kv: Any, problem: Problem, mask: torch.Tensor | None) -> Result:
        """Attend every head of q to what `quantize` gave; `mask` is 4-D."""
        ...


def result_like(q: torch.Tensor, problem: Problem) -> Result:
    """Uninitialised (out, lse or None) for a problem."""
    if problem.head_dim_v:
        out = q.new_empty((*q.shape[:-1], problem.head_dim_v))
    else:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not problem.return_lse:
        return out, None
    return out, torch.empty(problem.batch, problem.heads_q, problem.len_q, dtype=torch.float32, device=q.device)


def empty_result(q: torch.Tensor, problem: Problem) -> Result:
    """What a problem gives where there is nothing to attend to: zeros, and log-sum-exps of −inf."""
    out, lse = result_like(q, problem)
    return out.zero_(), None if lse is None else lse.fill_(-torch.inf)
