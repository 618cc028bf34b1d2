"""The first long call of each class on a card that nobody has tried: are our kernels right there, and how fast?

PyTorch's attention and the likeliest candidates compute the call's own tensors, or as many heads of them as take a moment; sampled rows
are compared, and a second run of each is timed by events, with nothing in between that waits. What came of it is a verdict
(planning/verdicts.py): a candidate that is wrong is out on the card, and "auto" takes the fastest of the others from then on.
"""

from __future__ import annotations

import logging
import statistics
import threading
from typing import TYPE_CHECKING

import torch

from . import precision, settings, torch_internals
from .errors import CudaError, KernelMissing, Unsupported
from .kernels import binaries
from .layout import AXES, to_hnd
from .numerics import reference
from .numerics.constants import ERROR_BOUNDS
from .numerics.rows import spread
from .planning import rules, verdicts
from .planning.cost import TORCH, Form
from .planning.datasheet import scheme_of
from .planning.here import forced_kernels, machine, plan_for, warn_once
from .planning.problem import Problem
from .planning.verdicts import Class, Verdict
from .variants import Candidate, settled

if TYPE_CHECKING:
    from .dispatch import Call
    from .numerics.scheme import Scheme
    from .planning.plan import Plan

# PyTorch's attention may take so long, as predicted, on the part of a call that is looked at; predictions are off, and each of three
# candidates takes four turns within a second.
PART_MS, TURNS = 40.0, 3
MIN_ROWS = 1024  # queries of the part, where one head is too long by itself
LAUNCH_CYCLES = 2_000_000  # a millisecond, in which the host launches a turn: the GPU is not to wait for it while it is timed
SAMPLE = 64  # rows of each head that are compared
# The relative L2 distance from PyTorch's result that a candidate may have, in terms of the bound of its type, or of what its numerics make
# of the call where that is more: the data may be harder than those that bounds are made for. What kernels get wrong is off by far more.
TOLERANCE = 2.0

LOG = logging.getLogger("sageattention")

_verifying = threading.Lock()
_given_up: set[tuple[object, ...]] = set()  # classes that could not be verified: not tried again before the next start


def verified(call: Call) -> Plan | None:
    """The plan by what a call whose plan is not verified has shown; None where this is no time to find out.

    Raises:
        KernelMissing: a variant that was asked for by name is wrong on this card.
    """
    if torch.cuda.is_current_stream_capturing():
        return None
    # One at a time, and another device's thread waits: what it would run in the meantime is what is being looked at.
    with _verifying:
        if not _is_known(call) and not _find_out(call):
            return None
    name = call.plan.variant.name
    if call.plan.auto or settings.read("SAGEATTENTION_VARIANT") == name:
        return plan_for(call.problem, "auto")
    return plan_for(call.problem, name, call.plan.accum)


def _is_known(call: Call) -> bool:
    """Whether a call of another thread has shown it since this one was planned."""
    known = verdicts.of_card(machine(call.problem), forced_kernels(*binaries.forced()))
    candidate = settled(call.plan.unverified[0])
    return candidate in known.off or not known.wants(Form.of(call.problem), candidate, _timed(call))


def _timed(call: Call) -> bool:
    """Whether candidates are timed as well."""
    return call.plan.auto and call.plan.basis != "measured"


def _find_out(call: Call) -> bool:
    """Look at a call, and keep what it shows; False where nothing can be told."""
    form, card, kernels = Form.of(call.problem), machine(call.problem), forced_kernels(*binaries.forced())
    key = card, kernels, Class.of(form), call.plan.unverified
    if key in _given_up:
        return False
    found = None
    try:
        with torch.cuda.device(call.q.device), precision.exact(call.q.device.type):
            found = _look(_part(call, form), call.plan.unverified, _timed(call))
    except torch.cuda.OutOfMemoryError:
        pass
    except CudaError:  # of our own kernels: that must be heard
        raise
    except RuntimeError as error:  # torch's, about a call that it would not have been given: sampling goes on
        warn_once(f"{call.plan.variant.name} could not be compared with PyTorch's attention on {card.name}: {error}")
    if found is None:
        _given_up.add(key)
        return False
    verdict, off = found
    verdicts.add(card, kernels, form, verdict, off)
    for candidate, reason in off.items():
        told = "Please report that, with what `python -m sageattention doctor` prints"
        warn_once(f"{candidate} is not used on {card.name} any more: {reason}. {told}")
    if not off:
        LOG.info("sageattention: verified on %s, %s: %s", card.name, Class.of(form), ", ".join(map(str, sorted(verdict.right))))
    return True


