"""Runs a plan: the one place where a problem, its plan and its tensors meet."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import settings
from .backends import emulation, sdpa
from .backends.call import Call, Result, result_like
from .device import capability
from .device.capability import Capability
from .errors import KernelMissing, TorchOnly, Unsupported
from .kernels import binaries
from .planning import calibration, varlen
from .planning.plan import GROUPS_ALIVE, Plan, plan
from .planning.problem import Problem, facts
from .planning.problem import needs_grad as needs_grad  # for the adapter
from .tracing import traced as traced  # for `api`
from .tracing import transformed
from .variants import TRITON_FP16, VARIANTS

if TYPE_CHECKING:
    from types import ModuleType

    from .backends.triton.host import QuantizedKV


LOG = logging.getLogger("sageattention")


def compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tensor_layout: str,
    is_causal: bool,
    attn_mask: torch.Tensor | None,
    sm_scale: float | None,
    return_lse: bool,
    variant: str,
    accum: str = "",
) -> Result:
    """One attention call: `prepare` and `run`, and torch's own attention where it is the one that can.

    "auto" leaves to it tensors that no variant reads. A variant by name refuses what it can't do, unless it stands in torch's place:
    then the model calls it for everything, and torch's own attention does what it can't, which is said once per reason.

    Raises:
        Unsupported, KernelMissing: as `prepare`.
    """
    try:
        call = prepare(
            q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse,
            variant=variant, accum=accum,
        )  # fmt: skip
    except Unsupported as refusal:
        if variant in ("auto", "sdpa"):
            if not isinstance(refusal, TorchOnly) or tensor_layout != "HND" or return_lse:
                raise
            return sdpa.by_torch_alone(q, k, v, attn_mask, is_causal, sm_scale), None
        if not _stands_in_torchs_place():
            raise
        _warn_once(f"torch's own attention computes what {variant} can't: {refusal}")
        return compute(
            q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse,
            variant="sdpa",
        )  # fmt: skip
    return run(call)


def _stands_in_torchs_place() -> bool:
    """Whether F.scaled_dot_product_attention has been replaced by a function of `api`, or by a functools.partial of one."""
    placed = torch.nn.functional.scaled_dot_product_attention
    while isinstance(placed, functools.partial):
        placed = placed.func
    return getattr(placed, "__module__", None) == f"{__package__}.api"


# (problem, plan, forms) of the calls that were prepared before, by all that they depend on: a model repeats a handful of calls
# thousands of times, and checking and planning one anew costs 15 µs.
_prepared: dict[tuple, tuple[Problem, Plan, dict]] = {}
MAX_PREPARED = 4096


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tensor_layout: str,
    is_causal: bool,
    attn_mask: torch.Tensor | None,
    sm_scale: float | None,
    return_lse: bool,
    variant: str,
    accum: str = "",
) -> Call:
    """Validate a call and plan it; nothing runs.

    Raises:
        Unsupported, KernelMissing: as `Problem.from_tensors` and `plan`.
    """
    given = facts(q, k, v, attn_mask, tensor_layout, is_causal, sm_scale, return_lse)
    key = given, variant, accum, settings.state
    try:
        known = _prepared.get(key)
    except TypeError:  # symbolic sizes have no hash
        known = given = None
    if known is None:
        problem = Problem.from_tensors(
            q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse
        )
        known = problem, plan_for(problem, variant, accum), {}
        if given is not None:
            if len(_prepared) >= MAX_PREPARED:
                _prepared.clear()
            _prepared[key] = known
    return Call(q, k, v, _four_dims(attn_mask), *known)


def _four_dims(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.dim() == 4:
        return mask
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _refuse_transforms(name: str) -> None:
    if transformed():
        raise Unsupported(name, "is under torch.jit.trace or a transform of torch.func, which can't follow a call in halves; call sageattn")


def plan_for(problem: Problem, variant: str, accum: str = "") -> Plan:
    """`plan()` for the machine at hand, honouring `SAGEATTENTION_ARCH` and, for "auto", `SAGEATTENTION_VARIANT`.

    A variable that names no variant, or one that can't do this call, is told once, and "auto" chooses.
    """
    for name, given in (("variant", variant), ("pv_accum_dtype", accum)):
        if not isinstance(given, str):
            raise Unsupported(name, f"got {given!r}, accepted is a name")
    named = settings.read("SAGEATTENTION_VARIANT") if variant == "auto" else ""
    if named and named != "auto":
        try:
            return _plan_named(problem, named, accum)
        except (Unsupported, KernelMissing) as error:
            _warn_once(f"SAGEATTENTION_VARIANT is {named!r}, which can't be had for this call, so 'auto' chooses: {error}")
    return _plan_here(problem, variant, accum)


def _plan_named(problem: Problem, variant: str, accum: str) -> Plan:
    """By the variant that the environment names; a call's own accumulator counts where that variant has it."""
    return _plan_here(problem, variant, accum if variant in VARIANTS and accum in VARIANTS[variant].accum else "")


