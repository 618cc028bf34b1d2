"""Times a model's own attention shapes: every variant that is ready, dense and sparse, beside the attentions that ComfyUI has."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from ..sageattention import KernelMissing, Unsupported, available_variants, sageattn, sageattn_sparse
from ..sageattention.cli import workloads
from ..sageattention.cli.text import table
from ..sageattention.cli.timing import gpu_ms
from ..sageattention.cli.workloads import Shape
from ..sageattention.variants import VARIANTS
from .exactness import worst_head
from .progress import short
from .record import Entry

PYTORCH, SPARSE = "pytorch", "sparse, tau 1"
SKIPPED = ("pytorch", "sub_quad", "split", "sage")  # of ComfyUI's functions: timed anyway, never faster, or ours
SECONDS = 50.0  # for all; the last call may end a little later
TURNS = 5  # that each attention takes
MAX_SHAPES = 8
SPARSE_FROM = 4096  # tokens: below there are too few blocks to choose from
CPU_FLOPS = 5e8  # a call of more would take a CPU, where kernels are emulated, too long
HIDDEN = 8  # a masked call's mask hides the last eighth of the keys, as one that pads a text does


class Case(NamedTuple):
    """Attention calls that are alike.

    Attributes:
        calls: in a step.
    """

    shape: Shape
    dtype: torch.dtype
    masked: bool
    calls: float

    @property
    def work(self) -> float:
        return self.shape.flops * self.calls


@dataclass
class Row:
    """One attention on one case.

    Attributes:
        ms: a call; None where `note` says why.
        ratio: PyTorch's time over this one's.
        error: relative L2 of the worst head; None for sparse attention, whose aim is another one on such inputs.
    """

    case: str
    calls: float
    attention: str
    ms: float | None = None
    ratio: float | None = None
    error: float | None = None
    note: str = ""
    times: list[float] = field(default_factory=list)


def cases(entries: Iterable[Entry]) -> list[Case]:
    """The calls of a sampling, the most work first."""
    found: dict[tuple[Shape, torch.dtype, bool], int] = {}
    steps = set()
    for entry in entries:
        shape = _shape(entry)
        if shape is not None:
            steps.add(entry.step.number)
            key = shape, entry.dtype, entry.masked
            found[key] = found.get(key, 0) + 1
    all_cases = [Case(*key, count / len(steps)) for key, count in found.items()]
    return sorted(all_cases, key=lambda case: -case.work)


def _shape(entry: Entry) -> Shape | None:
    q, k, heads = entry.q_shape, entry.k_shape, entry.heads
    if entry.hnd and len(q) == len(k) == 4:
        dims = (q[0], q[1], q[2], k[2], q[3])
        heads_kv = k[1]
    elif len(q) == len(k) == 3 and isinstance(heads, int) and heads > 0 and q[2] >= heads:
        dims = (q[0], heads, q[1], k[1], q[2] // heads)
        heads_kv = k[2] // dims[4]
    else:
        return None
    return Shape("x".join(map(str, dims)), *dims, heads_kv=heads_kv if heads_kv != dims[1] else 0)


class Benchmark:
    """Times cases on a device.

    Args:
        tick: called once for each attention of each case.
        pause: called before each call; may raise, to interrupt.
        make_room: called with the bytes that a case needs.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        tick: Callable[[], object] = lambda: None,
        pause: Callable[[], object] = lambda: None,
        make_room: Callable[[int], object] = lambda size: None,
    ):
        self.device = device
        self._tick, self._pause, self._make_room = tick, pause, make_room
        self._deadline = time.monotonic() + SECONDS
        self.attentions = _attentions(device)

    def ticks(self, given: list[Case]) -> int:
        """How often `run` will tick."""
        return len(given[:MAX_SHAPES]) * len(self.attentions)

    def run(self, given: list[Case]) -> list[Row]:
        """A row for each case and attention, PyTorch's first."""
        rows = []
        for case in given[:MAX_SHAPES]:
            rows += self._case(case)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return rows

    def _case(self, case: Case) -> list[Row]:
        shape = case.shape
        rows = [Row(shape.name + (" masked" if case.masked else ""), case.calls, name) for name in self.attentions]
        why = ""
        if self.device.type != "cuda" and shape.flops > CPU_FLOPS:
            why = "too long for a CPU"
        elif time.monotonic() > self._deadline:
            why = "no time was left"
        if not why:
            self._make_room(6 * shape.batch * shape.heads * max(shape.len_q, shape.len_kv) * shape.head_dim * case.dtype.itemsize)
            try:
                q, k, v = workloads.make("normal", shape, dtype=case.dtype, device=self.device)
            except torch.OutOfMemoryError:
                why = "the card's memory is too small for it"
        if why:
            for row in rows:
                row.note = why
                self._tick()
            return rows
        mask = None
        if case.masked:
            mask = torch.arange(shape.len_kv, device=self.device) < shape.len_kv - shape.len_kv // HIDDEN
            mask = mask.view(1, 1, 1, -1)
        ready = []
        for row in rows:
            self._pause()
            try:
                if time.monotonic() > self._deadline:
                    row.note = "no time was left"
                else:
                    self._first(row, q, k, v, mask)
                    ready.append(row)
            except (Unsupported, KernelMissing) as refusal:
                row.note = str(refusal)
            except torch.OutOfMemoryError:
                row.note = "the card's memory is too small for it"
            self._tick()
        share = SECONDS / MAX_SHAPES / max(1, len(ready))
        for _ in range(TURNS):
            for row in ready:  # in turn, so that clocks and temperature favour none
                if time.monotonic() < self._deadline and sum(row.times) < 1e3 * share:
                    self._pause()
                    row.times.append(self._ms(row.attention, q, k, v, mask))
        for row in ready:
            row.ms = statistics.median(row.times) if row.times else None
            row.note = row.note or ("" if row.times else "no time was left")
        own = next((row.ms for row in rows if row.attention == PYTORCH), None)
        for row in ready:
            row.ratio = own / row.ms if own and row.ms else None
        return rows

    def _first(self, row: Row, *call: Any) -> None:
        """Untimed: kernels are loaded, and the error is measured."""
        q, k, v, mask = call
        out = self.attentions[row.attention](q, k, v, mask)
        if isinstance(out, tuple):
            out, share = out
            row.note = f"{float(share):.1%} of the blocks"
        else:
            row.error = worst_head(out, q, k, v, mask, q.shape[-1] ** -0.5)

    def _ms(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> float:
        attention = self.attentions[name]
        if self.device.type == "cuda":
            return gpu_ms(lambda: attention(q, k, v, mask))
        begun = time.perf_counter()
        attention(q, k, v, mask)
        return 1e3 * (time.perf_counter() - begun)


def _attentions(device: torch.device) -> dict[str, Callable[..., Any]]:
    """By name, PyTorch's first; each is called with q, k and v [B, H, N, D] and a mask or None."""
    module: Any = sys.modules.get("comfy.ldm.modules.attention")
    found: dict[str, Callable[..., Any]] = {PYTORCH: _pytorch(module.attention_pytorch) if module else _torch}
    for name, function in (module.REGISTERED_ATTENTION_FUNCTIONS if module else {}).items():
        if name not in SKIPPED and not name.startswith("sage_"):
            found[name] = _of_comfyui(function)
    ready = [a.name for a in available_variants(device) if a.status == "ready" and VARIANTS[a.name].has_kernels]
    for name in ready or ["reference"]:
        found[short(name)] = _ours(name)
    found[SPARSE] = _sparse
    return found


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Any:
    return sageattn(q, k, v, attn_mask=mask, variant="sdpa")


def _pytorch(function: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's attention as ComfyUI calls it, which says what backends PyTorch is to try first; where k has fewer heads, by itself."""
    whole = _of_comfyui(function)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return (whole if q.shape[1] == k.shape[1] else _torch)(q, k, v, mask)

    return call


def _of_comfyui(function: Callable[..., Any]) -> Callable[..., Any]:
    bare = getattr(function, "__wrapped__", function)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if q.shape[1] != k.shape[1]:
            raise Unsupported("k", "fewer heads than q are not handed to it")
        return bare(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True)

    return call


def _ours(variant: str) -> Callable[..., Any]:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return sageattn(q, k, v, attn_mask=mask, variant=variant)

    return call


def _sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Any:
    if mask is not None:
        raise Unsupported("attn_mask", "block-sparse attention takes none")
    if q.shape[2] != k.shape[2] or q.shape[2] < SPARSE_FROM:
        raise Unsupported("q", f"block-sparse attention is for self attention of {SPARSE_FROM:,} tokens and more")
    return sageattn_sparse(q, k, v, selection="sol", tau=1.0, return_share=True)


def a_step(rows: list[Row]) -> dict[str, float]:
    """Attention → ms of a step's calls, where PyTorch's does those that this one can't; empty where not all of PyTorch's are timed."""
    own = {row.case: row.ms for row in rows if row.attention == PYTORCH}
    if not all(own.values()):
        return {}
    able = dict.fromkeys(row.attention for row in rows if row.ms)
    return {
        name: sum((row.ms or own[row.case] or 0) * row.calls for row in rows if row.attention == name) for name in able
    }  # fmt: skip


def text(device: str, rows: list[Row]) -> str:
    """A table, and what a step's attention takes."""
    cells = [
        (row.case, f"{row.calls:g}", row.attention, _f(row.ms, ".3f"), _f(row.ratio, ".2f"), _f(row.error, ".4f"), row.note)
        for row in rows
    ]  # fmt: skip
    head = ("batch x heads x queries x keys x dim", "a step", "attention", "ms", "x pytorch", "error", "")
    total = ", ".join(f"{name} {ms:.1f} ms" for name, ms in sorted(a_step(rows).items(), key=lambda item: item[1]))
    return f"Attention on {device}, random inputs\n\n{table(head, cells, numeric=(1, 3, 4, 5))}" + (f"\n\nA step: {total}" if total else "")


def as_dict(device: str, rows: list[Row]) -> dict[str, Any]:
    """As plain data."""
    return {"device": device, "rows": [asdict(row) for row in rows], "step_ms": a_step(rows)}


def _f(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
