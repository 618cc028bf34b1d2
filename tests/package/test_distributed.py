"""Attention over several processes: on the CPU by gloo, on two GPUs by NCCL (marker gpu)."""

from __future__ import annotations

import functools
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sageattention import distributed, sageattn, sageattn_sparse
from sageattention.cli.workloads import relative_l2
from sageattention.numerics.reference import oracle


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def tensors(case: dict[str, Any], device: str = "cpu") -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    heads = case["heads"], *[case.get("heads_kv", case["heads"])] * 2
    made = [torch.randn(case["batch"], h, case["tokens"], case["head_dim"], generator=g).to(case["dtype"]) for h in heads]
    return [t.to(device) for t in made]


def part_of(t: torch.Tensor, rank: int, size: int, layout: str) -> torch.Tensor:
    """[B, H, N, D] → this process's tokens, in the layout."""
    own = t.chunk(size, 2)[rank]
    return own.contiguous() if layout == "HND" else own.transpose(1, 2).contiguous()


def work(rank: int, size: int, port: int, backend: str, cases: list[dict[str, Any]], results: Any) -> None:
    """One process: every case's error of its own part, or what it raised."""
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://localhost:{port}", rank=rank, world_size=size)
    for number, case in enumerate(cases):
        q, k, v = tensors(case, device)
        layout, causal = case["layout"], case.get("causal", False)
        parts = [part_of(t, rank, size, layout) for t in (q, k, v)]
        options = case.get("options", {})
        function = getattr(distributed, case["function"])
        out = function(*parts, layout, causal, **options)
        lse = None
        if case.get("lse"):
            out, lse = function(*parts, layout, causal, return_lse=True, **options)
        exact, exact_lse = oracle(q, k, v, is_causal=causal)
        if "whole" in case:
            exact = case["whole"](q, k, v)
        out = out if layout == "HND" else out.transpose(1, 2)
        error = relative_l2(out, exact.chunk(size, 2)[rank])
        lse_error = 0.0 if lse is None else float((lse - exact_lse.chunk(size, 2)[rank]).abs().max())
        results.put((number, rank, error, lse_error))
    dist.barrier()
    dist.destroy_process_group()


def spawn(size: int, backend: str, cases: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[float, float]]:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(work, (size, free_port(), backend, cases, results), nprocs=size)
    found = (results.get() for _ in range(size * len(cases)))
    return {(number, rank): errors for number, rank, *errors in found}


BASE = {"batch": 1, "heads": 4, "tokens": 96, "head_dim": 40, "dtype": torch.float32, "layout": "NHD"}
sparse_all = functools.partial(sageattn_sparse, selection="topk", keep=0.5, variant="reference")
CASES = [
    {**BASE, "function": "ring", "lse": True},
    {**BASE, "function": "ring", "layout": "HND", "batch": 2, "heads_kv": 2, "causal": True, "lse": True},
    {**BASE, "function": "ulysses"},
    {**BASE, "function": "ulysses", "layout": "HND", "batch": 2, "heads": 8, "heads_kv": 4, "causal": True},
    {**BASE, "function": "ulysses", "heads": 2, "layout": "HND"},
    {**BASE, "function": "ulysses", "options": {"attention": sageattn_sparse, "selection": "topk", "keep": 0.5, "variant": "reference"},
     "tokens": 512, "whole": sparse_all},
]  # fmt: skip


def test_parts_of_a_sequence_have_the_whole_ones_attention() -> None:
    found = spawn(2, "gloo", CASES)
    assert len(found) == 2 * len(CASES)
    for (number, rank), (error, lse_error) in found.items():
        assert error < 1e-5 and lse_error < 1e-5, (CASES[number], rank, error, lse_error)


def test_three_processes_and_a_batch() -> None:
    case = {**BASE, "heads": 3, "batch": 2, "causal": True}
    found = spawn(3, "gloo", [{**case, "function": "ring"}, {**case, "function": "ulysses"}])
    assert len(found) == 6 and max(error for error, _ in found.values()) < 1e-5


def one_process(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    q = torch.randn(1, 3, 8, 16)
    with pytest.raises(ValueError, match="3 query heads and 3 of keys can't be shared by 2 processes"):
        distributed.ulysses(q, q, q)
    dist.destroy_process_group()


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    mp.spawn(one_process, (free_port(),), nprocs=2)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_parts_are_the_whole(layout: str, dtype: torch.dtype) -> None:
    check_merge("cpu", layout, dtype, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 37, 64, 128, 200, 256])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_parts_are_the_whole_on_a_gpu(layout: str, dtype: torch.dtype, head_dim: int) -> None:
    assert distributed.kernels.lone.kernel(0, distributed.kernels.MERGE_ATTENTION) is not None
    check_merge("cuda", layout, dtype, head_dim)


def check_merge(device: str, layout: str, dtype: torch.dtype, head_dim: int) -> None:
    """Keys in two parts; some queries have keys in one of them alone, or in none."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, head_dim, device=device, generator=g).to(dtype) for n in (50, 70, 70))
    keep = torch.ones(1, 1, 50, 70, dtype=torch.bool, device=device)
    keep[:, :, 3, :30] = keep[:, :, 5, 30:] = keep[:, :, 7] = False
    exact, exact_lse = oracle(q, k, v, attn_mask=keep)
    parts = []
    for keys in (slice(0, 30), slice(30, None)):
        out, lse = oracle(q, k[:, :, keys], v[:, :, keys], attn_mask=keep[..., keys])
        out = out.to(dtype)
        parts += [out if layout == "HND" else out.transpose(1, 2).contiguous(), lse.float()]
    distributed.merge(*parts, layout)
    out = parts[0] if layout == "HND" else parts[0].transpose(1, 2)
    assert relative_l2(out, exact) <= {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    torch.testing.assert_close(parts[1], exact_lse.float(), rtol=1e-5, atol=1e-5)


GPU_VARIANTS = ["sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp8_cuda_sm90", "sageattn_qk_int8_pv_int8_cuda"]


@pytest.mark.gpu
def test_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here; run on a machine with two")
    base = {**BASE, "tokens": 4096, "heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    cases = [
        {**base, "function": f, "layout": layout, "causal": causal, "options": {"variant": variant}}
        for f in ("ring", "ulysses") for layout in ("HND", "NHD") for causal in (False, True) for variant in GPU_VARIANTS
    ]  # fmt: skip
    cases += [
        {**base, "function": "ulysses", "layout": layout, "whole": sparse_all,
         "options": {"attention": sageattn_sparse, "selection": "topk", "keep": 0.5, "variant": variant}}
        for layout in ("HND", "NHD") for variant in GPU_VARIANTS
    ]  # fmt: skip
    found = spawn(2, "nccl", cases)
    assert len(found) == 2 * len(cases)
    for (number, rank), (error, _) in found.items():
        options = cases[number]["options"]
        assert error < (0.013 if "fp16" in options["variant"] and "attention" not in options else 0.04), (cases[number], rank, error)


def test_a_single_process_is_sageattn() -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    try:
        q, k, v = tensors(BASE)
        expected = sageattn(q, k, v)
        for function in (distributed.ring, distributed.ulysses):
            torch.testing.assert_close(function(q, k, v), expected)
    finally:
        dist.destroy_process_group()
