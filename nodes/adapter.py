"""The adapter between ComfyUI's attention call and ours, for dense attention.

`attn_precision` asks for scores in fp32, which ours always are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from ..sageattention import KernelMissing, Unsupported, prepare, settings, tracing
from ..sageattention.memo import Memo
from ..sageattention.planning.problem import facts
from . import host_time
from .form import Form, four_dimensional
from .override import SUSPENDED, Attention, Override, take
from .record import KEY as RECORD
from .schedule import Schedule, Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..sageattention.dispatch import Call, Known
    from .guard import Guard
    from .record import Entry


FULL_PRECISION = "the model asks for full precision in some layers"


class SageOverride(Override):
    """The override of dense attention.

    What our variant refuses, and what "auto" leaves alone, goes on unchanged to the override that was there before, or else
    to the model's own attention.

    Attributes:
        variant: a name from `sageattention.variants.VARIANTS`, or "auto".
        schedule: the calls that it is for.
        guard: what watches over the error; None where nobody asked.
        known: of calls like earlier ones: their form and what the package knows of them, or why they are left to the model's own attention
            on purpose.
    """

    def __init__(self, variant: str, previous: Attention | None = None, schedule: Schedule | None = None, guard: Guard | None = None):
        super().__init__(previous)
        self.variant = variant
        self.schedule = schedule
        self.guard = guard
        self.known: Memo[tuple[Any, ...], tuple[Form, Known] | str] = Memo()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts with counts of its own."""
        return SageOverride, (self.variant, self.previous, self.schedule, self.guard)

    @property
    def tests_output(self) -> bool:
        return self.guard is not None

    def settings(self) -> dict[str, Any]:
        window, blocks = (self.schedule.window, self.schedule.blocks) if self.schedule else (Window(), None)
        return {
            "node": "PatchSageAttention",
            "variant": self.variant,
            "start_percent": window.start,
            "end_percent": window.end,
            "blocks": str(blocks or ""),
            "max_error": self.guard.max_error if self.guard else 0.0,
        }

    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As any override's.

        Most calls are like an earlier one, and many of them short. Python that runs between the layers of a model is in none of the
        processor's caches, and each function that a call passes through costs it 2 µs, whatever it does: so here is the way of such a call,
        in one piece. The record makes an entry of what it leaves there when somebody asks.
        """
        options = kwargs.get("transformer_options")
        if type(options) is dict and len(args) > 1 and not is_compiling():
            get: Callable[[str], Any] = options.get
            record = get(RECORD)
            step = record.sampling.current if record is not None and SUSPENDED not in options else None
            if step is not None and get("sigmas") is step.sigmas and get("cond_or_uncond") is step.pass_:
                q, heads = args[0], args[3] if len(args) > 3 else kwargs.get("heads")
                masked = (args[4] if len(args) > 4 else kwargs.get("mask")) is not None
                exact = kwargs.get("low_precision_attention") is False
                try:
                    like = record.alike.get((self, q.shape, args[1].shape, q.dtype, q.device, heads, masked, exact))
                except TypeError:  # symbolic sizes have no hash
                    like = None
                if like is not None and not (step.timed and like.times_another()):
                    out = None
                    if like.variant:
                        out, like = self._compute_again(like, args, kwargs)
                    if out is not None or not like.variant:
                        number, step.calls = step.calls, step.calls + 1
                        record.calls.append(
                            (like, step, number, get("block"), get("block_type"), get("block_index"), get("transformer_index"))
                        )
                        return func(*args, **kwargs) if out is None else out
        return self._call(func, args, kwargs, False)

    def _compute_again(self, like: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, Entry]:
        """The result of a call like one that was computed, and the entry that it is like; None where it has to be opened as any other."""
        try:
            prepared = self.prepare(*args, **kwargs)
            if isinstance(prepared, str):
                return None, like
            call, form = prepared
            result = call.attempt()
        except (Unsupported, KernelMissing):
            return None, like
        if result is None:
            return None, like
        if call.plan is not like.plan:  # its kernel was found missing just now
            like = copy.copy(like)
            like.planned(call)
        return form.give_back(result[0]), like

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor | None:
        """Our attention's result, or None where the call is left to the attention behind."""
        if self.schedule is not None:
            outside = self.schedule.refusal(entry.sampling, entry.step, entry.layer.block)
            if outside:
                entry.kept(outside)
                return None
        unconditional = self.schedule is None and not contained
        release = functools.partial(take, args[:3]) if contained else None
        try:
            prepared = self.prepare(*(_peeked(args) if contained else args), **kwargs)
            if isinstance(prepared, str):
                entry.kept(prepared)
                if unconditional and self.previous is None and prepared is not FULL_PRECISION:
                    entry.stands_for_alike(self)
                return None
            call, form = prepared
            if self.guard is not None:
                out = self.guard.run(entry, call, release)
                return None if out is None else form.give_back(out)
            result = call.attempt(release)
            if result is None:  # the kernel of the last candidate was found missing just now
                entry.kept(call.left_to_model)
                return None
        except (Unsupported, KernelMissing) as error:
            entry.fell_back(str(error))
            return None
        entry.computed(call)
        if unconditional:
            entry.stands_for_alike(self)
        return form.give_back(result[0])

    def prepare(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int | None = None,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        low_precision_attention: bool = True,
        **others: Any,
    ) -> tuple[Call, Form] | str:
        """The call as our package takes it, or why it is left to the model's own attention on purpose; nothing runs.

        Raises:
            Unsupported, KernelMissing: our variant can't do this call.
        """
        given = facts(q, k, v, mask, "", False, scale, False)
        key = given, heads, skip_reshape, skip_output_reshape, enable_gqa, self.previous is None, settings.state
        try:
            known = self.known.get(key)
        except TypeError:  # symbolic sizes have no hash
            known = given = None
        if low_precision_attention is False:
            return FULL_PRECISION
        if isinstance(known, str):
            return known
        if tracing.transformed():
            raise Unsupported("q", "torch.jit.trace or a torch.func transform is at work, which only torch's own attention can follow")
        if known is not None:
            form, of_such = known
            return of_such.call(*form.view(q, k, v), four_dimensional(mask)), form
        if tracing.needs_grad(q, k, v):
            raise Unsupported("q", "a gradient is asked for, and quantised attention has none; training needs the model's own")
        form = Form.of(q, k, v, heads, skip_reshape, skip_output_reshape, enable_gqa)
        named = functools.partial(prepare, *form.view(q, k, v), form.layout, sm_scale=scale, attn_mask=four_dimensional(mask))
        call = named(variant=self.variant)
        left = call.left_to_model
        # What another pack has in the slot behind ours is not the core's function, whose host time is known.
        if left and self.variant == "auto" and self.guard is None and self.previous is None:
            shorter = host_time.shorter(call.plan)
            if shorter is not None:
                with contextlib.suppress(Unsupported, KernelMissing):  # then the call is left to the model, as it would have been
                    call = named(variant=shorter.variant, pv_accum_dtype=shorter.accum)
                    left = ""
        if given is not None:
            self.known[key] = left or (form, call.known)
        return left or (call, form)


def _peeked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*(container.peek() for container in args[:3]), *args[3:])
