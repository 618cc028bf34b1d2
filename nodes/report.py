"""What a model's attention did in its last sampling, as plain data: the source of the report's text, JSON and picture."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..sageattention import __version__
from ..sageattention.cli.report import FORMAT, OWN, SAVED
from . import findings, slot
from .progress import short
from .record import Again, Entry, Record

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def of_model(model: ModelPatcher) -> dict[str, Any]:
    """The report on a model. Waits for its device.

    Keys: `format`, `sageattention` (version), `time`, `model`, `device`; `nodes`: the settings of our nodes; `findings`: sentences;
    `steps`, `calls`; `ran`: variant → calls; `left`: reason → calls; `step_ms`, `attention_ms`: of a step, None where no time was taken;
    `layers`: a row for each layer and shape; `by_step`: a row for each step; `map`: the share of the blocks by layer and step.
    """
    record = slot.record_of(model) or Record()
    entries = record.entries
    times = Times(record)
    layers = _layers(entries, times)
    return {
        "format": FORMAT,
        "sageattention": __version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": type(getattr(model.model, "diffusion_model", model.model)).__name__,
        "device": _device_name(model.load_device),
        "nodes": [one.settings() for one in slot.ours(slot.owner(model))],
        "findings": findings.of_model(model),
        "steps": record.sampling.steps,
        "calls": len(entries),
        "ran": _ran(entries),
        "left": dict(Counter(reason for entry in entries for reason in entry.reasons).most_common()),
        "step_ms": times.step_ms,
        "attention_ms": times.attention_ms,
        "layers": layers,
        "by_step": _steps(entries, times),
        "map": _map(entries),
    }


def save(report: dict[str, Any]) -> None:
    """Keep it in ComfyUI's user directory, where `python -m sageattention report` finds it. Only within ComfyUI."""
    folder_paths = sys.modules.get("folder_paths")
    if folder_paths is None:
        return
    path = Path(folder_paths.get_user_directory()) / SAVED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2), encoding="utf-8")


class Times:
    """The times of a record's calls and steps, in ms.

    A call of a timed step that was not timed itself, for others are like it, took as long as those. The first step does not count where
    others are timed: kernels are loaded and the guard looks at each layer there.

    Attributes:
        steps: number → (attention's part of it, all of it); None where it was not taken.
        settled: the steps that count.
        attention_ms, step_ms: their means; None where no time was taken.
    """

    def __init__(self, record: Record):
        entries = record.entries
        self._calls: dict[int, float] = {}  # by id of an entry
        for entry in entries:
            if entry.begin is not None and entry.end is not None:
                self._calls[id(entry)] = entry.end.ms_since(entry.begin)
        timed = [entry for entry in entries if id(entry) in self._calls]
        numbers = {entry.step.number for entry in timed}
        self.settled = numbers - {0} if len(numbers) > 1 else numbers
        self._add_alike(entries, timed)
        attention: defaultdict[int, float] = defaultdict(float)
        for entry in entries:
            if id(entry) in self._calls:
                attention[entry.step.number] += self._calls[id(entry)]
        lasted = {}
        for number, start in record.starts.items():
            following = record.starts.get(number + 1)
            if start is not None and following is not None and start.device == following.device:
                lasted[number] = following.ms_since(start)
        self.steps = {number: (attention.get(number), lasted.get(number)) for number in {*attention, *lasted}}
        self.attention_ms = _mean(attention[n] for n in self.settled)
        self.step_ms = _mean(lasted.get(n) for n in self.settled)

    def _add_alike(self, entries: list[Entry], timed: list[Entry]) -> None:
        counted: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
        others: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
        for entry in timed:
            (counted if entry.step.number in self.settled else others)[entry.kind].append(self._calls[id(entry)])
        usual = {kind: statistics.median(times) for kind, times in {**others, **counted}.items()}
        for entry in entries:
            if isinstance(entry, Again) and entry.step.timed and entry.kind in usual:
                self._calls[id(entry)] = usual[entry.kind]

    def of(self, entries: Iterable[Entry]) -> list[float]:
        """Of those calls that have a time, in steps that count."""
        return [self._calls[id(e)] for e in entries if id(e) in self._calls and e.step.number in self.settled]


def shape(entry: Entry) -> tuple[int, ...]:
    """[B, heads, Nq, Nk, D] of a call; () where it is none that we know."""
    q, k, heads = entry.q_shape, entry.k_shape, entry.heads
    if entry.hnd and len(q) == len(k) == 4:
        return (q[0], q[1], q[2], k[2], q[3])
    if len(q) == len(k) == 3 and isinstance(heads, int) and heads > 0:
        return (q[0], heads, q[1], k[1], q[2] // heads)
    return ()


def _layers(entries: list[Entry], times: Times) -> list[dict[str, Any]]:
    groups: dict[tuple[str, tuple[int, ...]], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.layer.name, shape(entry)), []).append(entry)
    rows = []
    for (layer, of_shape), group in groups.items():
        timed = times.of(group)
        total = sum(timed) / len(times.settled) if timed else None
        errors = [entry.error for entry in group if entry.error is not None]
        rows.append(
            {
                "layer": layer,
                "shape": list(of_shape),
                "calls": len(group),
                "ran": _ran(group),
                "kernels": sorted({entry.kernel for entry in group if entry.kernel}),
                "ms": _median(timed),
                "ms_a_step": total,
                "share": total / times.attention_ms if total is not None and times.attention_ms else None,
                "blocks": _mean(entry.blocks for entry in group),
                "error": _finite(max(errors)) if errors else None,
                "reasons": list(dict.fromkeys(reason for entry in group for reason in entry.reasons)),
            }
        )
    return rows


def _steps(entries: list[Entry], times: Times) -> list[dict[str, Any]]:
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.step.number, []).append(entry)
    return [
        {
            "step": number,
            "sigma": group[0].step.sigma,
            "calls": len(group),
            "ran": _ran(group),
            "blocks": _mean(entry.blocks for entry in group),
            "attention_ms": times.steps.get(number, (None, None))[0],
            "step_ms": times.steps.get(number, (None, None))[1],
        }
        for number, group in groups.items()
    ]


def _map(entries: list[Entry]) -> dict[str, Any]:
    """For each layer and step the share of the blocks that was computed: 1 for dense calls of ours, None where the model's own attention
    did all."""
    layers = list(dict.fromkeys(entry.layer.name for entry in entries))
    steps = sorted({entry.step.number for entry in entries})
    cells: dict[tuple[str, int], list[float]] = {}
    for entry in entries:
        if entry.variant:
            share = entry.blocks
            cells.setdefault((entry.layer.name, entry.step.number), []).append(1.0 if share is None else share)
    return {"layers": layers, "steps": steps, "blocks": [[_mean(cells.get((layer, step), ())) for step in steps] for layer in layers]}


def _ran(entries: Iterable[Entry]) -> dict[str, int]:
    """Variant, in short, → calls; the most frequent first."""
    return dict(Counter(short(entry.variant) or OWN for entry in entries).most_common())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _finite(value: float) -> float:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else sys.float_info.max
