"""`explain`: which variant a call gets here, and why; from a shape alone, nothing runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..api import Explanation
from ..errors import KernelMissing, Unsupported
from ..planning.here import plan_for
from ..planning.problem import Problem
from .bench import parse_shape
from .candidates import chosen_device
from .workloads import SHAPES, Shape


def problem(shape: Shape, args: argparse.Namespace, device: str, index: int) -> Problem:
    """The call that the command line describes.

    Raises:
        Unsupported: its heads don't go together.
    """
    heads_kv = args.heads_kv or shape.kv_heads
    if heads_kv < 1 or shape.heads % heads_kv:
        raise Unsupported("--heads-kv", f"got {heads_kv}, accepted is a divisor of {shape}'s {shape.heads} heads")
    return Problem(
        shape.batch, shape.heads, heads_kv, shape.len_q, shape.len_kv, shape.head_dim, args.dtype, device, index,
        causal=args.mask == "causal", mask=args.mask if args.mask in ("bool", "additive") else "none", sm_scale=shape.head_dim**-0.5,
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """The command; exit code 1 where a variant asked for by name can't do a shape."""
    device = chosen_device(args.device)
    index = device.index if device.index is not None else 0 if device.type == "cuda" else -1
    found, refused = {}, {}
    for shape in [parse_shape(text) for text in args.shapes or SHAPES]:
        asked = problem(shape, args, device.type, index)
        try:
            found[str(shape)] = Explanation.of(asked, plan_for(asked, args.variant, args.pv_accum_dtype))
        except (Unsupported, KernelMissing) as error:
            refused[str(shape)] = str(error)
    if args.json:
        print(json.dumps({"calls": {shape: asdict(one) for shape, one in found.items()}, "refused": refused}, indent=2))
    else:
        for name, one in found.items():
            print(f"{name}: {one}")
        for name, reason in refused.items():
            print(f"{name}: refused, {reason}")
    return 1 if refused else 0
