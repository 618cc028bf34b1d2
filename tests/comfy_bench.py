"""Time a step of today's models in a real ComfyUI: with PyTorch's attention, with the node, with its guard, with the sparse node.

    python tests/comfy_bench.py COMFYUI_PATH --models wan_720p flux_1024 --attentions pytorch node sparse

The networks have their models' real width and few layers, and random weights: enough for times, not for pictures. In a round every
attention takes its turn twice, the second time in reverse order (ABBA), each round begins with another one, and the median of all steps
counts. `--smoke` cuts the latents to a few tokens and each network to a block, to see on a CPU that all of it runs. One JSON line a
model, then a table.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
import comfy_models

SEED = 1
POOL = (1 << 24) + 43  # random numbers that all weights are cut from: odd, so that rows don't repeat
ATTENTIONS = ("pytorch", "node", "guard", "sparse")
MAX_ERROR = 0.05


@dataclass(frozen=True)
class Model:
    """A network and how it is sampled.

    Attributes:
        network: makes it, without weights; its argument are the blocks.
        conditioning: shape [1, tokens, channels] of the text's.
        pooled: channels of the pooled text's, 0 for none.
        hidden: tokens at the text's end that a mask hides.
    """

    network: Callable[[int], Any]
    blocks: int
    latent: tuple[int, ...]
    conditioning: tuple[int, int, int]
    pooled: int = 0
    hidden: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def smoke(self) -> Model:
        """One block, and as few tokens as it works with."""
        small = (*self.latent[:2], *(min(n, 1 if i == 0 and len(self.latent) == 5 else 8) for i, n in enumerate(self.latent[2:])))
        return Model(self.network, 1, small, (1, 16, self.conditioning[2]), self.pooled, min(self.hidden, 4), self.extra)


def _common() -> dict[str, Any]:
    import comfy.ops
    import torch

    return {"dtype": torch.bfloat16, "device": "meta", "operations": comfy.ops.disable_weight_init}


def _wan_14b(blocks: int) -> Any:
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", dim=5120, ffn_dim=13824, num_layers=blocks, num_heads=40, in_dim=16, out_dim=16, text_dim=4096, **_common()
    )


def _hunyuan(blocks: int) -> Any:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    later = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    return HunyuanVideo(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=blocks,
        depth_single_blocks=blocks, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True,
        byt5=False, meanflow=False, **_known(later, HunyuanVideoParams), **_common(),
    )  # fmt: skip


def _ltx_13b(blocks: int) -> Any:
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(cross_attention_dim=4096, attention_head_dim=128, num_layers=blocks, **_common())


def _flux(blocks: int) -> Any:
    from comfy.ldm.flux.model import Flux, FluxParams

    return Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=blocks,
        depth_single_blocks=2 * blocks, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
        **_known({"txt_ids_dims": []}, FluxParams), **_common(),
    )  # fmt: skip


def _qwen_image(blocks: int) -> Any:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=blocks, **_common())


def _sdxl(blocks: int) -> Any:
    """A U-Net has as many blocks as it has."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4],
        num_head_channels=64, use_spatial_transformer=True, transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048, adm_in_channels=2816, num_classes="sequential",
        legacy=False, use_linear_in_transformer=True, **_common(),
    )  # fmt: skip


def _known(values: dict[str, Any], params: Any) -> dict[str, Any]:
    """Those that this core's parameters have."""
    names = {one.name for one in fields(params)}
    return {name: value for name, value in values.items() if name in names}


