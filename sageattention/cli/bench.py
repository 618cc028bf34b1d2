"""`bench`: the ready variants beside torch's SDPA backends, in one run, from q, k, v to the output.

Every time is the median over repeats in which the candidates take turns, so that clocks and temperature favour nobody. "event" is the
time between two CUDA events around eager calls, launch gaps included; "graph" is the same calls replayed from a CUDA graph, without
them (not taken where a call is so long that they don't show). TFLOPS are 4·B·H·Nq·Nk·D over the graph time (the event time where there
is none), masked pairs included; "× cuDNN" compares with torch's cuDNN backend in the same run, or with the fastest other one on a card
that cuDNN does not serve. With `--masks` each shape is also timed with the masks that models hand over: "of plain" is the time over
that without a mask. "extra" is the peak of allocated memory beyond q, k, v and the output. The error is the relative L2 against fp64 on
a sample of rows: a fast wrong answer shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import KernelMissing, Unsupported
from ..variants import Candidate
from . import sparse_forms, workloads
from .candidates import SDPA_BACKENDS, Attention, chosen_device, ready, sdpa_backend, variant
from .mask_forms import MASK_FORMS, MaskForm
from .text import table
from .timing import gpu_ms
from .workloads import MODELS, SHAPES, Shape

if TYPE_CHECKING:
    import torch

BASELINE = "sdpa_cudnn"
TINY = Shape("tiny", 1, 2, 128, 128, 64)  # the GPU is done with it before the host is: what is left is the host's time
HOST_WARM_UP, HOST_LIMIT = 0.1, 1.0  # s of each candidate: unmeasured, and at most measured
HOST_CALLS, HOST_TURNS = 10, 101
QUICK_SHAPES = ("flux_512", "flux_1024")
LONG_MS = 5.0  # beside a call of this length its launch gaps are nothing: no graph is timed
MIB = 1 << 20


@dataclass
class Row:
    """One candidate on one shape; times in ms, memory in MiB. `skipped` says why there are none."""

    shape: str
    candidate: str
    mask: str = ""  # a name of MASK_FORMS, "" without one
    runs: str = ""  # what "auto" chose
    event_ms: float | None = None
    graph_ms: float | None = None
    tflops: float | None = None
    event_ratio: float | None = None  # the baseline's time over this one's
    graph_ratio: float | None = None
    of_plain: float | None = None  # this one's time over its own without a mask
    extra_mib: float | None = None
    error: float | None = None
    skipped: str = ""
    graph_refused: str = ""
    baseline: str = ""  # the backend that the ratios compare with
    events: list[float] = field(default_factory=list)
    graphs: list[float] = field(default_factory=list)


def parse_shape(text: str) -> Shape:
    """A named shape, or one written as BxHxNqxNkxD.

    Raises:
        Unsupported: neither.
    """
    named = SHAPES | MODELS
    if text in named:
        return named[text]
    if re.fullmatch(r"\d+(x\d+){4}", text):
        batch, heads, len_q, len_kv, head_dim = map(int, text.split("x"))
        return Shape(text, batch, heads, len_q, len_kv, head_dim)
    raise Unsupported("--shapes", f"got {text!r}, accepted are BxHxNqxNkxD and {', '.join(named)}")


def time_shape(
    shape: Shape, candidates: list[Attention], device: torch.device, *, kind: str, repeats: int, budget_ms: float,
    form: MaskForm | None = None,
) -> list[Row]:  # fmt: skip
    """Time every candidate on one shape.

    Args:
        kind: the input kind, of `workloads.KINDS`.
        form: how the call is masked.
        repeats: turns that each candidate takes.
        budget_ms: how long one turn of one candidate may last, which sets the calls in it (at least one).
    """
    import torch

    try:
        q, k, v = workloads.make(kind, shape, dtype=dtype_of(device), device=device)
        keywords = form.keywords(shape, q.dtype, device) if form else {}
        sample, exact = _exact_sample(q, k, v, **keywords)
    except torch.cuda.OutOfMemoryError:
        full = "the card's memory is too small for this shape"
        return [Row(shape.name, candidate.name, form.name if form else "", skipped=full) for candidate in candidates]
    rows, timers = [], []
    for candidate in candidates:
        row = Row(shape.name, candidate.name, form.name if form else "")
        rows.append(row)
        try:
            with candidate.context():
                out = candidate.call(q, k, v, **keywords)
            torch.cuda.synchronize(device)
        except (Unsupported, KernelMissing) as refused:
            row.skipped = str(refused)
            continue
        except torch.cuda.OutOfMemoryError as error:
            row.skipped = str(error).splitlines()[0]
            continue
        except RuntimeError as error:  # how SDPA refuses a backend
            if candidate.name not in SDPA_BACKENDS:
                raise
            row.skipped = str(error).splitlines()[0]
            continue
        row.error = workloads.relative_l2(sample(out), exact)
        del out
        if candidate.name == "auto":
            from .. import api

            explanation = api.explain(q, k, v, **keywords)
            row.runs = str(Candidate(explanation.variant, explanation.accum))
        row.extra_mib = _extra_memory(candidate, q, k, v, keywords)
        timers.append(_Timer(row, candidate, (q, k, v), keywords, budget_ms))
    for _ in range(repeats):
        for timer in timers:
            timer.turn()
    _summarise(rows, shape)
    return rows


class _Timer:
    """One candidate's turns on one shape, eager and as a CUDA graph."""

    def __init__(self, row: Row, candidate: Attention, qkv: tuple[torch.Tensor, ...], keywords: dict[str, Any], budget_ms: float):
        self.row, self.candidate, self.qkv, self.keywords = row, candidate, qkv, keywords
        self.calls = 1
        once = min(self._events() for _ in range(3))  # also compiles what has to be compiled
        self.calls = max(1, min(50, math.floor(budget_ms / max(once, 1e-3))))
        self.graph = self._capture() if once < LONG_MS else None

    def turn(self) -> None:
        """Time the candidate, each time after as long untimed: a card's clock follows what it has just been doing."""
        self._events()
        self.row.events.append(self._events())
        if self.graph is not None:
            gpu_ms(self.graph.replay)
            self.row.graphs.append(gpu_ms(self.graph.replay) / self.calls)

    def _events(self) -> float:
        with self.candidate.context():
            return gpu_ms(self._eager) / self.calls

    def _eager(self) -> None:
        for _ in range(self.calls):
            self.candidate.call(*self.qkv, **self.keywords)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.candidate.context():
            self.candidate.call(*self.qkv, **self.keywords)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph, stream=stream), self.candidate.context():
                self._eager()
        except RuntimeError as error:  # a candidate that can't be captured still has its event time
            self.row.graph_refused = str(error).splitlines()[0]
            torch.cuda.synchronize()
            return None
        graph.replay()
        torch.cuda.synchronize()
        return graph


