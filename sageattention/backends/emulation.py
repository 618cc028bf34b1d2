"""The `reference` variant: the INT8 / FP16 numerics in plain PyTorch."""

from __future__ import annotations

from ..layout import from_hnd
from ..numerics import reference
from ..planning.plan import EmulationPlan
from .call import PreparedCall, Result


def run(call: PreparedCall[EmulationPlan]) -> Result:
    """Compute a call by the emulation of its plan's scheme."""
    q, k, v = call.hnd()
    p = call.problem
    out, lse = reference.emulate(q, k, v, call.plan.scheme, is_causal=p.causal, attn_mask=call.mask, sm_scale=p.sm_scale)
    return from_hnd(out, p.layout), lse if p.return_lse else None