def _plan_here(problem: Problem, variant: str, accum: str) -> Plan:
    card = machine(problem)
    known = calibration.of_card(card) if variant == "auto" else None
    arch, ptx = binaries.forced()
    return plan(problem, card, variant, accum, arch, known, ptx, _absent.get(problem, ()) if _absent else ())


# What "auto" chose for a problem and then could not have, as `plan` takes it: it is passed by from then on.
_absent: dict[Problem, tuple[tuple[str, str], ...]] = {}


def without(call: Call, error: KernelMissing) -> Call:
    """The call as "auto" plans it once its choice's kernel was found missing.

    Raises:
        KernelMissing: `error`, where the variant was asked for by name.
    """
    if not call.plan.auto:
        raise error
    if len(_absent) >= 4096:
        _absent.clear()
    candidate = f"{call.plan.variant.name}:{call.plan.accum}".rstrip(":")
    _absent[call.problem] = (*_absent.get(call.problem, ()), (candidate, error.reason))
    settings.planned_anew()
    _warn_once(f"auto passes by {candidate}: {error.reason}")
    return call._replace(plan=plan_for(call.problem, "auto"), forms={})


@functools.cache
def _warn_once(message: str) -> None:
    LOG.warning("sageattention: %s", message)


def machine(problem: Problem) -> Capability:
    """The capability of the device a problem's tensors are on."""
    return capability.of_device(problem.device, problem.device_index)


def run(call: Call) -> Result:
    """Compute a prepared call: (out in q's layout and dtype, lse [B, H, Nq] fp32 or None).

    Where "auto" chose a variant whose kernel turns out to be missing, its next candidate runs.
    """
    try:
        result = run_planned(call)
    except KernelMissing as error:
        return run(without(call, error))
    if call.plan.variant.name not in _ran:
        _say_what_runs(call.plan)
    return result


_ran: set[str] = set()


def _say_what_runs(chosen: Plan) -> None:
    """One line at a variant's first call: where a start flag or another program calls, nothing else tells what runs."""
    _ran.add(chosen.variant.name)
    LOG.info("sageattention: attention runs on %s: %s", chosen.variant.name, chosen.reason)


def run_planned(call: Call) -> Result:
    """The same by the call's plan and no other.

    Raises:
        KernelMissing: its kernel can't be had.
    """
    if call.problem.empty:
        return _empty(call.q, call.problem)
    runner = _RUNNERS[call.plan.variant.backend]
    device = call.problem.device
    if device == "meta" or not torch.is_autocast_enabled(device):
        return runner(call)
    with torch.autocast(device, enabled=False):  # it would narrow fp32 products, and the output
        return runner(call)


def _empty(q: torch.Tensor, problem: Problem) -> Result:
    out, lse = result_like(q, problem)
    return out.zero_(), None if lse is None else lse.fill_(-torch.inf)


def _triton_host() -> ModuleType:
    try:
        from .backends.triton import host
    except ImportError as error:  # of another release than this code is written for
        raise KernelMissing(TRITON_FP16.name, f"its kernels can't be imported with the Triton installed here: {error}") from error
    return host


