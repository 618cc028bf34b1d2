"""Attention over several processes: by messages and by copies on the CPU (gloo, tests/host_card.py), on two GPUs by NCCL and by their copy
engines, and by two processes of one GPU (marker gpu)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from host_card import PATIENCE, HostCard

from sageattention import distributed, exchange, sageattn, sageattn_sparse
from sageattention.cli.workloads import relative_l2
from sageattention.device import peer_memory
from sageattention.exchange.copies import Lane, readable, rows
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


Cards = Callable[[int], HostCard | None]  # of a process: what its copies work on


def late_card(rank: int) -> HostCard:
    return HostCard(delay=1e-3)


@contextlib.contextmanager
def process(rank: int, size: int, port: int, backend: str = "gloo", device: str = "cpu", cards: Cards | None = late_card) -> Iterator[None]:
    """One of the processes, in its group; what its copies work on: where there are no cards, this device."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    if cards is not None:
        exchange.memory_of = lambda like: cards(rank)
    dist.init_process_group(backend, init_method=f"tcp://localhost:{port}", rank=rank, world_size=size)
    yield
    dist.barrier()
    dist.destroy_process_group()
    if device == "cpu":  # NCCL's groups outlive their end
        gc.collect()
        assert not exchange._copies


def by_copies() -> bool:
    """Whether this process's exchanges were copies."""
    return exchange._copies[dist.group.WORLD] is not None


def work(
    rank: int, size: int, port: int, backend: str, device: str, cards: Cards | None, cases: list[dict[str, Any]], results: Any
) -> None:
    """One process: every case's errors of its own part, by copies and by messages."""
    device = f"cuda:{rank}" if device == "each" else device
    with process(rank, size, port, backend, device, cards):
        for number, case in enumerate(cases):
            results.put((number, rank, "copies", *errors_of(case, rank, size, device)))
        assert by_copies()
        if backend == "gloo" and device != "cpu":
            return  # gloo has no messages for a GPU's tensors
        distributed.release()
        exchange._copies[dist.group.WORLD] = None
        for number, case in enumerate(cases):
            results.put((number, rank, "messages", *errors_of(case, rank, size, device)))


def errors_of(case: dict[str, Any], rank: int, size: int, device: str) -> tuple[float, float]:
    """Of this process's part of the output, relative, and of the log-sum-exps."""
    q, k, v = tensors(case, device)
    layout, causal = case["layout"], case.get("causal", False)
    parts = [part_of(t, rank, size, layout) for t in (q, k, v)]
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in case.get("options", {}).items()}
    function = getattr(distributed, case["function"])
    out = function(*parts, layout, causal, **options)
    lse = None
    if case.get("lse"):
        out, lse = function(*parts, layout, causal, return_lse=True, **options)
    exact, exact_lse = oracle(q, k, v, is_causal=causal)
    if "attention" in options:  # what blocks are left out is that of the whole call
        exact = options.pop("attention")(q, k, v, is_causal=causal, **{**options, "variant": "reference"})
    out = out if layout == "HND" else out.transpose(1, 2)
    error = relative_l2(out, exact.chunk(size, 2)[rank])
    return error, 0.0 if lse is None else float((lse - exact_lse.chunk(size, 2)[rank]).abs().max())


def spawn(size: int, cases: list[dict[str, Any]], backend: str = "gloo", device: str = "cpu") -> dict[tuple, tuple[float, float]]:
    """The errors of output and log-sum-exps, by (case's number, rank, way)."""
    results = mp.get_context("spawn").Queue()
    cards = late_card if device == "cpu" else None
    context = mp.spawn(work, (size, free_port(), backend, device, cards, cases, results), nprocs=size, join=False)
    ways = 1 if (backend, device) == ("gloo", "cuda:0") else 2
    found = {}
    for _ in range(size * len(cases) * ways):
        deadline = time.monotonic() + PATIENCE
        while results.empty() and not context.join(0.1):
            if time.monotonic() > deadline:
                for waiting in context.processes:
                    waiting.kill()
                raise TimeoutError(f"{len(found)} results, then none for {PATIENCE} s")
        number, rank, way, *errors = results.get(timeout=10)
        found[number, rank, way] = tuple(errors)
    while not context.join():
        pass
    assert len(found) == size * len(cases) * ways
    return found


BASE = {"batch": 1, "heads": 4, "tokens": 96, "head_dim": 40, "dtype": torch.float32, "layout": "NHD"}
SPARSE = {"selection": "topk", "keep": 0.5}
PER_HEAD = {"selection": "topk", "keep": torch.linspace(0.1, 0.9, 8)}
STATIC = {"selection": "static", "tail": False, "block_mask": torch.rand(1, 8, 4, 8, generator=torch.Generator().manual_seed(1)) < 0.5}


def sparse_case(selection: dict[str, Any], variant: str, **changes: Any) -> dict[str, Any]:
    """`ulysses` with block-sparse attention."""
    return {**BASE, "function": "ulysses", "options": {"attention": sageattn_sparse, **selection, "variant": variant}, **changes}


