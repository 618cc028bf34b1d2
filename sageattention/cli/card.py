"""`card`: what this machine has, whether the kernels are right on it and how fast: `doctor`, `check` and `bench` as one JSON.

Made to be sent: the user's home folder is "~" in it. The file is written after each step, so what is known before a step that ends
Python is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported
from . import bench, check, doctor
from .candidates import chosen_device
from .text import table

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of the JSON
SHAPES = ("sdxl_1024", "flux_1024", "wan_480p")  # both usual head dimensions; a short, a middling and a long sequence


def steps(device: torch.device, *, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What the report is made of, by name, in the order in which it is made."""

    def bench_here() -> dict[str, Any]:
        if device.type != "cuda":
            return bench.measure_on_cpu([], None)
        return bench.measure(device, [bench.parse_shape(name) for name in (bench.QUICK_SHAPES if quick else SHAPES)], [], quick=True)

    return {"doctor": doctor.facts, "check": lambda: check.findings(device, quick=quick), "bench": bench_here}


def report(device: torch.device, *, quick: bool = False, save: Callable[[dict[str, Any]], object] = lambda found: None) -> dict[str, Any]:
    """Every step's result by its name; a step that raises is told in `errors`. `save` is called with the report after each step."""
    found: dict[str, Any] = {"format": FORMAT, "made": datetime.now(timezone.utc).isoformat(timespec="seconds"), "errors": {}}
    for name, step in steps(device, quick=quick).items():
        print(f"{name} ...", file=sys.stderr)
        try:
            found[name] = without_home(step())
        except Exception as thrown:  # whatever a kernel or the driver throws is what the report is for; `main` returns 1
            found["errors"][name] = without_home(f"{type(thrown).__name__}: {thrown}")
        save(found)
    return found


def without_home(value: Any) -> Any:
    """JSON data with the user's home folder as "~", for paths hold the user's name."""
    if isinstance(value, dict):
        return {key: without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_home(item) for item in value]
    home = Path.home()
    if isinstance(value, str) and home != home.parent:  # some services live in "/"
        return value.replace(str(home), "~").replace(home.as_posix(), "~")
    return value


def summary(found: dict[str, Any]) -> str:
    """For a person: the card, the verdict, the times of `auto` beside torch's."""
    lines = []
    if "doctor" in found:
        cards = ", ".join(f"{gpu['name']} (sm_{gpu['arch']})" for gpu in found["doctor"]["gpus"]) or "no GPU"
        lines.append(f"{cards}, driver {found['doctor']['driver'] or 'none'}, sageattention {found['doctor']['sageattention']['version']}")
    if "check" in found:
        lines.append(f"check: {check.verdict(found['check'])}")
    rows = [row for row in found.get("bench", {}).get("rows", ()) if row["candidate"] == "auto"]
    if rows:
        base = rows[0]["baseline"].replace(bench.BASELINE, "cuDNN") or "torch"
        cells = [(r["shape"], r["runs"], _f(r["graph_ms"] or r["event_ms"]), _f(r["graph_ratio"] or r["event_ratio"])) for r in rows]
        lines.append(table(("bench", "auto runs", "ms", f"x {base}"), cells, numeric=(2, 3)))
    return "\n".join([*lines, *(f"{name} failed: {error}" for name, error in found["errors"].items())])


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def main(args: argparse.Namespace) -> int:
    """The command; exit code 1 where a step fails, else that of `check`."""
    device = chosen_device(args.device)
    if args.json:
        found = report(device, quick=args.quick)
        print(json.dumps(found, indent=2))
    else:
        out = Path(args.out)
        try:
            out.touch()  # now, not after minutes of measuring
        except OSError as error:
            raise Unsupported("--out", f"{out} can't be written ({error.strerror}); name another file") from error
        found = report(device, quick=args.quick, save=lambda known: out.write_text(json.dumps(known, indent=2), encoding="utf-8"))
        print(summary(found))
        print(f'\nWritten to {out.resolve()}. Please attach it to an issue of the form "My card"; your home folder is "~" in it.')
    return 1 if found["errors"] else check.exit_code(found["check"])
