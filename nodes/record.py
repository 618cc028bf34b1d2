"""What happened to a model's attention: counts since it was patched, and call by call what ran in its last sampling.

One record belongs to one patched model, and lives in its `transformer_options`, so that all overrides of ours write into it, also one
that another pack's override calls. An override's part is

    entry = record_of(options, default).open(options, q, k, heads, skip_reshape, mask is not None)
    try:
        …  entry.ran(variant), entry.kept(reason), entry.fell_back(reason), entry.pass_on(reason)
    finally:
        entry.close()

with the attention that it passes the call on to inside. Where that is another override of ours, it is given the same entry: one
attention call is one entry, whoever computes it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ..sageattention.memo import Memo
from .sampling import Layer, Sampling, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..sageattention.dispatch import Call
    from ..sageattention.planning.plan import Plan

LOG = logging.getLogger("PatchSageAttention")  # ComfyUI shows messages without this name, so each says it itself
PATCH = "PatchSageAttention"
KEY = "sageattention_record"  # in transformer_options

# A reason may name a shape, and a long session sees many shapes: those after this many count together.
MAX_REASONS = 64
OTHER_REASONS = "further reasons, no longer told apart"
MAX_ENTRIES = 100_000  # of one sampling; 50 steps of a model with 60 blocks make 12,000
# Two events a call cost the host 6 µs and more, and a model with hundreds of short calls a step, such as SDXL, is bound by the host. So
# calls are timed in these steps only, and of TIMED_OF_ALIKE calls that are alike one is: they take equally long. How long a step takes is
# known of all steps.
TIMED_STEPS = frozenset({0, 1, 4, 12, 32})
TIMED_OF_ALIKE = 16


class Entry:
    """One attention call of one sampling.

    Attributes:
        step, layer: where it stands.
        q_shape, k_shape, dtype, device, heads, hnd: the call's, as ComfyUI made it: [B, L, heads·D], or [B, heads, L, D] where `hnd`.
        masked: whether it came with a mask.
        variant: what computed it; "" for the model's own attention.
        kernel: the kernel's symbol, or the name of the attention behind ours.
        plan: by which a dense variant computed it.
        reasons: why those that did not compute it did not.
        error: relative L2 of the worst head, where the guard measured.
        exact: what computes the call has to be unquantised.
        begin, end: on the clock of the device, of timed calls.
        untimed: calls like this one that were not timed in steps that are.
    """

    __slots__ = (
        "_depth", "_record", "_share", "begin", "device", "dtype", "end", "error", "exact", "heads", "hnd", "k_shape", "kernel", "layer",
        "masked", "plan", "q_shape", "reasons", "step", "untimed", "variant",
    )  # fmt: skip

    def __init__(
        self, record: Record, step: Step, layer: Layer, q: torch.Tensor, k: torch.Tensor, heads: int | None, hnd: bool, masked: bool
    ):  # fmt: skip
        self._record, self._depth = record, 1
        self.step, self.layer = step, layer
        self.q_shape, self.k_shape, self.dtype, self.device = q.shape, k.shape, q.dtype, q.device
        self.heads, self.hnd, self.masked = heads, hnd, masked
        self.variant, self.kernel, self.exact = "", "", False
        self.reasons: tuple[str, ...] = ()
        self._share: float | torch.Tensor | None = None
        self.error: float | None = None
        self.begin: Clock | None = None
        self.end: Clock | None = None
        self.plan: Plan | None = None
        self.untimed = 0

    @property
    def sampling(self) -> Sampling:
        return self._record.sampling

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls have in common that last as long as each other."""
        return self.q_shape, self.k_shape, self.dtype, self.device, self.heads, self.masked, self.variant, self.kernel, self.reasons

    @property
    def blocks(self) -> float | None:
        """The share of the blocks that was computed, 0 to 1; None for dense attention, and until the device has told."""
        share = self._share
        if share is None:
            return None
        share = float(share)
        return None if math.isnan(share) else share

    def ran(self, variant: str, *, kernel: str = "", share: float | torch.Tensor | None = None, node: str = PATCH) -> None:
        """A variant of ours computed the call.

        Args:
            kernel: more exactly, where there is more to say.
            share: of the blocks computed, 0 to 1, a number or a scalar on the device.
        """
        self.variant, self.kernel, self._share = variant, kernel, _on_host(share)
        self._record.count_run(variant, node)

    def computed(self, call: Call) -> None:
        """A dense call of ours was computed by its plan."""
        self.planned(call)
        self._record.count_run(self.variant)

    def planned(self, call: Call) -> None:
        """As `computed`, but not counted."""
        self.plan = call.plan
        self.variant, self.kernel = call.plan.variant.name, getattr(call.plan, "attend", "")

    def kept(self, reason: str, node: str = PATCH) -> None:
        """The call is the model's own attention's by choice."""
        self.reasons += (reason,)
        self._record.count_kept(reason, node)

    def stands_for_alike(self, owner: object) -> None:
        """What became of this call by `owner` and the attention behind it becomes of all that are like it, until the sampling is over:
        `Record.alike` has it for them."""
        if self._depth == 1 and len(self.reasons) == (0 if self.variant else 1):  # nobody in front of the owner has a part in it
            self._record.stand_for_alike(owner, self)

    def times_another(self) -> bool:
        """Whether it is the turn of a call like this one, in a step that is timed, to be timed: then that one is opened as any other, and
        will stand for the next."""
        self.untimed += 1
        return self.untimed >= TIMED_OF_ALIKE

    def fell_back(self, reason: str, node: str = PATCH) -> None:
        """The variant refused the call."""
        self.reasons += (reason,)
        self._record.count_fallback(reason, self.layer.name, node)

    def pass_on(self, reason: str) -> None:
        """An override of ours leaves the call to the attention behind it, which may be ours, too."""
        self.reasons += (reason,)

    def hand_over(self) -> None:
        """The call goes on to another override of ours after this entry's end: the entry of that one counts, with these reasons."""
        self._record.hand_over(self)

    def close(self) -> None:
        """The call is over."""
        self._depth -= 1
        if not self._depth:
            if self.begin is not None:
                self.end = now(self.device)
            self._record.closed()


