"""Where a problem, its plan and its tensors meet: a call is prepared here, and computed by the backend of its plan."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import settings, torch_internals, verify
from .backends import emulation, sdpa
from .backends.call import Backend, KernelBackend, PreparedCall, QuantizedKV, Result, empty_result
from .errors import KernelMissing, TorchOnly, Unsupported
from .memo import Memo
from .planning.here import plan_for, plan_without, warn_once
from .planning.plan import CudaPlan, KernelPlan, Plan
from .planning.problem import Problem, facts
from .tracing import traced as traced  # for `api`
from .tracing import transformed
from .variants import SDPA, TRITON_FP16, Variant

LOG = logging.getLogger("sageattention")


class Known(NamedTuple):
    """What checking and planning a call has found out. It holds for calls that differ from it in nothing but addresses, as long as
    `settings.state` is the same."""

    problem: Problem
    plan: Plan
    bound: dict[Any, Any]  # as `PreparedCall` has it

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Call:
        """Such a call, with its own tensors."""
        return Call(q, k, v, _four_dims(mask), *self)


class Call(PreparedCall[Plan]):
    """One attention call that is checked and planned, to be computed once."""

    __slots__ = ()

    @property
    def known(self) -> Known:
        """For calls like it, before it runs."""
        return Known(self.problem, self.plan, self.bound)

    @property
    def left_to_model(self) -> str:
        """Why the call is left to PyTorch's attention, or to what a model has in its place; "" where a variant of ours computes it."""
        if self.plan.variant is not SDPA:
            return ""
        return "; ".join(f"{candidate}: {reason}" for candidate, reason in self.plan.rejected) or self.plan.reason

    def run(self, release: Callable[[], object] | None = None, *, compiled: bool = False) -> Result:
        """Compute the call: (out in q's layout and dtype, lse [B, H, Nq] fp32 or None).

        Where "auto" chose a variant whose kernel turns out to be missing, its next candidate runs.

        Args:
            release: lets go of the caller's q, k and v, for the call to be the last that has them. It is called once: as soon as nothing
                can make the call fail that leaves it to another attention, else behind it. What nobody else has is used or freed on the
                way, so that memory peaks lower: the output takes q's place, or K and V go before it is allocated.
            compiled: as of `attempt`.

        Raises:
            KernelMissing: the kernel of a variant that was asked for by name.
        """
        result = self.attempt(release, compiled=compiled) or self.compute()
        say_what_runs(self.plan)
        return result

    def attempt(self, release: Callable[[], object] | None = None, *, compiled: bool = False) -> Result | None:
        """As `run`, but None where the call is left to the model, be it that the last kernel of ours turned out to be missing.

        A plan that nobody has tried on such a card is verified first.

        Args:
            compiled: the call is made by a compiled graph, which nothing is to be verified in.
        """
        while self.plan.variant is not SDPA:
            try:
                if self.plan.unverified and not compiled and (plan := verify.verified(self)):
                    self.plan, self.bound = plan, {}
                    continue
                return self.compute(release)
            except KernelMissing as error:
                self.plan, self.bound = plan_without(self.problem, self.plan, error), {}
        return None

    def compute(self, release: Callable[[], object] | None = None) -> Result:
        """By the plan and no other."""
        problem, plan, device = self.problem, self.plan, self.problem.device
        if problem.empty:
            result = empty_result(self.q, problem)
            if release is not None:
                release()
            return result
        if release is not None:
            return self._compute_releasing(plan, release)
        run = _backend(plan.variant).run
        if device == "meta" or not torch.is_autocast_enabled(device):
            return run(self)
        with torch.autocast(device, enabled=False):  # it would narrow fp32 products, and the output
            return run(self)

    def _compute_releasing(self, plan: Plan, release: Callable[[], object]) -> Result:
        problem, mask = self.problem, self.mask
        kernels = plan.variant.name, problem.device_index, problem.head_dim, problem.dtype, problem.mask
        if not isinstance(plan, KernelPlan) or (plan.COMPILES_AT_LAUNCH and kernels not in _compiled):
            result = self.compute()  # nothing to gain, or it may still fail
            _compiled.add(kernels)
            release()
            return result
        backend = kernel_backend(plan.variant)
        backend.load(problem, plan)  # with that no kernel can be missing any more; a launch that fails is an error for good
        self.take_over(release, problem)
        if self.into_q or not self._halves_pay(plan):
            return self.compute()
        kv = backend.quantize(self.k, self.v, problem, plan, mask)
        del self.k, self.v
        return backend.attend(self.q, kv, problem, mask)

    def _halves_pay(self, plan: KernelPlan) -> bool:
        """Whether a call in two halves, K and V freed in between, peaks lower than as a whole: it keeps all heads quantised, where the
        whole call keeps a group or two beside the output. Where K and V stay in shared memory they are too few to matter."""
        if isinstance(plan, CudaPlan) and plan.halves:
            return False
        frees = torch_internals.alone(self.k, self.v) and torch_internals.alone(self.v, self.k)
        return frees and plan.halves_take(self.problem) < self.q.numel() * self.q.element_size()


