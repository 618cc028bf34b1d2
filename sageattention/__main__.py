"""`python -m sageattention doctor | check | bench | explain | card | report`. `doctor` and `report` run without torch; the others say that
they need it.

`python path/to/sageattention doctor` is the same for a Python that does not look into the current folder: the embedded one of
ComfyUI's portable build.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import runpy
import sys


def parser() -> argparse.ArgumentParser:
    """The command line; each command's module has `main(args) -> exit code`."""
    from ._version import __version__

    top = argparse.ArgumentParser(
        prog="python -m sageattention", description="Quantised attention: what runs here, is it right, is it fast?"
    )
    top.add_argument("--version", action="version", version=f"sageattention {__version__} in {os.path.dirname(os.path.abspath(__file__))}")
    commands = top.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what this machine has, which variants run on it and why the others don't")
    check = commands.add_parser(
        "check", help="every ready variant against fp64; exit code 1 where one is off, 3 where no kernel of this package was checked"
    )
    bench = commands.add_parser("bench", help="the ready variants' speed and memory beside torch's SDPA backends")
    explain = commands.add_parser("explain", help="which variant a call gets on this machine, and why not another")
    report = commands.add_parser("report", help="what ran in a model's last sampling in ComfyUI, as the report node saved it")
    report.add_argument("file", nargs="?", help="the saved JSON; default: report.json in the user directory of the ComfyUI around here")
    card = commands.add_parser("card", help="doctor, check and bench in one JSON file, to send with a report")
    check.add_argument("--quick", action="store_true", help="only the input kinds: no masks, head dimensions, GQA")
    check.add_argument("--device", help="a torch device such as cuda:1 or cpu; default: cuda where there is one")
    check.add_argument("--variants", type=_names, help="comma-separated names; default: every ready one")
    bench.add_argument("--shapes", type=_names, help="comma-separated names, or BxHxNqxNkxD; default: every named shape")
    bench.add_argument("--variants", type=_names, help="comma-separated names (name:accumulator too); default: auto and every ready one")
    bench.add_argument("--peaked", action="store_true", help="logits with a standard deviation of 6 nats instead of 1")
    bench.add_argument("--quick", action="store_true", help="fewer repeats, and without --shapes only flux_512 and flux_1024")
    bench.add_argument("--models", action="store_true", help="without --shapes: the attention of today's image and video models")
    bench.add_argument("--masks", action="store_true", help="each shape also with the masks that models hand over")
    bench.add_argument("--sparse", action="store_true", help="block-sparse attention on long videos, beside dense attention")
    bench.add_argument("--device", help="a torch device such as cuda:1; default: cuda where there is one")
    bench.add_argument("--calibrate", action="store_true", help="time what `auto` may choose on this card (a minute), and remember it")
    bench.add_argument("--reset", action="store_true", help="with --calibrate: forget it, on every card")
    explain.add_argument("--shapes", type=_names, help="comma-separated names, or BxHxNqxNkxD; default: every named shape")
    explain.add_argument("--heads-kv", type=int, help="heads of k and v, where they have fewer than q")
    explain.add_argument("--mask", choices=("none", "causal", "bool", "additive"), default="none", help="the call's mask")
    explain.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="bfloat16")
    explain.add_argument("--variant", default="auto", help="a variant's name; default: auto")
    explain.add_argument("--pv-accum-dtype", default="", help="the accumulator asked for")
    explain.add_argument("--device", help="a torch device such as cuda:1 or cpu; default: cuda where there is one")
    card.add_argument("--quick", action="store_true", help="check without masks and call forms, bench on the two quick shapes")
    card.add_argument("--device", help="a torch device such as cuda:1 or cpu; default: cuda where there is one")
    card.add_argument("--out", metavar="FILE", default="sageattention-card.json", help="where to (sageattention-card.json)")
    for command in (doctor, check, bench, explain, card, report):
        command.add_argument("--json", action="store_true", help="machine-readable output")
    return top


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 where it can't be done as asked (an unknown name, or no torch)."""
    from .errors import Unsupported

    args = parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a Windows console of a legacy code page has no '·' or 'ᵀ'
    if args.command not in ("doctor", "report") and importlib.util.find_spec("torch") is None:
        print(f"{args.command} needs torch, which {sys.executable} does not have; `doctor` tells what else is missing.", file=sys.stderr)
        return 2
    try:
        command = "calibrate" if getattr(args, "calibrate", False) else args.command
        return importlib.import_module(f".cli.{command}", __package__).main(args)
    except Unsupported as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if __package__:
        sys.exit(main())
    folder = os.path.dirname(os.path.abspath(__file__))  # run as a folder, which is on the path then: its modules are not to be found so
    sys.path[:] = [os.path.dirname(folder), *(entry for entry in sys.path if os.path.abspath(entry) != folder)]
    runpy.run_module(os.path.basename(folder), run_name="__main__", alter_sys=True)