class Again(Entry):
    """An entry that differs from an earlier one in nothing but where it stands, and is not timed."""

    __slots__ = ("_like",)
    begin = end = None

    def __init__(self, like: Entry, step: Step, layer: Layer):
        self._like, self.step, self.layer = like, step, layer

    def __getattr__(self, name: str) -> Any:
        """All that is not set here."""
        return getattr(self._like, name)


def _on_host(share: float | torch.Tensor | None) -> float | torch.Tensor | None:
    """The share where it can be read without waiting: not a number, until it has come from the device. A CUDA graph tells none."""
    if not isinstance(share, torch.Tensor) or not share.is_cuda:
        return share
    if torch.cuda.is_current_stream_capturing():
        return None
    host = torch.full((), math.nan, dtype=torch.float32, device="cpu", pin_memory=True)
    return host.copy_(share, non_blocking=True)


class Clock:
    """A moment on a device, taken without waiting for it.

    Attributes:
        device: the torch device; a CPU's clock is the host's.
    """

    __slots__ = ("_event", "_seconds", "device")

    def __init__(self, device: torch.device):
        self.device, self._event, self._seconds = device, None, 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._seconds = time.perf_counter()

    def ms_since(self, earlier: Clock) -> float:
        """Milliseconds from `earlier`, of the same device; waits until the device has got here."""
        if self._event is None or earlier._event is None:
            return 1e3 * (self._seconds - earlier._seconds)
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event)