MODELS = {
    "wan_480p": Model(_wan_14b, 4, (1, 16, 21, 60, 104), (1, 512, 4096)),
    "wan_720p": Model(_wan_14b, 4, (1, 16, 21, 90, 160), (1, 512, 4096)),
    "hunyuan_720p": Model(_hunyuan, 2, (1, 16, 17, 90, 160), (1, 256, 4096), pooled=768, hidden=128),
    "ltx_1080p": Model(_ltx_13b, 4, (1, 128, 16, 34, 60), (1, 256, 4096), hidden=128),
    "flux_1024": Model(_flux, 2, (1, 16, 128, 128), (1, 512, 4096), pooled=768),
    "flux_2048": Model(_flux, 2, (1, 16, 256, 256), (1, 512, 4096), pooled=768),
    "qwen_1328": Model(_qwen_image, 4, (1, 16, 1, 166, 166), (1, 256, 3584)),
    "sdxl_1024": Model(_sdxl, 0, (1, 4, 128, 128), (1, 77, 2048), pooled=1280),
}


def load(model: Model) -> Any:
    """A ModelPatcher of the network, with random weights."""
    import comfy.sd
    import torch

    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    start = 0

    def fill(key: str, like: torch.Tensor) -> torch.Tensor:
        nonlocal start
        if key.endswith("bias"):
            return torch.zeros(like.shape, dtype=torch.bfloat16)
        if like.ndim == 1:
            return torch.ones(like.shape, dtype=torch.bfloat16)
        count = like.numel()
        start = (start + 7919) % POOL
        repeated = torch.cat([pool[start:], pool[:start]]).repeat(-(-count // POOL))[:count]
        return (repeated / (count / like.shape[0]) ** 0.5).view(like.shape)

    return comfy.sd.load_diffusion_model_state_dict({k: fill(k, v) for k, v in model.network(model.blocks).state_dict().items()})


def sample_ms(model: Model, patcher: Any, steps: int) -> tuple[list[float], float]:
    """The times of a sampling's steps but the first, and of all of it, in ms: the guard works in the first step."""
    import comfy.sample
    import torch

    generator = torch.Generator().manual_seed(SEED)
    text = torch.randn(model.conditioning, generator=generator)
    extra: dict[str, Any] = dict(model.extra)
    if model.pooled:
        extra["pooled_output"] = torch.randn((1, model.pooled), generator=generator)
    if model.hidden:
        extra["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
        extra["attention_mask"][:, -model.hidden :] = 0
    moments: list[float] = []

    def ended(step: int, denoised: Any, x: Any, total: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    conditioning, begun = [[text, extra]], time.perf_counter()
    with torch.inference_mode():  # as ComfyUI runs its nodes
        comfy.sample.sample(
            patcher, torch.randn(model.latent, generator=generator), steps, 1.0, "euler", "simple", conditioning, conditioning,
            torch.zeros(model.latent), callback=ended, disable_pbar=True, seed=SEED,
        )  # fmt: skip
    return [1e3 * (b - a) for a, b in itertools.pairwise(moments)], 1e3 * (moments[-1] - begun)


def nodes(pack: Any) -> dict[str, Any]:
    """Node id → `execute`, as this core is offered them."""
    if hasattr(pack, "comfy_entrypoint"):
        found = asyncio.run(pack.comfy_entrypoint().get_node_list())
        return {node.GET_SCHEMA().node_id: lambda *a, node=node, **k: node.execute(*a, **k).result[0] for node in found}
    return {name: lambda *a, node=node, **k: node().execute(*a, **k)[0] for name, node in pack.NODE_CLASS_MAPPINGS.items()}


def patched(patcher: Any, attention: str, offered: dict[str, Any], options: dict[str, Any]) -> Any:
    """The model with one of `ATTENTIONS`."""
    if attention == "pytorch":
        return comfy_models.own_attention(patcher, "attention_pytorch")
    if attention == "sparse":
        dense = offered["PatchSageAttention"](patcher, "auto")
        return offered["SageSparseAttention"](dense, **options)
    return offered["PatchSageAttention"](patcher, "auto", max_error=MAX_ERROR if attention == "guard" else 0.0)


def turns(attentions: list[str], rounds: int) -> Iterator[str]:
    """There and back, from another one each round."""
    for first in range(rounds):
        order = [attentions[(first + i) % len(attentions)] for i in range(len(attentions))]
        yield from (*order, *reversed(order))


def draw(folder: Path, name: str, patcher: Any, offered: dict[str, Any]) -> None:
    """What the report node and the benchmark node show of a model, as PNG files."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for node in ("SageAttentionReport", "SageAttentionBenchmark"):
        image = offered[node](patcher)[0]
        Image.fromarray((image * 255).round().byte().numpy()).quantize(64).save(folder / f"{name}_{node}.png", optimize=True)


def measure(
    name: str, model: Model, attentions: list[str], steps: int, rounds: int, options: dict[str, Any], pictures: Path | None
) -> dict[str, Any]:
    """Attention → median ms of a step, mean ms of a sampling, peak MiB above the weights, and the share of the blocks; ABBA.

    Args:
        pictures: where `draw` puts those of the last attention.
    """
    import comfy.model_management
    import torch
    from pack import load_pack

    pack = load_pack()
    offered = nodes(pack)
    patcher = load(model)
    clones = {attention: patched(patcher, attention, offered, options) for attention in attentions}
    times: dict[str, list[float]] = {attention: [] for attention in attentions}
    samplings: dict[str, list[float]] = {attention: [] for attention in attentions}
    peaks: dict[str, float] = {}
    for attention in attentions:
        sample_ms(model, clones[attention], 2)  # loads, compiles, tunes
    for attention in turns(attentions, rounds):
        on_card = torch.cuda.is_available()
        if on_card:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        single, whole = sample_ms(model, clones[attention], steps)
        times[attention] += single
        samplings[attention].append(whole)
        if on_card:
            peaks[attention] = (torch.cuda.max_memory_allocated() - before) / 2**20
    record_of = pack.nodes.slot.record_of
    found: dict[str, Any] = {"model": name, "blocks": model.blocks, "steps": steps}
    for attention in attentions:
        record = record_of(clones[attention])
        shares = [entry.blocks for entry in record.entries if entry.blocks is not None] if record else []
        found[attention] = {
            "ms": statistics.median(times[attention]),
            "sampling_ms": statistics.mean(samplings[attention]),
            "peak_mib": peaks.get(attention),
            "blocks": sum(shares) / len(shares) if shares else None,
            "counts": record.as_dict() if record else None,
        }
    if pictures:
        draw(pictures, name, clones[attentions[-1]], offered)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return found


def table(results: list[dict[str, Any]], attentions: list[str]) -> str:
    """A row a model, its ms by attention, and how many times as fast as PyTorch's the others are."""
    from sageattention.cli.text import table as columns

    rows = []
    for result in results:
        own = result[attentions[0]]["ms"]
        cells = [f"{result[a]['ms']:.1f} ({own / result[a]['ms']:.2f}x)" for a in attentions]
        shares = [f"{result[a]['blocks']:.0%}" for a in attentions if result[a]["blocks"] is not None]
        rows.append((result["model"], *cells, " ".join(shares)))
    return columns(("model", *attentions, "blocks"), rows, numeric=range(1, len(attentions) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of today's models in a real ComfyUI")
    parser.add_argument("comfy_path")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=["pytorch", "node"])
    parser.add_argument("--steps", type=int, default=4, help="of each sampling; the first is not timed")
    parser.add_argument("--rounds", type=int, default=1, help="in which each takes its turn twice; short steps need several")
    parser.add_argument("--sparse", type=json.loads, default={}, help="inputs of the sparse node, as JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="for what the report and the benchmark show of the last attention")
    parser.add_argument("--smoke", action="store_true", help="one block, few tokens: does it run?")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    comfy_models.start(given.comfy_path)
    results = []
    for name in given.models:
        model = MODELS[name].smoke() if given.smoke else MODELS[name]
        results.append(measure(name, model, given.attentions, given.steps, given.rounds, given.sparse, given.pictures))
        print(json.dumps(results[-1]), flush=True)
    print(table(results, given.attentions))


if __name__ == "__main__":
    main()