def _summarise(rows: list[Row], shape: Shape) -> None:
    for row in rows:
        row.event_ms = statistics.median(row.events) if row.events else None
        row.graph_ms = statistics.median(row.graphs) if row.graphs else None
        best = row.graph_ms or row.event_ms
        row.tflops = shape.flops / best / 1e9 if best else None
    backends = [row for row in rows if row.candidate in SDPA_BACKENDS and row.event_ms]
    base = min(backends, key=lambda row: (row.candidate != BASELINE, row.event_ms), default=None)
    for row in rows:
        row.baseline = base.candidate if base else ""
        if base and base.event_ms and row.event_ms:
            row.event_ratio = base.event_ms / row.event_ms
        if base and base.graph_ms and row.graph_ms:
            row.graph_ratio = base.graph_ms / row.graph_ms


def dtype_of(device: torch.device) -> torch.dtype:
    """What models run in: bf16, but fp16 before Ampere, which emulates bf16."""
    import torch

    turing = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if turing else torch.bfloat16


def _of_plain(rows: list[Row], plain: list[Row]) -> None:
    for row, other in zip(rows, plain):
        for ms, without in ((row.event_ms, other.event_ms), (row.graph_ms, other.graph_ms)):  # the graph's, where both have one
            if ms and without:
                row.of_plain = ms / without


