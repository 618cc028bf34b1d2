"""Attention of one long sequence on several GPUs: time and error beside one GPU.

    torchrun --nproc-per-node 2 docs/several_gpus.py [--tokens 75600] [--heads 40] [--variant sageattn_qk_int8_pv_fp8_cuda_sm90]

Needs GPUs of one host and NCCL (Linux). Every process begins with its own part of the tokens, as a model run in parallel has them. The log
says where the GPUs can't copy to each other, and NCCL does.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from sageattention import sageattn
from sageattention.distributed import release, ring, ulysses


def milliseconds(call: Callable[[], torch.Tensor], repeats: int = 7) -> float:
    """The median time of a call, of the slowest process each time."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor(start.elapsed_time(end), device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--variant", default="auto")
    args = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    size = dist.get_world_size()
    g = torch.Generator("cuda").manual_seed(0)
    shape = (1, args.tokens // size * size, args.heads, args.head_dim)
    whole = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(3)]
    own = [t.chunk(size, 1)[rank].contiguous() for t in whole]
    one = functools.partial(sageattn, tensor_layout="NHD", variant=args.variant)
    expected, alone = one(*whole).chunk(size, 1)[rank].float(), milliseconds(lambda: one(*whole))
    for name, function in (("ring", ring), ("ulysses", ulysses)):
        call = functools.partial(function, *own, "NHD", variant=args.variant)
        error, time = (call().float() - expected).norm() / expected.norm(), milliseconds(call)
        if rank == 0:
            print(f"{tuple(shape)} {args.variant} {name}: {time:.1f} ms on {size} GPUs, {alone:.1f} ms on one: x {alone / time:.2f}")
            print(f"  differs from one GPU by {error:.4f} (relative L2)")
    release()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