CASES = [
    {**BASE, "function": "ring", "lse": True},
    {**BASE, "function": "ring", "layout": "HND", "batch": 2, "heads_kv": 2, "causal": True, "lse": True},
    {**BASE, "function": "ulysses"},
    {**BASE, "function": "ulysses", "layout": "HND", "batch": 2, "heads": 8, "heads_kv": 4, "causal": True},
    {**BASE, "function": "ulysses", "heads": 2, "layout": "HND"},
    sparse_case(SPARSE, "reference", tokens=512),
    sparse_case(PER_HEAD, "reference", tokens=512, heads=8, layout="HND", causal=True),
    sparse_case(STATIC, "reference", tokens=512, heads=8, layout="HND"),
]  # fmt: skip


def test_parts_of_a_sequence_have_the_whole_ones_attention() -> None:
    for (number, rank, way), (error, lse_error) in spawn(2, CASES).items():
        assert error < 1e-5 and lse_error < 1e-5, (CASES[number], rank, way, error, lse_error)


def test_three_processes_and_a_batch() -> None:
    case = {**BASE, "heads": 6, "heads_kv": 3, "batch": 2, "causal": True}
    found = spawn(3, [{**case, "function": "ring"}, {**case, "function": "ulysses"}, {**case, "function": "ring", "lse": True}])
    assert max(max(errors) for errors in found.values()) < 1e-5


def check(function: str, rank: int, size: int, heads: int, tokens: int, seed: int, **options: Any) -> None:
    """One call with other tensors for each seed; on return they are overwritten, as a caller may."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, size * tokens, 16, generator=g) for _ in range(3))
    parts = [part_of(t, rank, size, "NHD") for t in (q, k, v)]
    out = getattr(distributed, function)(*parts, "NHD", **options)
    for part in parts:
        part.fill_(torch.nan)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out.transpose(1, 2), expected.chunk(size, 2)[rank], atol=1e-5, rtol=1e-5)


def many_calls(rank: int, size: int, port: int) -> None:
    rng = random.Random(0)  # the same at every process
    with process(rank, size, port):
        with torch.inference_mode():
            check("ulysses", rank, size, 4 * size, 40, 0)
        for seed in range(24):
            heads = size * rng.choice([1, 2, 4, 5, 6, 8])
            check(rng.choice(["ring", "ulysses"]), rank, size, heads, rng.choice([3, 16, 40]), seed)
        link = exchange._copies[dist.group.WORLD]
        kept = link._data.numel()
        check("ulysses", rank, size, 8 * size, 4000, 0)  # more than fits
        assert link._data.numel() > kept and link._memory.copied > kept
        check("ring", rank, size, 8, 40, 1)
        # The second process is slow to take what came back, where the first one's next call has other boxes.
        link._memory.delays[Lane.LOCAL] = 0.2 * (rank == 1)
        for seed in range(2):
            check("ulysses", rank, size, 2 * size, 16, seed)
            check("ring", rank, size, 11, 40, seed)
        assert not link._memory.failures
        distributed.release()
        assert dist.group.WORLD not in exchange._copies
        check("ring", rank, size, 2, 10, 2)


@pytest.mark.parametrize("size", [2, 3])
def test_copies_are_not_overwritten_before_they_are_read(size: int) -> None:
    mp.spawn(many_calls, (size, free_port()), nprocs=size)


class Here:
    """A card of the second process that can't copy."""

    def __init__(self, **fault: bool):
        self.fault = fault

    def __call__(self, rank: int) -> HostCard | None:
        if rank and not self.fault:
            return None
        return HostCard(**self.fault) if rank else HostCard()


