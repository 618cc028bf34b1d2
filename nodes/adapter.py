"""The adapter between ComfyUI's attention call and ours, for dense attention.

`attn_precision` asks for scores in fp32, which ours always are.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

from ..sageattention import KernelMissing, Unsupported, prepare, settings, tracing
from ..sageattention.memo import Memo
from ..sageattention.planning.problem import facts
from .form import Form, four_dimensional
from .override import SUSPENDED, Attention, Override
from .record import record_of
from .schedule import Schedule, Window

if TYPE_CHECKING:
    from ..sageattention.dispatch import Call, Known
    from .guard import Guard
    from .record import Entry


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
        kept: an entry for each of the latter.
    """

    def __init__(self, variant: str, previous: Attention | None = None, schedule: Schedule | None = None, guard: Guard | None = None):
        super().__init__(previous)
        self.variant = variant
        self.schedule = schedule
        self.guard = guard
        self.known: Memo[tuple[Any, ...], tuple[Form, Known] | str] = Memo()
        self.kept: Memo[tuple[Any, ...], Entry] = Memo()

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
        """As any override's. Calls like one that was kept are most of some models' calls, and too short for much ado about them."""
        if self.kept and not torch.compiler.is_compiling():
            try:
                like = self.kept.get(_key(*args, **kwargs))
            except TypeError:  # symbolic sizes have no hash
                like = None
            if like is not None:
                options = kwargs.get("transformer_options")
                if type(options) is dict and SUSPENDED not in options and record_of(options, self.record).again(like, options):
                    previous = self.previous
                    return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)
        return self._call(func, args, kwargs, False)

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor | None:
        """Our attention's result, or None where the call is left to the attention behind."""
        if self.schedule is not None:
            outside = self.schedule.refusal(entry.sampling, entry.step, entry.layer.block)
            if outside:
                entry.kept(outside)
                return None
        release = functools.partial(_take, args[1], args[2]) if contained else None
        try:
            prepared = self.prepare(*(_peeked(args) if contained else args), **kwargs)
            if isinstance(prepared, str):
                entry.kept(prepared)
                if self.schedule is None and not contained and entry.reasons == (prepared,):
                    with contextlib.suppress(TypeError):  # symbolic sizes have no hash
                        self.kept[_key(*args, **kwargs)] = entry
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
            return "the model asks for full precision in some layers"
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


def _key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int | None = None,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    enable_gqa: bool = False,
    low_precision_attention: bool = True,
    **others: Any,
) -> tuple[Any, ...]:
    """All that decides whether a call is kept: v is as k in every model, and where it is not the model's own attention is right, too."""
    return (
        q.shape, k.shape, q.dtype, q.device, None if mask is None else (mask.shape, mask.dtype),
        heads, skip_reshape, skip_output_reshape, enable_gqa, low_precision_attention, settings.state,
    )  # fmt: skip


def _peeked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*(container.peek() for container in args[:3]), *args[3:])


def _take(*containers: Any) -> None:
    """Let K and V go, which the core has left to us alone."""
    for container in containers:
        container.take()
