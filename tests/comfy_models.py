"""Tiny random diffusion models that really sample in a real ComfyUI, on a CPU in a fraction of a second.

ComfyUI can be set up once per process only, so use this from a process of its own:

    python tests/comfy_models.py COMFYUI_PATH --models wan sd15 --variants reference auto

It prints one `Result` per model and variant, as JSON lines. Weights, noise and conditioning are seeded: two processes see the
same model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

STEPS = 2


@dataclass(frozen=True)
class Workload:
    """One tiny model and how it is sampled. `calls` are its attention calls in `STEPS` steps."""

    network: Callable[[], Any]
    latent: tuple[int, ...]
    conditioning: tuple[int, int, int]
    cfg: float
    calls: int
    masked_tokens: int = 0  # conditioning tokens at the end that an attention mask hides


@dataclass(frozen=True)
class Result:
    """One sampled latent, against the same one by PyTorch's attention.

    Attributes:
        seconds, own_seconds: of the sampling, patched and by PyTorch's attention.
        max_error: what the guard allows, 0 without one.
        relative_l2: distance from the latent by PyTorch's attention, over that latent's norm.
        unchanged: the latent is that of the unpatched model, bit for bit.
        ran, kept, fallbacks: the override's counts, as `nodes.record.Record` describes them.
    """

    model: str
    variant: str
    max_error: float
    device: str
    seconds: float
    own_seconds: float
    relative_l2: float
    unchanged: bool
    finite: bool
    ran: dict[str, int]
    kept: dict[str, int]
    fallbacks: dict[str, int]


def start(comfy_path: str | Path, cpu: bool | None = None) -> None:
    """Make ComfyUI importable and choose its device: by default a GPU where there is one. First thing in a process."""
    import torch

    sys.path.insert(0, str(comfy_path))
    sys.argv = sys.argv[:1]  # ComfyUI reads it while it is imported
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available() if cpu is None else cpu


def _wan() -> Any:
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", dim=256, ffn_dim=512, num_layers=2, num_heads=2, in_dim=16, out_dim=16, text_dim=4096, **_common()
    )  # fmt: skip


def _hunyuan_video() -> Any:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    later = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}  # which cores of 2026 want, too
    known = {field.name for field in fields(HunyuanVideoParams)}
    return HunyuanVideo(
        in_channels=16, out_channels=16, vec_in_dim=None, context_in_dim=64, hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=False,
        byt5=False, meanflow=False, **{name: value for name, value in later.items() if name in known}, **_common(),
    )  # fmt: skip


def _sd15() -> Any:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1], num_heads=8,
        use_spatial_transformer=True, transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1, 1, 1, 1],
        context_dim=768, legacy=False, use_linear_in_transformer=False, **_common(),
    )  # fmt: skip


def _common() -> dict[str, Any]:
    import comfy.ops
    import torch

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


WORKLOADS = {
    # self and cross attention, [B, L, heads·D], heads by keyword
    "wan": Workload(_wan, (1, 16, 1, 8, 8), (1, 8, 4096), 3.0, 8),
    # skip_reshape and a mask; with cfg above 1 this core builds a mask for half of the batch and fails by itself
    "hunyuan_video": Workload(_hunyuan_video, (1, 16, 1, 8, 8), (1, 8, 64), 1.0, 8, masked_tokens=2),
    # head_dim 40, heads by position, cross attention to 77 tokens
    "sd15": Workload(_sd15, (1, 4, 16, 16), (1, 77, 768), 3.0, 28),
}


def state_dict(name: str) -> dict[str, Any]:
    """Seeded weights of a workload's model, fp16, as a checkpoint file would hold them."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def fill(key: str, like: torch.Tensor) -> torch.Tensor:
        if key.endswith("bias"):
            return torch.zeros(like.shape)
        if like.ndim == 1:
            return torch.ones(like.shape)
        return torch.randn(like.shape, generator=generator) / like[0].numel() ** 0.5

    return {key: fill(key, like).half().contiguous() for key, like in WORKLOADS[name].network().state_dict().items()}