def failing(rank: int, port: int) -> None:
    def third_fails(*tensors: torch.Tensor, **options: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("the third chunk")
        return sageattn(*tensors, **options)

    with process(rank, 2, port), pytest.MonkeyPatch.context() as patch:
        nothing = torch.randn(1, 4, 0, 16)
        assert all(f(nothing, nothing, nothing).shape == nothing.shape for f in (distributed.ring, distributed.ulysses))
        q = torch.randn(1, 3, 8, 16)
        with pytest.raises(ValueError, match="3 query heads and 3 of keys can't be shared by 2 processes"):
            distributed.ulysses(q, q, q)
        with pytest.raises(ValueError, match="attention returned more than the output"):
            check("ulysses", rank, 2, 4, 16, 0, return_lse=True)
        for function in (distributed.ring, distributed.ulysses):
            with pytest.raises(ValueError, match=r"float32, torch.float16, torch.float32; convert"):
                function(q, q.half(), q)
        for seed in range(3):  # what fails midway leaves the next call whole
            calls = itertools.count()
            with pytest.raises(RuntimeError, match="the third chunk"):
                check("ulysses", rank, 2, 8, 16, seed, attention=third_fails)
            check("ulysses", rank, 2, 8, 16, seed)
            with pytest.raises(ValueError, match="variant"):
                check("ring", rank, 2, 4, 16, seed, variant="none of that name")
            check("ring", rank, 2, 10, 16, seed)
        assert by_copies()
        said: list[str] = []
        patch.setattr(exchange.LOG, "info", lambda text, *values: said.append(text % values))
        for cards, reason in ((Here(refuses=True), "has no memory"), (Here(loses=True), "did not arrive"), (Here(), "")):
            distributed.release()
            patch.setattr(exchange, "memory_of", lambda like, cards=cards: cards(rank))
            said.clear()
            for seed, function in enumerate(("ring", "ulysses", "ring")):
                check(function, rank, 2, 4, 16, seed)
            lines = [line for line in said if "distributed" in line]
            assert not by_copies() and len(lines) == bool(reason) and all(reason in line for line in lines)


def test_calls_that_fail_and_processes_that_cannot_copy() -> None:
    mp.spawn(failing, (free_port(),), nprocs=2)


@pytest.mark.parametrize("seed", range(40))
def test_rows_make_up_a_copy(seed: int) -> None:
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 5]) for _ in range(3)] + [rng.choice([4, 6])]

    def somewhere(fill: torch.Tensor) -> torch.Tensor:
        """A part of a larger tensor, its axes in another order in memory; head_dim is the last."""
        order = [*rng.sample(range(3), 3), 3]
        large = torch.full([shape[axis] + rng.choice([0, 2]) for axis in order], torch.nan).permute(
            [order.index(axis) for axis in range(4)]
        )
        part = large[tuple(slice(rng.choice([0, size - n]), None) for size, n in zip(large.shape, shape, strict=True))]
        part = part[tuple(slice(0, n) for n in shape)]
        return part.copy_(fill)

    values = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    source, target = somewhere(values), somewhere(torch.zeros(shape))
    assert readable(source) is source
    pieces = list(rows(target, source))
    for piece in pieces:
        assert piece.height == 1 or min(piece.target_pitch, piece.source_pitch) >= piece.width
        for row in range(piece.height):
            to, begin = target.data_ptr() + piece.target, source.data_ptr() + piece.source
            ctypes.memmove(to + row * piece.target_pitch, begin + row * piece.source_pitch, piece.width)
    assert torch.equal(target, values)
    assert len(pieces) * max(piece.height for piece in pieces) <= values.numel() // 4


def test_heads_of_a_chunk_are_one_copy() -> None:
    whole, own = torch.empty(1, 64, 5, 16), torch.empty(1, 32, 20, 16)
    assert [piece[2:] for piece in rows(whole[:, 32:], own[:, :, 5:10])] == [(5 * 16 * 4, 32, 5 * 16 * 4, 20 * 16 * 4)]
    assert len(list(rows(whole.transpose(1, 2)[:, :, 32:], own.transpose(1, 2)[:, 5:10]))) == 1
    assert [piece.height for piece in rows(own, own)] == [1]
    for odd in (own[:, :, :1].expand(-1, -1, 4, -1), own.transpose(2, 3)):
        assert readable(odd).is_contiguous()


def test_the_drivers_struct() -> None:
    """CUDA_MEMCPY2D of cuda.h on 64 bits."""
    offsets = {
        name: getattr(peer_memory._Memcpy2D, name).offset for name in ("srcDevice", "srcPitch", "dstXInBytes", "dstDevice", "WidthInBytes")
    }
    assert offsets == {"srcDevice": 32, "srcPitch": 48, "dstXInBytes": 56, "dstDevice": 88, "WidthInBytes": 112}
    assert ctypes.sizeof(peer_memory._Memcpy2D) == 128 and ctypes.sizeof(peer_memory._Handle) == 64


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


def check_gpus(backend: str, device: str) -> None:
    """Every variant of `ring` and `ulysses`, block-sparse attention too, by two processes."""
    base = {**BASE, "tokens": 4096, "heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    cases = [
        {**base, "function": f, "layout": layout, "causal": causal, "options": {"variant": variant}}
        for f in ("ring", "ulysses") for layout in ("HND", "NHD") for causal in (False, True) for variant in GPU_VARIANTS
    ]  # fmt: skip
    cases += [
        sparse_case(selection, variant, tokens=4096, heads=8, head_dim=128, dtype=torch.bfloat16, layout=layout)
        for selection in (SPARSE, PER_HEAD) for layout in ("HND", "NHD") for variant in GPU_VARIANTS
    ]  # fmt: skip
    for (number, rank, way), (error, _) in spawn(2, cases, backend, device).items():
        options = cases[number]["options"]
        assert error < (0.013 if "fp16" in options["variant"] and "attention" not in options else 0.04), (cases[number], rank, way, error)


@pytest.mark.gpu
def test_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here; run on a machine with two")
    check_gpus("nccl", "each")


@pytest.mark.gpu
def test_two_processes_of_one_gpu() -> None:
    check_gpus("gloo", "cuda:0")


def test_a_single_process_is_sageattn() -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    try:
        q, k, v = tensors(BASE)
        expected = sageattn(q, k, v)
        for function in (distributed.ring, distributed.ulysses):
            torch.testing.assert_close(function(q, k, v), expected)
    finally:
        dist.destroy_process_group()
