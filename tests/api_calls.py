"""What the tests of the public functions call them with."""

from __future__ import annotations

import torch

import sageattention
from sageattention.variants import VARIANTS

CUDA_FUNCTIONS = {name: getattr(sageattention, name) for name, variant in VARIANTS.items() if variant.backend == "cuda"}
QUANTISED = "reference"


def qkv(len_q=33, len_kv=70, heads=2, heads_kv=None, head_dim=64, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads, len_q), (heads_kv or heads, len_kv), (heads_kv or heads, len_kv)
    return tuple(torch.randn(2, h, n, head_dim, generator=g).to(dtype) for h, n in shapes)
