"""The `reference` variant: the INT8 / FP16 numerics in plain PyTorch."""

from __future__ import annotations

from ..numerics import reference
from .call import Call, Result, from_hnd, to_hnd


def run(call: Call) -> Result:
    """Compute a call by the emulation of its plan's scheme."""
    q, k, v = to_hnd(call)
    p = call.problem
    out, lse = reference.emulate(q, k, v, call.plan.scheme, is_causal=p.causal, attn_mask=call.mask, sm_scale=p.sm_scale)
    return from_hnd(out, call), lse if p.return_lse else None
