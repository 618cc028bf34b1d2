"""`report`: what ran in a model's last sampling in ComfyUI, as the node `SageAttentionReport` saved it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .text import table

FORMAT = 1  # of the JSON
SAVED = Path("__sageattention") / "report.json"  # in ComfyUI's user directory
OWN = "the model's own"
HEAD = ("layer", "calls", "shape", "ran", "ms", "share", "blocks", "error", "")


def main(args: argparse.Namespace) -> int:
    """The command; 2 where there is no report, or none of this format."""
    found = [Path(args.file)] if args.file else [path for path in _usual_places() if path.is_file()]
    if not found:
        print(
            "error: no report was found here: run a workflow with the node Sage Attention Report, and name the file: "
            f"report COMFYUI/user/{SAVED.as_posix()}",
            file=sys.stderr,
        )
        return 2
    try:
        report = json.loads(found[0].read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise ValueError(f"its format is {report['format']}, this version reads {FORMAT}")
        said = json.dumps(report, indent=2) if args.json else text(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {found[0]} can't be read as a report: {error}", file=sys.stderr)
        return 2
    print(said)
    return 0


def _usual_places() -> Iterator[Path]:
    """In the ComfyUI that the current folder, or this package as a part of a node pack, is in."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            yield folder / "user" / SAVED


def text(report: dict[str, Any]) -> str:
    """The report in plain words and a table."""
    lines = [f"{report['model']} on {report['device']}, sageattention {report['sageattention']}", *report["findings"]]
    if report["layers"]:
        lines += ["", summary(report), "", _layers(report["layers"])]
    if report["left"]:
        calls = [(count, reason) for reason, count in report["left"].items()]
        lines += ["", table(("calls", "left, because"), calls, numeric=(0,))]
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """How much ran where, in a line or two."""
    ran = ", ".join(f"{name} {count}" for name, count in report["ran"].items())
    said = f"{report['steps']} steps, {report['calls']} attention calls: {ran}."
    if report["step_ms"]:
        said += f"\nA step takes {report['step_ms']:.1f} ms, attention {report['attention_ms']:.1f} ms of it."
    elif report["attention_ms"]:
        said += f"\nAttention takes {report['attention_ms']:.1f} ms a step."
    return said


def _layers(layers: list[dict[str, Any]]) -> str:
    rows = [
        (
            row["layer"], row["calls"], "x".join(map(str, row["shape"])), _ran(row), _f(row["ms"], ".3f"), _f(row["share"], ".1%"),
            _f(row["blocks"], ".1%"), _f(row["error"], ".4f"), "; ".join(row["reasons"]),
        )
        for row in layers
    ]  # fmt: skip
    return table(HEAD, rows, numeric=(1, 4, 5, 6, 7))


def _ran(row: dict[str, Any]) -> str:
    if len(row["ran"]) == 1:
        return next(iter(row["ran"]))
    return ", ".join(f"{name} {count}" for name, count in row["ran"].items())


def _f(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