def _run_triton(call: Call) -> Result:
    return _triton_host().run(call)


def _run_cuda(call: Call) -> Result:
    from .backends.cuda import host

    _RUNNERS["cuda"] = host.run  # an import statement in a function costs each call a microsecond
    return host.run(call)


_RUNNERS = {"sdpa": sdpa.run, "reference": emulation.run, "triton": _run_triton, "cuda": _run_cuda}


def run_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool,
    sm_scale: float | None,
) -> torch.Tensor:
    """`sageattn_varlen`: through the Triton variant, the one that reads packed sequences in place."""
    problem = Problem.from_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=is_causal, sm_scale=sm_scale)
    chosen = plan_for(problem, TRITON_FP16.name)
    varlen.check("cu_seqlens_q", cu_seqlens_q, "q", q.shape[0], "max_seqlen_q", problem.len_q)
    varlen.check("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0], "max_seqlen_k", problem.len_kv)
    if problem.empty:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    triton = _triton_host()
    offsets = triton.Packed(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())  # the kernels know no strides of theirs
    out = triton.run_packed(q, k, v, offsets, problem, chosen)
    if chosen.variant.name not in _ran:
        _say_what_runs(chosen)
    return out


def quantize_kv(
    k: torch.Tensor, v: torch.Tensor, tensor_layout: str, variant: str, key_mask: torch.Tensor | None = None
) -> QuantizedKV:  # fmt: skip
    """The first half of a call: K and V quantised, all heads at once."""
    _refuse_transforms("k")
    problem = Problem.from_kv(k, v, tensor_layout=tensor_layout, key_mask=key_mask)
    try:
        chosen = plan_for(problem, variant)
    except Unsupported as error:
        parameter = {"q": "k", "attn_mask": "key_mask"}.get(error.parameter, error.parameter)
        raise Unsupported(parameter, error.reason) from None
    return quantize_planned(k, v, None if key_mask is None else key_mask[:, None, None], problem, chosen)


def quantize_planned(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, problem: Problem, chosen: Plan) -> QuantizedKV:
    """The same by a plan that is made already. Keys that `mask`, which is the problem's, hides from every query take no part.

    Raises:
        Unsupported: its variant has no halves.
    """
    if chosen.variant.backend == "cuda":
        from .backends.cuda import host

        return host.quantize(k, v, mask, problem, chosen)
    if chosen.variant.backend != "triton":
        raise Unsupported("variant", f"{chosen.variant.name} ({chosen.reason}) keeps no quantised K and V; name one that does")
    return _triton_host().quantize_all(k, v, mask, problem, chosen)


def attend(
    q: torch.Tensor,
    kv: QuantizedKV,
    *,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    attn_mask: torch.Tensor | None,
) -> Result:
    """The second half: q against a `QuantizedKV`."""
    if not hasattr(kv, "problem"):
        raise Unsupported("kv", f"got {type(kv).__name__}, accepted is what quantize_kv returned")
    _refuse_transforms("q")
    problem = kv.problem.with_query(q, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse)
    if problem.empty:
        return _empty(q, problem)
    kv = replace(kv, plan=plan_for(problem, kv.plan.variant.name, kv.plan.accum))  # this mask's kernel
    if kv.plan.variant.backend == "cuda":
        from .backends.cuda import host

        return host.attend_all(q, kv, problem, _four_dims(attn_mask))
    return _triton_host().attend_all(q, kv, problem, _four_dims(attn_mask))


def halves_save_memory(call: Call) -> bool:
    """Whether a call in two halves, K and V freed in between, peaks lower than as a whole: it keeps all heads quantised, where the whole
    call keeps a group or two beside the output."""
    p, chosen = call.problem, call.plan
    backend, heads = chosen.variant.backend, p.batch * p.heads_kv
    if backend not in GROUPS_ALIVE or p.empty:
        return False
    head = p.len_kv * chosen.scheme.kv_bytes(chosen.head_dim)
    alive = min(heads, chosen.heads_per_group * GROUPS_ALIVE[backend])
    return (heads - alive) * head < call.q.numel() * call.q.element_size()
