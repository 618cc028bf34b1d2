"""The override that runs a model's long self attention on `sageattn_sparse`, and hands everything else on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..sageattention import KernelMissing, Unsupported, sageattn_sparse, tracing
from ..sageattention import settings as environment
from ..sageattention.layout import to_hnd
from ..sageattention.memo import Memo
from ..sageattention.sparse_dispatch import prepare, variant_of
from . import grid, key_masks, vsa
from .budgets import Budgets
from .form import Form
from .forward import KEY as FORWARD
from .override import Attention, Override, take
from .progress import short
from .record import Entry, record_of
from .shares import Shares
from .sparse_layout import Layout, lay_out
from .sparse_settings import AUTO, METHODS, Settings

NODE = "SageSparseAttention"
SLOT = "optimized_attention_override"  # in transformer_options
CORE_MODULE = "comfy_extras.", "sparse_attention"  # how the module of ComfyUI's own sparse override begins, and what its name holds
MAX_LAYOUTS = 16  # the order or the mask of a long video takes megabytes


class SparseOverride(Override):
    """An attention override for one patched model.

    Attributes:
        chosen: what the node is set to.
    """

    RANK = 1  # it leaves calls to the dense override, which would take all

    def __init__(self, chosen: Settings, previous: Attention | None = None):
        super().__init__(previous)
        self.chosen = chosen
        self._forms: Memo[tuple[Any, ...], tuple[Form, str] | str] = Memo()
        self._layouts: Memo[tuple[Any, ...], tuple[Layout | str, str]] = Memo(MAX_LAYOUTS)
        self._budgets = Budgets()
        self._shares: tuple[object, dict[torch.device, Shares]] = None, {}  # of a sampling, by device

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts with nothing measured."""
        return SparseOverride, (self.chosen, self.previous)

    def settings(self) -> dict[str, Any]:
        return {"node": NODE, **self.chosen.as_inputs()}

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor | None:
        """The result of a long self-attention call; None for every other call."""
        tensors = [container.peek() for container in args[:3]] if contained else list(args[:3])
        release = functools.partial(take, args[:3]) if contained else None
        try:
            out = self._run(entry, tensors, release, *args[3:], **kwargs)
        except (Unsupported, KernelMissing) as refusal:
            entry.fell_back(str(refusal), NODE)
            return None
        if isinstance(out, torch.Tensor):
            return out
        if isinstance(self.previous, Override):
            entry.pass_on(out)
        else:
            entry.kept(out, NODE)
        return None

    def _run(
        self, entry: Entry, qkv: list[torch.Tensor], release: Callable[[], None] | None, heads: int | None = None,
        mask: torch.Tensor | None = None, attn_precision: torch.dtype | None = None, skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None, enable_gqa: bool = False, low_precision_attention: bool = True,
        transformer_options: dict[str, Any] | None = None, **others: Any,
    ) -> torch.Tensor | str:  # fmt: skip
        """The result, or why the call is not sparse.

        Args:
            qkv: emptied where they came in containers, and the call is prepared that takes them over.
            release: lets go of the containers that they came in; None where there are none.
        """
        shape, dtype, device = qkv[0].shape, qkv[0].dtype, qkv[0].device
        key = (
            shape, qkv[1].shape, qkv[2].shape, dtype, device, heads, skip_reshape, skip_output_reshape, enable_gqa,
            low_precision_attention, environment.state,
        )  # fmt: skip
        try:
            known = self._forms.get(key)
        except TypeError:
            return "its sizes are symbolic"
        if known is None:
            known = self._forms[key] = self._new_form(qkv, heads, skip_reshape, skip_output_reshape, enable_gqa, low_precision_attention)
        if isinstance(known, str):
            return known
        form, variant = known
        options = transformer_options if isinstance(transformer_options, dict) else {}
        layout, unknown = self._layout(shape[-2], options, device)
        if unknown:
            self._remark(options, f"Tokens keep their own order: {unknown}.")
        if isinstance(layout, str):
            return layout
        shares = self._shares_of(entry)
        dense = self._dense_here(entry, options, shares)
        if dense:
            if self.chosen.method == "budget" and self._budgets.due(entry, self.chosen.window, options):
                q, k = (to_hnd(t, form.layout) for t in form.view(*qkv)[:2])
                self._budgets.measure(entry.layer.name, options, q, k, scale, layout.order)
            return dense
        key_mask = key_masks.of_mask(mask)
        if isinstance(key_mask, str):
            return key_mask
        if tracing.transformed():
            return "torch.jit.trace or a torch.func transform is at work, which only torch's own attention can follow"
        if layout.tiles is not None:
            if key_mask is not None:
                raise Unsupported("mask", "vsa takes none")
            out, share = vsa.attend(
                *form.view(*qkv), form.layout, layout.tiles, self.chosen.threshold, scale, self.chosen.variant, options
            )  # fmt: skip
            if release is not None:
                release()
        else:
            if key_mask is not None:
                key_mask = key_mask.expand(shape[0], -1).contiguous()
            arguments = self._arguments(entry, options, to_hnd(form.view(*qkv)[0], form.layout), layout, scale)
            out, share = _compute(form, qkv, release, key_mask=key_mask, **arguments)
        shares.note(entry.layer.name, share)
        entry.ran(f"sparse {short(variant)}", kernel=f"{self.chosen.named}, {layout.name}", share=share, node=NODE)
        if self.chosen.verbose:
            shown = "x".join(map(str, shape))
            self._remark(options, f"Sparse: q {shown}, {self.chosen.named}, {layout.name}, exact for all {layout.sinks}.")
        return form.give_back(out)

    def _arguments(
        self, entry: Entry, options: dict[str, Any], q: torch.Tensor, layout: Layout, scale: float | None
    ) -> dict[str, Any]:  # fmt: skip
        """Of `sageattn_sparse`, by what is set; q: [B, H, N, D]."""
        method = METHODS[self.chosen.method]
        threshold: dict[str, Any] = {}
        if method.threshold is not None:
            threshold[method.threshold] = self._threshold(entry.layer.name, options, q)
        return {
            "sm_scale": scale, "variant": self.chosen.variant, "selection": method.selection, "order": layout.order,
            "sinks": layout.sinks, "query_sinks": layout.query_sinks, "block_mask": layout.block_mask, **threshold,
        }  # fmt: skip

    def _threshold(self, layer: str, options: dict[str, Any], q: torch.Tensor) -> float | torch.Tensor:
        if self.chosen.method != "budget":
            return self.chosen.threshold
        measured = self._budgets.of(layer, options, q, self.chosen.threshold)
        if measured is None:
            self._remark(options, "Every head has the same budget, for no dense step came before; a start_percent above 0 makes one.")
            return self.chosen.threshold
        return measured

    def _new_form(
        self, qkv: list[torch.Tensor], heads: int | None, skip_reshape: bool, skip_output_reshape: bool, enable_gqa: bool,
        low_precision_attention: bool,
    ) -> tuple[Form, str] | str:  # fmt: skip
        """How such calls are viewed, and the variant that runs them; or why they are never sparse."""
        q, k, v = qkv
        dense = self._dense_shape(q, k, low_precision_attention)
        if dense:
            return dense
        form = Form.of(q, k, v, heads, skip_reshape, skip_output_reshape, enable_gqa)
        return form, variant_of(*form.view(q, k, v), form.layout, self.chosen.variant)

    def _dense_shape(self, q: torch.Tensor, k: torch.Tensor, low_precision_attention: bool) -> str:
        """Why calls of this shape are never sparse; "" where they may be."""
        if low_precision_attention is False:
            return "the model asks for full precision in some layers"
        if q.shape[-2] != k.shape[-2]:
            return "queries and keys are not the same tokens (cross attention)"
        if q.shape[-2] < self.chosen.min_tokens:
            return f"under {self.chosen.min_tokens:,} tokens (min_tokens)"
        if self.chosen.variant == AUTO and q.device.type != "cuda":
            return "block-sparse kernels are for NVIDIA GPUs"
        return ""

    def _shares_of(self, entry: Entry) -> Shares:
        """Those of the entry's sampling on its device. Devices that share the work call from threads of their own, any of which may begin
        the sampling here: a call keeps what it found."""
        sampling, shares = self._shares
        if sampling is not entry.sampling:
            sampling, shares = self._shares = entry.sampling, {}
        return shares.get(entry.device) or shares.setdefault(entry.device, Shares(entry.device))

    def _dense_here(self, entry: Entry, options: dict[str, Any], shares: Shares) -> str:
        """Why a long call is dense at this step and in this layer; "" where it is sparse."""
        module = getattr(options.get(SLOT), "__module__", "")
        if module.startswith(CORE_MODULE[0]) and CORE_MODULE[1] in module:
            return "ComfyUI's Model Sparse Attention is on top, and what it leaves dense stays dense"
        outside = self.chosen.window.outside(entry.sampling, entry.step)
        if outside:
            return outside
        if self.chosen.dense_blocks:
            if entry.layer.block is None:
                self._remark(options, "This model does not report its blocks, so dense_blocks has no effect.")
            elif entry.layer.block in self.chosen.dense_blocks:
                return f"the block is among dense_blocks ({self.chosen.dense_blocks})"
        shares.begin(entry.step)
        crowded = shares.crowded.get(entry.layer.name)
        return "" if crowded is None else f"{crowded:.0%} of the blocks were needed, too many to gain"

    def _layout(self, tokens: int, options: dict[str, Any], device: torch.device) -> tuple[Layout | str, str]:
        """How the tokens are laid out, or why they can't be; and why their grid is not known, "" where it is."""
        h3 = options.get("minimax_h3_layout")
        key = tokens, device, options.get(FORWARD), None if h3 is None else (*h3.signature, *h3.segments)
        known = self._layouts.get(key)
        if known is None:
            found = grid.find(tokens, options)
            known = self._layouts[key] = lay_out(found, self.chosen, device), found if isinstance(found, str) else ""
        return known

    def _remark(self, options: dict[str, Any], sentence: str) -> None:
        """Tell, once a sampling, what is no single call's, in a sentence."""
        record_of(options, self.record).note(sentence, NODE)


def _compute(
    form: Form, qkv: list[torch.Tensor], release: Callable[[], None] | None, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The result in `form.layout`, and the share of the blocks that were computed.

    Args:
        qkv, release: as of `SparseOverride._run`.
        arguments: of `sageattn_sparse`.
    """
    if release is None:
        return sageattn_sparse(*form.view(*qkv), tensor_layout=form.layout, return_share=True, **arguments)  # type: ignore[return-value]
    call = prepare(*form.view(*qkv), tensor_layout=form.layout, **arguments)
    qkv.clear()
    out, _, share = call.run(release)
    return out, share