def load(name: str) -> Any:
    """A workload's model as ComfyUI's UNETLoader gives it: a ModelPatcher."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(state_dict(name))


def sample(name: str, model: Any) -> tuple[Any, float]:
    """The latent after `STEPS` steps (fp32, on the CPU), and the seconds they took."""
    import comfy.sample
    import torch

    work = WORKLOADS[name]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(work.latent, generator=generator)
    text = torch.randn(work.conditioning, generator=generator)
    extra = {}
    if work.masked_tokens:
        extra["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
        extra["attention_mask"][:, -work.masked_tokens :] = 0
    positive, negative = [[text, extra]], [[torch.zeros_like(text), extra]]
    begun = time.perf_counter()
    out = comfy.sample.sample(
        model, noise, STEPS, work.cfg, "euler", "simple", positive, negative, torch.zeros(work.latent), seed=1, disable_pbar=True
    )
    return out.float().cpu(), time.perf_counter() - begun


def pack_node() -> Any:
    """`PatchSageAttention` as this core is offered it, and the pack it is from."""
    from pack import load_pack

    pack = load_pack()
    if hasattr(pack, "comfy_entrypoint"):
        node = next(n for n in asyncio.run(pack.comfy_entrypoint().get_node_list()) if n.GET_SCHEMA().node_id == "PatchSageAttention")
        return pack, lambda model, variant, **inputs: node.execute(model, variant, **inputs).result[0]
    node = pack.NODE_CLASS_MAPPINGS["PatchSageAttention"]()
    return pack, lambda model, variant, **inputs: node.execute(model, variant, **inputs)[0]


def ready_variants() -> list[str]:
    """The explicit variants that can run on ComfyUI's device."""
    import comfy.model_management

    pack, _ = pack_node()
    device = comfy.model_management.get_torch_device()
    return [a.name for a in pack.sageattention.available_variants(device) if a.status == "ready" and a.name != "sdpa"]


def own_attention(model: Any, function: str) -> Any:
    """A clone of the model that runs on one of the core's own attention functions, by name ("attention_pytorch")."""
    from comfy.ldm.modules import attention

    bare = getattr(attention, function).__wrapped__
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: bare(*args, **kwargs)
    return clone


def compare(name: str, variants: list[str], warm_up: bool = False, max_errors: Sequence[float] = (0.0,)) -> list[Result]:
    """Sample a model by PyTorch's attention, and then with each variant and guard through the node.

    Args:
        warm_up: sample each once more before, so that the seconds hold no loading, compiling or tuning.
    """
    import comfy.model_management
    import torch

    pack, patch = pack_node()
    device = str(comfy.model_management.get_torch_device())
    model = load(name)

    def measure(patched: Any) -> tuple[Any, float]:
        if warm_up:
            sample(name, patched)
        return sample(name, patched)

    exact, own_seconds = measure(own_attention(model, "attention_pytorch"))
    unpatched, _ = measure(model)
    results = []
    for variant, max_error in itertools.product(variants, max_errors):
        patched = patch(model, variant, max_error=max_error)
        record = pack.nodes.slot.owner(patched).record
        out, seconds = measure(patched)
        counts = {what: {why: n // 2 if warm_up else n for why, n in of.items()} for what, of in record.as_dict().items()}
        distance = float((out - exact).norm() / exact.norm())
        same, finite = torch.equal(out, unpatched), bool(out.isfinite().all())
        results.append(Result(name, variant, max_error, device, seconds, own_seconds, distance, same, finite, **counts))
    return results


def sample_wan(comfy_path: str | Path, variants: list[str] | None = None, cpu: bool | None = None) -> list[Result]:
    """Everything in one call, for a fresh process: the tiny WAN model with each variant (default: all that are ready here)."""
    start(comfy_path, cpu)
    return compare("wan", ready_variants() if variants is None else variants, warm_up=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample tiny models in a real ComfyUI, with each variant")
    parser.add_argument("comfy_path")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", help="default: every variant that is ready here")
    parser.add_argument("--max-errors", nargs="+", type=float, default=[0.0], help="guards to sample with; default: none")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--warm-up", action="store_true", help="sample twice, time the second")
    given = parser.parse_args()
    start(given.comfy_path, given.cpu or None)
    for name in given.models:
        for result in compare(name, given.variants or ready_variants(), given.warm_up, given.max_errors):
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