def _look(part: Call, candidates: tuple[Candidate, ...], timed: bool) -> tuple[Verdict, dict[Candidate, str]] | None:
    """(the verdict, reason by candidate of those that are wrong); None where nothing can be told."""
    runs = {candidate: planned for candidate in (TORCH, *candidates) if (planned := _planned(part, candidate))}
    exact, distances = None, {}
    for candidate, run in list(runs.items()):  # loads, warms up
        try:
            rows = _sample(run)
        except KernelMissing:  # found out at its first launch; planning is told when it is its turn
            del runs[candidate]
            continue
        if exact is None:
            exact = rows
        else:
            distances[candidate] = _distance(rows, exact)
    times = _times(runs) if timed else {}
    if exact is None or not distances or not float(exact.norm()) > 0 or not bool(exact.isfinite().all()):
        return None
    off, right = {}, set()
    for candidate, of_heads in distances.items():
        worst = int(of_heads.nan_to_num(torch.inf).argmax())
        error, accepted = float(of_heads.flatten()[worst]), TOLERANCE * ERROR_BOUNDS[scheme_of(candidate).pv]
        if accepted < error < torch.inf:  # hard data, or a wrong kernel?
            emulated = _distance_of_emulation(scheme_of(candidate), part, exact, *divmod(worst, of_heads.shape[1]))
            accepted = max(accepted, TOLERANCE * emulated)
        if error <= accepted:
            right.add(settled(candidate))
        else:  # NaN, too
            off[settled(candidate)] = f"its result is off by {error:.3g}, at most {accepted:.3g} is accepted ({Form.of(part.problem)})"
    ms = {settled(candidate): ms for candidate, ms in times.items() if candidate == TORCH or settled(candidate) in right}
    return Verdict(ms, frozenset(right)), off


def _distance(rows: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The relative L2 distance in each head, [B, H]; of a head of zeros, what it is from zeros."""
    size = exact.norm(dim=(2, 3))
    return (rows - exact).norm(dim=(2, 3)) / torch.where(size > 0, size, 1.0)


def _distance_of_emulation(scheme: Scheme, part: Call, exact: torch.Tensor, batch: int, head: int) -> float:
    """How far the emulation of a candidate's numerics is from the sampled rows of a head."""
    p = part.problem
    q, k, v = (t[batch : batch + 1] for t in part.hnd())
    rows, shared = _sampled_rows(q), head // (p.heads_q // p.heads_kv)
    mask = None
    if part.mask is not None:
        mask = part.mask.expand(p.batch, p.heads_q, p.len_q, p.len_kv)[batch, head, rows]
    if p.causal:  # the rows are not all there are: which keys each sees has to be told
        sees = rows[:, None] >= torch.arange(p.len_kv, device=rows.device)
        mask = sees if mask is None else mask & sees if mask.dtype is torch.bool else mask.masked_fill(~sees, -torch.inf)
    out, _ = reference.emulate(
        q[:, head : head + 1, rows], k[:, shared : shared + 1], v[:, shared : shared + 1], scheme, attn_mask=mask, sm_scale=p.sm_scale
    )  # fmt: skip
    return float(_distance(out.float(), exact[batch : batch + 1, head : head + 1]))


def _times(runs: dict[Candidate, Call]) -> dict[Candidate, float]:
    """Milliseconds of each, the median of turns. The host waits once, behind all of them."""
    marks = []
    for _ in range(TURNS):
        torch_internals.gpu_sleep(LAUNCH_CYCLES)
        for candidate, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run.compute()
            end.record()
            marks.append((candidate, begin, end))
    torch.cuda.synchronize()
    return {candidate: statistics.median(b.elapsed_time(e) for c, b, e in marks if c == candidate) for candidate in runs}


def _planned(part: Call, candidate: Candidate) -> Call | None:
    """The part by a candidate; None where there is no kernel for it."""
    try:
        plan = plan_for(part.problem, candidate.variant, candidate.accum)
    except (Unsupported, KernelMissing):
        return None
    return type(part)(part.q, part.k, part.v, part.mask, part.problem, plan, {})


def _sample(run: Call) -> torch.Tensor:
    """Rows of a call's result, [B, H, SAMPLE, D] fp32."""
    out = to_hnd(run.compute()[0], run.problem.layout)
    return out[:, :, _sampled_rows(out)].float()


def _sampled_rows(q: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows of a [B, H, N, D] tensor that are compared, spread evenly."""
    return spread(q.shape[2], SAMPLE, q.device)


def _part(call: Call, form: Form) -> Call:
    """As many heads of a call, and if one is too long as many queries, as PyTorch's attention computes in `PART_MS`."""
    p, arch = call.problem, binaries.forced()[0]
    card = machine(p)
    expected = rules.predict(form, card, arch or card.arch)[0][TORCH]
    heads = min(form.heads_kv, max(1, int(form.heads_kv * PART_MS / expected)))
    batch, heads_kv = (heads // p.heads_kv, p.heads_kv) if heads >= p.heads_kv else (1, heads)
    rows = min(p.len_q, max(MIN_ROWS, int(p.len_q * PART_MS * form.heads_kv / expected))) if heads == 1 else p.len_q
    heads_axis, tokens_axis = AXES[p.layout]
    q = call.q[:batch].narrow(heads_axis, 0, heads_kv * (p.heads_q // p.heads_kv)).narrow(tokens_axis, 0, rows)
    k, v = (t[:batch].narrow(heads_axis, 0, heads_kv) for t in (call.k, call.v))
    mask = call.mask
    if mask is not None:
        for axis, size in enumerate((batch, q.shape[heads_axis], rows)):
            mask = mask.narrow(axis, 0, min(size, mask.shape[axis]))
    problem = Problem.from_tensors(
        q, k, v, tensor_layout=p.layout, is_causal=p.causal, attn_mask=mask, sm_scale=p.sm_scale
    )  # fmt: skip
    return type(call)(q, k, v, mask, problem, call.plan, {})
