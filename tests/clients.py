"""Real programs as clients, each run in a process of its own by test_clients.py:

    python tests/clients.py diffusers | yunchang | cache_dit

They find the package through the pack's finder, as beside a bare clone, and run it as `reference` on a CPU: `SAGEATTENTION_VARIANT` is set,
so a result that is right but not to the last bit is ours. The Triton variant runs in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
TRITON = importlib.util.find_spec("triton") is not None  # it has no wheel for some platforms


def tensors(len_q: int = 40, len_kv: int = 40, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    """q, k, v [B, N, H, D]."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 4, 64, generator=g).to(dtype) for n in (len_q, len_kv, len_kv)]


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """torch's attention in fp32, [B, N, H, D]."""
    return F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)


def lse(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H, Nq]"""
    return torch.logsumexp(q.float().transpose(1, 2) @ k.float().permute(0, 2, 3, 1) * q.shape[-1] ** -0.5, -1)


def assert_ours(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Right within a quantised variant's error, and not PyTorch's own result."""
    assert out.shape == exact.shape, (out.shape, exact.shape)
    error = float((out.float() - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.03, error


def diffusers() -> None:
    """The dispatcher that every transformer of diffusers calls, with each backend that is ours."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
    from diffusers.utils import is_sageattention_available, is_sageattention_version

    assert is_sageattention_available() and is_sageattention_version(">=", "2.1.1")
    q, k, v = tensors(len_kv=50)
    for options in ({}, {"scale": 0.3}, {"is_causal": True}):
        assert_ours(dispatch_attention_fn(q, k, v, **options, backend=AttentionBackendName.SAGE), truth(q, k, v, **options))
    out, found = dispatch_attention_fn(q, k, v, backend=AttentionBackendName.SAGE, attention_kwargs={"return_lse": True})
    assert_ours(out, truth(q, k, v))
    assert (found - lse(q, k)).abs().max() < 0.03
    if not TRITON:
        return
    q, k, v = tensors()
    assert_ours(dispatch_attention_fn(q, k, v, backend=AttentionBackendName._SAGE_QK_INT8_PV_FP16_TRITON), truth(q, k, v))
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, 30:] = False
    out = dispatch_attention_fn(q, k, v, keep, backend=AttentionBackendName.SAGE_VARLEN)
    assert_ours(out, truth(q, k, v, attn_mask=keep[:, None, None]))


def cache_dit() -> None:
    """cache-dit's own dispatcher."""
    from cache_dit.attention import _AttnBackend, _dispatch_attention_fn

    q, k, v = tensors(len_kv=50)
    assert_ours(_dispatch_attention_fn(q, k, v, backend=_AttnBackend.SAGE), truth(q, k, v))
    q, k, v = (*tensors()[:1], *(t[:, :, :2] for t in tensors()[1:]))  # grouped queries, which it leaves to us
    found = _dispatch_attention_fn(q, k, v, backend=_AttnBackend.SAGE, enable_gqa=True, is_causal=True)
    assert_ours(found, truth(q, k, v, enable_gqa=True, is_causal=True))


def yunchang() -> None:
    """Ring and Ulysses attention over two processes."""
    torch.multiprocessing.spawn(_yunchang, (2,), 2)


def _yunchang(rank: int, world: int) -> None:
    runpy.run_path(str(ROOT / "prestartup_script.py"))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=world)
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    q, k, v = tensors(dtype=torch.float32)
    mine = slice(rank * 40 // world, (rank + 1) * 40 // world)
    for ulysses, kind in ((1, AttnType.SAGE_AUTO), (2, AttnType.SAGE_AUTO), *([(1, AttnType.SAGE_FP16_TRITON)] if TRITON else [])):
        set_seq_parallel_pg(ulysses, world // ulysses, rank, world)
        layer = LongContextAttention(attn_type=kind)
        for causal in (False, True):
            with torch.no_grad():
                out = layer(q[:, mine], k[:, mine], v[:, mine], dropout_p=0, causal=causal)
            assert_ours(out, truth(q, k, v, is_causal=causal)[:, mine])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    runpy.run_path(str(ROOT / "prestartup_script.py"))
    torch.set_num_threads(1)
    {"diffusers": diffusers, "cache_dit": cache_dit, "yunchang": yunchang}[sys.argv[1]]()