def _exact_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """(out → the sampled rows, their exact value): 64 rows of the first and the last head."""
    import torch

    from ..numerics.reference import oracle
    from ..numerics.rows import spread

    heads = torch.tensor(sorted({0, q.shape[1] - 1}), device=q.device)
    rows = spread(q.shape[2], 64, q.device)

    def sample(t: torch.Tensor) -> torch.Tensor:
        return t[:1].index_select(1, heads).index_select(2, rows)

    group = q.shape[1] // k.shape[1]
    mask = None
    if is_causal:
        mask = torch.arange(k.shape[2], device=q.device) <= rows[:, None]
    elif attn_mask is not None:
        mask = sample(attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], -1))
    return sample, oracle(sample(q), k[:1].index_select(1, heads // group), v[:1].index_select(1, heads // group), attn_mask=mask)[0]


def _extra_memory(candidate: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keywords: dict[str, Any]) -> float:
    """Peak of allocated memory during a call beyond its output, in MiB."""
    import torch

    torch.cuda.synchronize(q.device)
    torch.cuda.reset_peak_memory_stats(q.device)
    before = torch.cuda.memory_allocated(q.device)
    with candidate.context():
        out = candidate.call(q, k, v, **keywords)
    torch.cuda.synchronize(q.device)
    return (torch.cuda.max_memory_allocated(q.device) - before - out.numel() * out.element_size()) / MIB


def host_times(
    candidates: list[Attention], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float | None]:
    """Median host time of a call on a tiny shape, in µs, by candidate; None where it can't do it.

    Once each has warmed up – nothing is loaded, built or first allocated any more, and the processor is at its clock – the candidates
    take turns of so few calls that the queue never fills, each turn on an idle GPU.
    """
    import torch

    q, k, v = workloads.make("normal", TINY, dtype=dtype_of(device), device=device)

    def turn(candidate: Attention) -> float:
        with candidate.context():
            torch.cuda.synchronize(device)
            start = clock()
            for _ in range(HOST_CALLS):
                candidate.call(q, k, v)
            return clock() - start

    found: dict[str, float | None] = dict.fromkeys((candidate.name for candidate in candidates), None)
    turns: dict[str, list[float]] = {}
    collects = gc.isenabled()
    gc.disable()  # as timeit does: a collection is nobody's own time
    try:
        for candidate in candidates:
            try:
                turn(candidate)
                end = clock() + HOST_WARM_UP
                while clock() < end:
                    turn(candidate)
            except (RuntimeError, Unsupported):  # its reason is told where the shapes are timed
                continue
            turns[candidate.name] = []
        for _ in range(HOST_TURNS):
            for candidate in candidates:
                taken = turns.get(candidate.name)
                if taken is not None and sum(taken) < HOST_LIMIT:
                    taken.append(turn(candidate))
    finally:
        if collects:
            gc.enable()
    return found | {name: 1e6 * statistics.median(taken) / HOST_CALLS for name, taken in turns.items()}


def measure(
    device: torch.device, shapes: list[Shape], named: list[Attention], *, peaked: bool = False, quick: bool = False, masks: bool = False,
    sparse: bool = False,
    begun: Callable[[dict[str, Any]], None] = lambda report: None, told: Callable[[str, list[Row]], None] = lambda title, rows: None,
) -> dict[str, Any]:  # fmt: skip
    """Time `named`, or else `auto` and every ready variant, beside torch's backends on a GPU, as plain data.

    Args:
        sparse: block-sparse calls, on inputs with structure.
        begun: called with what is known before the first shape.
        told: called with each shape's title and rows.
    """
    import torch

    torch.cuda.set_device(device.index or 0)
    found, refused = (named, []) if named else ready(device)
    ours = found if named else [variant("auto"), *(c for c in found if c.name not in ("sdpa", "reference"))]
    if sparse:
        ours = [variant("auto"), *sparse_forms.candidates([c.name for c in named] or ["auto"])]
    candidates = [*map(sdpa_backend, SDPA_BACKENDS), *ours]
    kind = "video" if sparse else "logits6" if peaked else "normal"
    dtype = str(dtype_of(device)).removeprefix("torch.")
    report: dict[str, Any] = {"machine": _machine(device), "kind": kind, "dtype": dtype, "not_run": dict(refused)}
    report["host_us"] = host_times(candidates, device)  # first, before the card is hot
    report["rows"] = measured = []
    begun(report)
    for shape in shapes:
        plain: list[Row] = []
        for form in (None, *MASK_FORMS.values()) if masks else (None,):
            if form and not form.fits(shape):
                continue
            repeats, budget_ms = (5, 10) if quick else (11, 30)
            rows = time_shape(shape, candidates, device, kind=kind, repeats=repeats, budget_ms=budget_ms, form=form)
            plain = plain or rows
            if form:
                _of_plain(rows, plain)
            measured += [asdict(row) for row in rows]
            torch.cuda.empty_cache()
            told(f"{shape}, mask: {form.summary}" if form else str(shape), rows)
    return report


def main(args: argparse.Namespace) -> int:
    """The command; exit code 0, also where there is no GPU (it says so and times one small shape on the CPU)."""
    if args.reset:
        raise Unsupported("--reset", "goes with --calibrate: it removes what that made")
    if args.sparse and (args.masks or args.peaked):
        raise Unsupported("--sparse", "has inputs of its own and no masks: leave out --masks and --peaked")
    default = sparse_forms.SHAPES if args.sparse else MODELS if args.models else QUICK_SHAPES if args.quick else SHAPES
    shapes = [parse_shape(text) for text in args.shapes or default]
    if args.sparse and any(shape.len_q != shape.len_kv for shape in shapes):
        raise Unsupported("--shapes", "block-sparse calls are timed on as many queries as keys")
    named = [variant(name) for name in args.variants or ()]
    device = chosen_device(args.device)
    if device.type != "cuda":
        found = measure_on_cpu(named, args.shapes)
        print(json.dumps(found, indent=2)) if args.json else _print_cpu(found)
        return 0
    options = {"peaked": args.peaked, "quick": args.quick, "masks": args.masks, "sparse": args.sparse}
    if args.json:
        found = measure(device, shapes, named, **options, told=lambda title, rows: print(f"{title} done", file=sys.stderr))
        print(json.dumps(found, indent=2))
    else:
        measure(device, shapes, named, **options, begun=_print_head, told=_print_shape)
    return 0


def measure_on_cpu(named: list[Attention], ignored: list[str] | None) -> dict[str, Any]:
    """No GPU: say so, and show that the variants of this machine run. `ignored`: the shapes that were asked for."""
    import torch

    shape = Shape("cpu", 1, 2, 128, 256, 64)
    candidates = named or ready(torch.device("cpu"))[0]
    q, k, v = workloads.make("normal", shape)
    times, skipped = {}, {}
    for candidate in candidates:
        try:
            candidate.call(q, k, v)
            start = time.perf_counter()
            candidate.call(q, k, v)
            times[candidate.name] = 1e3 * (time.perf_counter() - start)
        except (Unsupported, KernelMissing) as refused:
            skipped[candidate.name] = str(refused)
    message = "This is no CUDA GPU: there is nothing to measure that a user would feel."
    if ignored:
        message += f" --shapes {','.join(ignored)} is for a GPU, and ignored."
    message += f" One call of {shape} on the CPU, for the record:"
    return {"machine": {"gpu": None}, "message": message, "shape": str(shape), "cpu_ms": times, "skipped": skipped}


def _print_cpu(found: dict[str, Any]) -> None:
    print(found["message"])
    print(table(("variant", "ms"), [(name, f"{ms:.1f}") for name, ms in found["cpu_ms"].items()], numeric=(1,)))
    for name, reason in found["skipped"].items():
        print(f"skipped: {name} - {reason}")


def _machine(device: torch.device) -> dict[str, str]:
    import torch

    from .._version import __version__
    from .doctor import driver_version

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "driver": driver_version(),
        "torch": torch.__version__,
        "sageattention": __version__,
    }


def _print_head(report: dict) -> None:
    print("; ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"inputs: {report['kind']}, {report['dtype']}; times in ms, medians; ratios above 1 are faster than torch's own attention")
    for name, reason in report["not_run"].items():
        print(f"not run: {name} - {reason}")
    host = [(name, "-" if us is None else f"{us:.0f}") for name, us in report["host_us"].items()]
    print("\n" + table(("host time of a call", "us"), host, numeric=(1,)))


def _print_shape(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    base = rows[0].baseline.replace(BASELINE, "cuDNN") or "SDPA"
    masked = any(row.mask for row in rows)
    head = ("candidate", "event", "graph", "TFLOPS", f"x {base}", "x graph", *(["of plain"] if masked else []), "extra MiB", "error", "")
    cells = []
    for row in rows:
        figures = (
            _f(row.event_ms, 3), _f(row.graph_ms, 3), _f(row.tflops, 0), _f(row.event_ratio, 2), _f(row.graph_ratio, 2),
            *([_f(row.of_plain, 2)] if masked else []), _f(row.extra_mib, 0), _f(row.error, 4),
        )  # fmt: skip
        note = row.skipped or (f"no graph: {row.graph_refused}" if row.graph_refused else f"runs {row.runs}" if row.runs else "")
        cells.append((row.candidate, *figures, note))
    print(table(head, cells, numeric=range(1, len(head) - 1)), flush=True)


def _f(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
