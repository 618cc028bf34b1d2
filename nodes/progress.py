"""The line that a node of ours shows while its model is sampled: what ran in the step before."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .record import Entry, Record

SECONDS = 0.5  # between two lines: a step of a small model is shorter, and nobody reads faster
PREFIX = "sageattn_qk_int8_pv_"


def line(node_ids: Sequence[str]) -> Callable[[Record], None] | None:
    """What a record calls at each step, to show the line on these nodes; None where there is nobody to show it to."""
    shown = [node_id for node_id in node_ids if node_id]
    server: Any = getattr(sys.modules.get("server"), "PromptServer", None)  # ComfyUI's
    if not shown or not hasattr(getattr(server, "instance", None), "send_progress_text"):
        return None
    last = 0.0

    def show(record: Record) -> None:
        nonlocal last
        now = time.monotonic()
        if record.running and now - last < SECONDS:
            return
        last = now
        said = text(record)
        for node_id in shown if said else ():
            server.instance.send_progress_text(said, node_id)

    return show


def text(record: Record) -> str:
    """What ran in the last whole step, such as "step 3, attention calls: fp8_cuda 60; 18% of the blocks"; "" before there is one."""
    entries = _last_step(record)
    if not entries:
        return ""
    counts = Counter(short(entry.variant) for entry in entries)
    own = counts.pop("", 0)
    parts = [f"{name} {count}" for name, count in counts.most_common()] + [f"the model's own {own}"] * bool(own)
    said = f"step {entries[0].step.number + 1}, attention calls: {', '.join(parts)}"
    shares = [share for entry in entries if (share := entry.blocks) is not None]
    if shares:
        said += f"; {sum(shares) / len(shares):.0%} of the blocks"
    refused = sum(record.fallbacks.values())
    return said + (f"; fallbacks: {refused}, see the log" if refused else "")


def short(variant: str) -> str:
    """A variant's name without what all have in common."""
    return variant.removeprefix(PREFIX)


def _last_step(record: Record) -> list[Entry]:
    """The calls of the last step that is over: a record tells of a step before it takes in the first call."""
    entries = record.entries
    return list(itertools.takewhile(lambda entry: entry.step is entries[-1].step, reversed(entries)))[::-1]
