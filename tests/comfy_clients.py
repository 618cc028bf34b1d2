"""Node packs that call `sageattention` themselves, run by test_comfyui.py in a real ComfyUI's Python:

    python tests/comfy_clients.py COMFYUI_PATH COMFY_CLIENTS

COMFY_CLIENTS holds checkouts of ComfyUI-KJNodes and ComfyUI-WanVideoWrapper. Prints, as JSON, how far each is from PyTorch's attention.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import comfy_models
import torch
from pack import ROOT


def module(path: Path) -> ModuleType:
    """A file of a pack; the rest of the pack, and what that needs, is not imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def kjnodes(folder: Path) -> dict[str, float]:
    """*Patch Sage Attention* of KJNodes around a tiny model, in the modes that can run here: mode → distance."""
    node = module(folder / "nodes" / "model_optimization_nodes.py").PathchSageAttentionKJ()
    model = comfy_models.load("wan")
    exact, _ = comfy_models.sample("wan", comfy_models.own_attention(model, "attention_pytorch"))
    found = {}
    for mode in ("disabled", "auto", *(["sageattn_qk_int8_pv_fp16_triton"] if importlib.util.find_spec("triton") else [])):
        out, _ = comfy_models.sample("wan", node.patch(model, mode)[0])
        found[mode] = distance(out, exact)
    return found


def wanvideowrapper(folder: Path) -> float:
    """Its attention function in the mode `sageattn`, on tensors [B, L, N, C]."""
    attention = module(folder / "wanvideo" / "modules" / "attention.py").attention
    q, k, v = (torch.randn(1, n, 2, 128, generator=torch.Generator().manual_seed(n)) for n in (40, 50, 50))
    both = (attention(q, k, v, dtype=torch.float16, attention_mode=mode) for mode in ("sageattn", "sdpa"))
    return distance(*(t.float() for t in both))


if __name__ == "__main__":
    comfy_path, clients = sys.argv[1], Path(sys.argv[2])
    runpy.run_path(str(ROOT / "prestartup_script.py"))
    comfy_models.start(comfy_path, True)
    kj, wan = kjnodes(clients / "ComfyUI-KJNodes"), wanvideowrapper(clients / "ComfyUI-WanVideoWrapper")
    print(json.dumps({"kjnodes": kj, "wanvideowrapper": wan}))
