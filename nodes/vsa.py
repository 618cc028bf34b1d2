"""Video Sparse Attention (arXiv:2505.13389) for MiniMax H3 checkpoints that are trained with it.

Its coarse branch is gated by a layer of the checkpoint that reads what the attention reads, which no override sees. So each block is
patched to bring the gate along in `transformer_options`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..sageattention import sageattn_sparse
from ..sageattention.block_order import BLOCK, VsaTiles
from ..sageattention.layout import AXES

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

GATE = "sageattention_vsa_gate"  # in transformer_options: computes the gate [N, H·D]
PLACE = "dit", "double_block"  # of a block's replacement in ComfyUI's patches


def bring_gates(model: ModelPatcher) -> None:
    """Patch the blocks of a FastH3 checkpoint so that attention calls carry their gate.

    Raises:
        ValueError: another model, with a sentence for the user.
    """
    blocks = getattr(model.get_model_object("diffusion_model"), "blocks", ())
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    if not attentions or not all(hasattr(attention, "to_gate_compress") for attention in attentions):
        raise ValueError("selection vsa is for FastH3 checkpoints of MiniMax H3, which are trained for it; choose mass for this model.")
    if attentions[0].to_gate_compress is None:
        raise ValueError("selection vsa needs a FastH3 checkpoint: this one of MiniMax H3 has no gate layers; choose mass for it.")
    patches = model.model_options["transformer_options"].get("patches_replace", {}).get(PLACE[0], {})
    for i, attention in enumerate(attentions):
        below = patches.get((PLACE[1], i))
        if not isinstance(below, _Gated):  # of a sparse node before
            model.set_model_patch_replace(_Gated(attention, below), *PLACE, i)


class _Gated:
    """A block's replacement: the block as it is, or as the replacement `below` has it, with the gate in its attention's options."""

    def __init__(self, attention: Any, below: Callable[..., Any] | None):
        self.attention, self.below = attention, below

    def __deepcopy__(self, memo: dict[int, Any]) -> _Gated:
        return self

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        run = args.get("attention") or self.attention

        def attention(x: torch.Tensor, *, transformer_options: dict[str, Any], **others: Any) -> torch.Tensor:
            gate = functools.partial(self.attention.to_gate_compress, x)
            return run(x, transformer_options={**transformer_options, GATE: gate}, **others)

        args = {**args, "attention": attention}
        return extra["original_block"](args) if self.below is None else self.below(args, extra)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, tiles: VsaTiles, keep: float, sm_scale: float | None, variant: str,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention in tiles: the result in q's shape and layout, and the share of the blocks computed."""
    tokens = AXES[layout][1]
    gate = None
    if GATE in options:
        gate = options[GATE]().view(1, -1, q.shape[AXES[layout][0]], q.shape[-1])
        gate = tiles.pad(gate if layout == "NHD" else gate.transpose(1, 2), tokens)
    tiled = (tiles.pad(t, tokens) for t in (q, k, v))
    prefix = tiles.prefix_slots
    out, share = sageattn_sparse(
        *tiled, tensor_layout=layout, selection="topk", keep=keep, q_block=BLOCK, neighbours=-1, tail=False, block_len=tiles.block_len,
        sinks=prefix, query_sinks=prefix, coarse_gate=gate, sm_scale=sm_scale, variant=variant, return_share=True,
    )  # fmt: skip
    return tiles.unpad(out, tokens), share
