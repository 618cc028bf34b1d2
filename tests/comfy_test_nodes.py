"""Nodes for the tests of a running server: a tiny model, its conditioning, and a report on what was sampled and how."""

import json
import sys
from pathlib import Path

import torch
from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS, optimized_attention

sys.path.append(str(Path(__file__).parent))
import comfy_models

WAN = comfy_models.WORKLOADS["wan"]


class TinyWan:
    """The tiny WAN model of `comfy_models`, and a latent and conditioning for it."""

    LATENT = WAN.latent
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        text = torch.randn(WAN.conditioning, generator=torch.Generator().manual_seed(0))
        return comfy_models.load("wan"), [[text, {}]], [[torch.zeros_like(text), {}]], {"samples": torch.zeros(self.LATENT)}


class TinyVideo(TinyWan):
    """The same with a latent of 3 x 10 x 12 tokens, a few blocks of block-sparse attention."""

    LATENT = (1, 16, 3, 20, 24)


class Report:
    """The latent, the counts of our record where the model has one, and what ComfyUI itself uses for attention."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "report"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",)}}

    def report(self, model, samples):
        record = model.model_options["transformer_options"].get("sageattention_record")
        found = {
            "latent": samples["samples"].float().flatten().tolist(),
            "counts": None if record is None else record.as_dict(),
            "own": optimized_attention.__name__,
            "functions": sorted(REGISTERED_ATTENTION_FUNCTIONS),
            "sageattention": getattr(sys.modules.get("sageattention"), "__file__", None),
        }
        return {"ui": {"text": [json.dumps(found)]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TinyWan, TinyVideo, Report)}
