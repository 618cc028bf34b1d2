"""What one pass through a model tells the attention calls in it: the latent that the tokens are made of.

Attention calls see tokens only. The latent's shape is known where ComfyUI applies the model: a wrapper there puts a `Forward` into the
pass's `transformer_options`, which models hand on to their attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

KEY = "sageattention_forward"  # in transformer_options
APPLY_MODEL = "apply_model"  # comfy.patcher_extension.WrappersMP.APPLY_MODEL


class Forward(NamedTuple):
    """One pass.

    Attributes:
        latent: shape of the video's or image's latent, [B, C, T, H, W] or [B, C, H, W]; () where it is packed in another way.
        patch: latent frames, rows and columns that make one token; None where the model does not tell.
        text: tokens of the text, and of what else is embedded with it.
        text_last: the model puts the text behind the grid, not before it.
    """

    latent: tuple[int, ...]
    patch: tuple[int, int, int] | None
    text: int = 0
    text_last: bool = False


def announce(model: ModelPatcher) -> None:
    """Have each pass through the model carry its `Forward`."""
    model.remove_wrappers_with_key(APPLY_MODEL, KEY)
    model.add_wrapper_with_key(APPLY_MODEL, KEY, _with_forward)


def _with_forward(
    executor: Callable[..., Any], x: Any, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict[str, Any] | None = None, **conds: Any,
) -> Any:  # fmt: skip
    """An APPLY_MODEL wrapper."""
    network = executor.class_obj.diffusion_model  # type: ignore[attr-defined]
    told = Forward(_latent(x, conds), patch_of(network), _text_tokens(c_crossattn, conds), _text_is_last(network))
    return executor(x, t, c_concat, c_crossattn, control, {**(transformer_options or {}), KEY: told}, **conds)


def patch_of(network: Any) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of the latent that a diffusion model makes one token of; None where it does not tell."""
    if hasattr(network, "patch_spatial"):  # Cosmos
        return getattr(network, "patch_temporal", 1), network.patch_spatial, network.patch_spatial
    size = getattr(network, "patch_size", None)
    if size is None:
        size = getattr(getattr(network, "patchifier", None), "patch_size", None)  # LTX
    if isinstance(size, int):
        return 1, size, size
    if not isinstance(size, (tuple, list)) or len(size) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in size):
        return None
    frames, height, width = (1, *size) if len(size) == 2 else size
    return frames, height, width


def _latent(x: Any, conds: dict[str, Any]) -> tuple[int, ...]:
    packed = conds.get("latent_shapes")  # video and audio in one tensor
    shapes = [tuple(shape) for shape in packed] if packed else [tuple(getattr(x, "shape", ()))]
    return next((shape for shape in shapes if len(shape) == 5), shapes[0] if len(shapes[0]) == 4 else ())


def _text_tokens(text: Any, conds: dict[str, Any]) -> int:
    """Tokens beside the grid in models that attend to both at once: the text, glyphs (ByT5) and an image's embedding (SigLIP)."""
    parts: tuple[Any, ...] = (text, conds.get("txt_byt5"), conds.get("clip_fea"))
    return sum(part.shape[1] for part in parts if getattr(part, "ndim", 0) == 3)


def _text_is_last(network: Any) -> bool:
    """HunyuanVideo's blocks in cores of 2025."""
    blocks: Any = getattr(network, "double_blocks", None)
    return bool(blocks) and bool(getattr(blocks[0], "flipped_img_txt", False))
