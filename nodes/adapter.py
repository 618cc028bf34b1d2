"""The adapter between ComfyUI's attention call and ours, for dense attention.

`attn_precision` asks for scores in fp32, which ours always are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ..sageattention import KernelMissing, Unsupported, prepare, settings, tracing
from ..sageattention.memo import Memo
from ..sageattention.planning.problem import facts
from ..sageattention.torch_internals import is_dynamo_compiling
from .form import Form, four_dimensional
from .override import SUSPENDED, Attention, Override
from .record import KEY as RECORD
from .schedule import Schedule, Window

if TYPE_CHECKING:
    from ..sageattention.dispatch import Call, Known
    from .guard import Guard
    from .record import Entry, Record
    from .sampling import Step


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
        """As any override's. Most calls are like an earlier one, and many too short for much ado about them."""
        options = kwargs.get("transformer_options")
        if type(options) is dict and len(args) > 1 and not is_dynamo_compiling():
            record = options.get(RECORD)
            if record is not None and SUSPENDED not in options and kwargs.get("low_precision_attention") is not False:
                heads = args[3] if len(args) > 3 else kwargs.get("heads")
                mask = args[4] if len(args) > 4 else kwargs.get("mask")
                found = record.alike(self, options, args[0], args[1], heads, mask is not None)
                if found is not None:
                    like, step = found
                    if not like.variant:
                        record.again(like, step, options)
                        return func(*args, **kwargs)
                    out = self._compute_again(record, like, step, args, kwargs)
                    if out is not None:
                        return out
        return self._call(func, args, kwargs, False)

    def _compute_again(self, record: Record, like: Entry, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The result of a call like one that was computed; None, and no word to the record, where this one is not."""
        try:
            prepared = self.prepare(*args, **kwargs)
            result = None if isinstance(prepared, str) else prepared[0].attempt()
        except (Unsupported, KernelMissing):
            return None
        if result is None:
            return None
        call, form = prepared
        if call.plan is like.plan:
            record.again(like, step, kwargs["transformer_options"])
        else:
            entry = self._open(args, kwargs, False)
            entry.computed(call)
            entry.stands_for_alike(self)
            entry.close()
        return form.give_back(result[0])

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor | None:
        """Our attention's result, or None where the call is left to the attention behind."""
        if self.schedule is not None:
            outside = self.schedule.refusal(entry.sampling, entry.step, entry.layer.block)
            if outside:
                entry.kept(outside)
                return None
        unconditional = self.schedule is None and not contained
        release = functools.partial(_take, args[1], args[2]) if contained else None
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
        key = given, heads, skip_reshape, skip_output_reshape, enable_gqa, settings.state
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
        call = prepare(*form.view(q, k, v), form.layout, sm_scale=scale, attn_mask=four_dimensional(mask), variant=self.variant)
        left = call.left_to_model
        if given is not None:
            self.known[key] = left or (form, call.known)
        return left or (call, form)


def _peeked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*(container.peek() for container in args[:3]), *args[3:])


def _take(*containers: Any) -> None:
    """Let K and V go, which the core has left to us alone."""
    for container in containers:
        container.take()
