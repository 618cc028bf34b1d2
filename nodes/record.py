"""What an override did, call by call: how often each variant ran, and why the model's own attention ran instead."""

from __future__ import annotations

import logging
import threading
from collections import Counter

LOG = logging.getLogger("PatchSageAttention")  # ComfyUI shows messages without this name, so each says it itself

# A reason may name a shape, and a long session sees many shapes: those after this many count together.
MAX_REASONS = 64
OTHER_REASONS = "further reasons, no longer told apart"


class Record:
    """Counts of one override, safe to read and to write from any thread.

    Attributes:
        ran: variant → calls that it computed.
        kept: reason → calls left to the model's own attention on purpose: the model asked for full precision, or "auto" saw
            that quantising gains nothing.
        fallbacks: reason → calls that the variant refused, so that the model's own attention had to do them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ran: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()

    def count_run(self, variant: str) -> None:
        """Count a call that a variant computed; the first one is logged."""
        with self._lock:
            self.ran[variant] += 1
            first = self.ran[variant] == 1
        if first:
            LOG.info("PatchSageAttention: attention runs on %s", variant)

    def count_kept(self, reason: str) -> None:
        """Count a call that is the model's own attention's by choice; the first one of a reason is logged."""
        if self._first(self.kept, reason):
            LOG.info("PatchSageAttention: left to the model's own attention: %s", reason)

    def count_fallback(self, reason: str, where: str) -> None:
        """Count a call that the variant refused; the first one of a reason is logged, with the layer it came from."""
        if self._first(self.fallbacks, reason):
            LOG.warning("PatchSageAttention: fell back to the model's own attention%s: %s (said once)", where and f" in {where}", reason)

    def _first(self, counter: Counter[str], reason: str) -> bool:
        with self._lock:
            if reason not in counter and len(counter) >= MAX_REASONS:
                reason = OTHER_REASONS
            counter[reason] += 1
            return counter[reason] == 1

    def as_dict(self) -> dict[str, dict[str, int]]:
        """A copy of all counts, as plain data."""
        with self._lock:
            return {"ran": dict(self.ran), "kept": dict(self.kept), "fallbacks": dict(self.fallbacks)}

    def reset(self) -> None:
        """Start counting (and logging) anew."""
        with self._lock:
            for counter in (self.ran, self.kept, self.fallbacks):
                counter.clear()