_ran: set[str] = set()  # variants
_compiled: set[tuple[Any, ...]] = set()  # kernels that ran once, by all that they are compiled for


def say_what_runs(chosen: Plan) -> None:
    """One line at a variant's first call: where a start flag or another program calls, nothing else tells what runs."""
    if chosen.variant.name in _ran:
        return
    _ran.add(chosen.variant.name)
    LOG.info("sageattention: attention runs on %s: %s", chosen.variant.name, chosen.reason)


# By `Variant.backend`; the others are imported when they are first called, because an import statement costs each call a microsecond.
_BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "reference": emulation}


def _backend(variant: Variant) -> Backend:
    return _BACKENDS.get(variant.backend) or kernel_backend(variant)


def kernel_backend(variant: Variant) -> KernelBackend:
    known: Any = _BACKENDS.get(variant.backend)
    if known is None:
        try:
            known = importlib.import_module(f".backends.{variant.backend}.host", __package__)
        except ImportError as error:
            if variant is not TRITON_FP16:
                raise
            # Its kernels are written for other releases than the one that is installed.
            raise KernelMissing(variant.name, f"its kernels can't be imported with the Triton installed here: {error}") from error
        _BACKENDS[variant.backend] = known
    return known


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
    compiled: bool = False,
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
        warn_once(f"torch's own attention computes what {variant} can't: {refusal}")
        return compute(
            q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse,
            variant="sdpa",
        )  # fmt: skip
    return call.run(compiled=compiled)


def _stands_in_torchs_place() -> bool:
    """Whether F.scaled_dot_product_attention has been replaced by a function of `api`, or by a functools.partial of one."""
    placed = torch.nn.functional.scaled_dot_product_attention
    while isinstance(placed, functools.partial):
        placed = placed.func
    return getattr(placed, "__module__", None) == f"{__package__}.api"


# By all that a call's plan depends on. Checking and planning a call takes 15 µs, and a model repeats a handful of calls thousands of times.
_prepared: Memo[tuple[Any, ...], Known] = Memo()


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
        known = Known(problem, plan_for(problem, variant, accum), {})
        if given is not None:
            _prepared[key] = known
    return known.call(q, k, v, attn_mask)


def _four_dims(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.dim() == 4:
        return mask
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _refuse_transforms(name: str) -> None:
    if transformed():
        raise Unsupported(name, "is under torch.jit.trace or a transform of torch.func, which can't follow a call in halves; call sageattn")


def quantize_kv(
    k: torch.Tensor, v: torch.Tensor, tensor_layout: str, variant: str, key_mask: torch.Tensor | None = None
) -> QuantizedKV[Any]:  # fmt: skip
    """The first half of a call: K and V quantised, all heads at once."""
    _refuse_transforms("k")
    problem = Problem.from_kv(k, v, tensor_layout=tensor_layout, key_mask=key_mask)
    try:
        chosen = plan_for(problem, variant)
    except Unsupported as error:
        parameter = {"q": "k", "attn_mask": "key_mask"}.get(error.parameter, error.parameter)
        raise Unsupported(parameter, error.reason) from None
    if not isinstance(chosen, KernelPlan):
        raise Unsupported("variant", f"{chosen.variant.name} ({chosen.reason}) keeps no quantised K and V; name one that does")
    mask = None if key_mask is None else key_mask[:, None, None]
    kv = kernel_backend(chosen.variant).quantize(k, v, problem, chosen, mask)
    return replace(kv, made_on=torch.cuda.current_stream(k.device)) if k.is_cuda else kv


def attend(
    q: torch.Tensor,
    kv: QuantizedKV[Any],
    *,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    attn_mask: torch.Tensor | None,
) -> Result:
    """The second half: q against a `QuantizedKV`."""
    if not isinstance(kv, QuantizedKV):
        raise Unsupported("kv", f"got {type(kv).__name__}, accepted is what quantize_kv returned")
    _refuse_transforms("q")
    problem = kv.problem.with_query(q, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse)
    if problem.empty:
        return empty_result(q, problem)
    kv = replace(kv, plan=plan_for(problem, kv.plan.variant.name, kv.plan.accum))  # this mask's kernel
    if kv.made_on is not None:
        kv.join(torch.cuda.current_stream(q.device))
    return kernel_backend(kv.plan.variant).attend(q, kv, problem, _four_dims(attn_mask))