def now(device: torch.device) -> Clock | None:
    """This moment; None while a CUDA graph is captured, whose events tell no time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    return Clock(device)


class _Here(threading.local):
    """What each thread is at: its open entry, and reasons for the next one."""

    entry: Entry | None = None
    reasons: tuple[str, ...] = ()


class Record:
    """Counts and calls of one patched model, safe to read and to write from any thread.

    Attributes:
        ran: variant → calls that it computed.
        kept: reason → calls left to the model's own attention on purpose: the model asked for full precision, "auto" saw that
            quantising gains nothing, the schedule left the call out, or the guard found it off.
        fallbacks: reason → calls that the variant refused, so that the model's own attention had to do them.
        sampling, entries: the last sampling, and its calls; those after `MAX_ENTRIES` are counted only.
        calls: the same; a call like an earlier one may be only a tuple of that one's entry, its step, its number in the pass, and what its
            options tell of its layer, as `Sampling.named` takes it.
        alike: (override, q's shape, k's, dtype, device, heads, whether it is masked, whether it has to be exact) → the entry of a call that
            such calls of this sampling are like.
        begun, running: whether there was a sampling, and whether it goes on. Calls outside of one are counted only.
        starts: step → when its first call began; after the last one, when the sampling was over.
        notes: what else happened in it, in sentences.
        on_step: called as each step begins, and at the end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = _Here()
        self._ran: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.sampling = Sampling()
        self.calls: list[Any] = []
        self._unpacked = 0  # length of the front part of `calls` that `_unpack` has turned into entries
        self.alike: Memo[tuple[Any, ...], Entry] = Memo()
        self.notes: list[str] = []
        self.starts: dict[int, Clock | None] = {}
        self.begun = self.running = False
        self.on_step: Callable[[Record], None] | None = None

    @property
    def entries(self) -> list[Entry]:
        with self._lock:
            self._unpack()
            return self.calls[:]

    @property
    def ran(self) -> Counter[str]:
        with self._lock:
            self._unpack()
            return self._ran

    @property
    def kept(self) -> Counter[str]:
        with self._lock:
            self._unpack()
            return self._kept

    def _unpack(self) -> None:
        """Make entries of all `calls`, and count those. The lock is held."""
        calls = self.calls
        for at in range(self._unpacked, len(calls)):
            if type(calls[at]) is tuple:
                like, step, number, *told = calls[at]
                calls[at] = Again(like, step, self.sampling.named(number, *told))
                if like.variant:
                    self._ran[like.variant] += 1
                else:
                    _add(self._kept, like.reasons[0])
        self._unpacked = len(calls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """Itself: a clone of a patched model deep-copies its options, and what happened should stay in one place."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts anew."""
        return Record, ()

    def begin(self, percent_to_sigma: Callable[[float], float] | None = None) -> None:
        """A sampling begins: forget the calls of the one before. Counts go on."""
        with self._lock:
            self._unpack()
            self.sampling, self.calls, self._unpacked, self.alike = Sampling(percent_to_sigma), [], 0, Memo()
        self.notes, self._here, self.starts, self.begun, self.running = [], _Here(), {}, True, True

    def end(self) -> None:
        """The sampling is over, be it that it was interrupted."""
        if self.calls:
            self.starts[self.sampling.steps] = now(self.entries[-1].device)
        self.running, self.alike = False, Memo()
        self.sampling.percent_to_sigma = None  # which holds on to the model
        if self.on_step is not None:
            self.on_step(self)

    def open(
        self, options: dict[str, Any] | None, q: torch.Tensor, k: torch.Tensor, heads: int | None, hnd: bool, masked: bool
    ) -> Entry:  # fmt: skip
        """A call begins, or, where an override of ours has opened it already, goes on to another one."""
        here = self._here
        if here.entry is not None:
            here.entry._depth += 1
            return here.entry
        options = options if isinstance(options, dict) else {}
        step = self.sampling.step(options)
        entry = here.entry = Entry(self, step, self.sampling.layer(options, step), q, k, heads, hnd, masked)
        if here.reasons:
            entry.reasons, here.reasons = here.reasons, ()
        if self.running:
            if not step.begun:
                self._step_begins(step, entry)
            if len(self.calls) < MAX_ENTRIES:
                self.calls.append(entry)
                if step.timed:
                    entry.begin = now(entry.device)
            else:
                self.alike = Memo()  # the next ones come here, too
        return entry

    def stand_for_alike(self, owner: object, entry: Entry) -> None:
        """As of the entry's."""
        if self.running and len(self.calls) < MAX_ENTRIES:
            with contextlib.suppress(TypeError):  # symbolic sizes have no hash
                self.alike[owner, entry.q_shape, entry.k_shape, entry.dtype, entry.device, entry.heads, entry.masked, False] = entry

    def _step_begins(self, step: Step, entry: Entry) -> None:
        step.begun, step.timed = True, step.number in TIMED_STEPS
        self.starts.setdefault(step.number, now(entry.device))
        if self.on_step is not None:
            self.on_step(self)

    def hand_over(self, entry: Entry) -> None:
        """Called by the entry that is open: the next one takes its place."""
        self._here.reasons = entry.reasons
        with self._lock:
            for at in range(len(self.calls) - 1, -1, -1):  # the last one, or nearly so where several devices share the work
                if self.calls[at] is entry:
                    del self.calls[at]
                    self._unpacked -= at < self._unpacked
                    break

    def closed(self) -> None:
        """Called by the entry that was open."""
        self._here.entry = None

    def note(self, sentence: str, node: str = PATCH) -> None:
        """Remember, and log, something that is no single call's; once a sampling."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            LOG.warning("%s: %s", node, sentence)

    def count_run(self, variant: str, node: str = PATCH) -> None:
        """Count a call that a variant computed; the first one is logged."""
        with self._lock:
            self._ran[variant] += 1
            first = self._ran[variant] == 1
        if first:
            LOG.info("%s: attention runs on %s", node, variant)

    def count_kept(self, reason: str, node: str = PATCH) -> None:
        """Count a call that is the model's own attention's by choice; the first one of a reason is logged."""
        if self._first(self._kept, reason):
            LOG.info("%s: left to the model's own attention: %s", node, reason)

    def count_fallback(self, reason: str, where: str, node: str = PATCH) -> None:
        """Count a call that the variant refused; the first one of a reason is logged, with the layer it came from."""
        if self._first(self.fallbacks, reason):
            LOG.warning("%s: fell back to the model's own attention%s: %s (said once)", node, where and f" in {where}", reason)

    def _first(self, counter: Counter[str], reason: str) -> bool:
        with self._lock:
            return _add(counter, reason) == 1

    def as_dict(self) -> dict[str, dict[str, int]]:
        """A copy of all counts, as plain data."""
        with self._lock:
            self._unpack()
            return {"ran": dict(self._ran), "kept": dict(self._kept), "fallbacks": dict(self.fallbacks)}

    def reset(self) -> None:
        """Start counting (and logging) anew."""
        with self._lock:
            self._unpack()
            self.alike = Memo()
            for counter in (self._ran, self._kept, self.fallbacks):
                counter.clear()


def _add(counter: Counter[str], reason: str) -> int:
    """Count a reason; how often it has been counted."""
    if reason not in counter and len(counter) >= MAX_REASONS:
        reason = OTHER_REASONS
    counter[reason] += 1
    return counter[reason]


def record_of(options: Any, default: Record) -> Record:
    """The record of the model that a call with these `transformer_options` comes from; `default` where there is none."""
    return (options.get(KEY) or default) if isinstance(options, dict) else default
