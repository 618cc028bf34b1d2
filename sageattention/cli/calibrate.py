"""`bench --calibrate`: times what `auto` may choose on this card beside torch's SDPA, and writes what `auto` then goes by.

Calls as models make them, in fp16, shortest first, each with every variant and accumulator that is ready. The candidates take turns;
a time is the median. A variant whose result is not SDPA's is never chosen. `LIMIT` holds for everything, compiling Triton's kernels
included: what is left then is left out, and the table of `auto` decides there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..device import capability
from ..errors import KernelMissing, Unsupported
from ..planning import calibration
from ..planning.calibration import Point
from .candidates import Attention, chosen_device, ready
from .text import table
from .timing import gpu_ms

if TYPE_CHECKING:
    import torch

LIMIT = 55.0  # seconds
HEADS = 16  # over all batches, as SD 1.5 has; SDXL has 20, Flux 24
TURNS, TURN_MS = 3, 15
HOPELESS = 3.0  # times SDPA's time: calibration stops timing such a candidate at longer calls
OFF = 0.1  # relative L2 distance from SDPA; the coarsest variant has .04


@dataclass(frozen=True)
class Form:
    """One call to time."""

    head_dim: int
    mask: str
    len_q: int
    len_kv: int

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.len_q} x {self.len_kv}, mask {self.mask}"


FORMS = tuple(
    sorted(
        (
            *(Form(d, "none", n, n) for d in (64, 128) for n in (1024, 2048, 4096, calibration.LONGEST)),
            *(Form(d, "none", 8192, 512) for d in (64, 128)),
            *(Form(d, mask, 4096, 4096) for d in (64, 128) for mask in ("causal", "list")),
            Form(256, "none", 4096, 4096),
        ),
        key=lambda f: f.head_dim * f.len_q * f.len_kv,
    )
)


class OutOfTime(Exception):
    """`LIMIT` is over."""


def candidates(device: torch.device) -> list[Attention]:
    """What is timed: torch's SDPA as a model calls it, and each way of rounding that is ready here."""
    import torch

    found = {"sdpa": Attention("sdpa", torch.nn.functional.scaled_dot_product_attention)}
    for candidate in ready(device, accumulators=True)[0]:
        if candidate.variant is None or not candidate.variant.has_kernels:
            continue
        # Triton takes minutes to compile for such a card, and has no INT8 product there.
        slow = candidate.variant.backend == "triton" and capability.of_device("cuda", device.index or 0).arch < 80
        known = any((c.variant, c.scheme) == (candidate.variant, candidate.scheme) for c in found.values())
        if not slow and not known:
            found[candidate.name] = candidate
    return list(found.values())


def measure(device: torch.device, *, now: Callable[[], float] = time.monotonic, tell: Callable[[str], None]) -> Iterator[Point]:
    """Time every form, as far as `LIMIT` and the card's memory allow."""
    end = now() + LIMIT
    timed, hopeless = candidates(device), set()
    for number, form in enumerate(FORMS, 1):
        head = f"[{number}/{len(FORMS)}] {form}"
        left = [c for c in timed if (c.name, form.head_dim, form.mask) not in hopeless]
        try:
            point = time_form(form, left, device, lambda: now() > end)
        except OutOfTime:
            tell(f"{head}: not timed, the {LIMIT:.0f} s are over; so are the longer ones")
            return
        if isinstance(point, str):
            tell(f"{head}: not timed, {point}")
            continue
        hopeless |= {(name, form.head_dim, form.mask) for name, ms in point.ms.items() if ms > HOPELESS * point.sdpa_ms}
        best = min(point.ms, key=point.ms.__getitem__, default=None)
        gain = f"{best} {point.sdpa_ms / point.ms[best]:.2f} x SDPA" if best else "no variant ran"
        tell(f"{head}: {gain}")
        yield point


def time_form(form: Form, timed: list[Attention], device: torch.device, over: Callable[[], bool]) -> Point | str:
    """One point, or why there is none.

    Raises:
        OutOfTime: before every candidate had its turns.
    """
    import torch

    heads = _heads(form, device)
    if not heads:
        return "the card's memory is too full"
    generator = torch.Generator(device).manual_seed(0)

    def randn(tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, form.head_dim, generator=generator, device=device, dtype=torch.float16)

    q, k, v = randn(form.len_q), randn(form.len_kv), randn(form.len_kv)
    keywords: dict = {"is_causal": True} if form.mask == "causal" else {}
    if form.mask == "list":
        keywords["attn_mask"] = torch.rand(1, 1, form.len_q, form.len_kv, generator=generator, device=device) > 0.1

    def repeated(candidate: Attention, count: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(count):
                candidate.call(q, k, v, **keywords)

        return work

    exact, off, calls = None, {}, {}
    for candidate in timed:  # warms up, and compiles
        if over():
            raise OutOfTime
        try:
            out = candidate.call(q, k, v, **keywords)
        except (Unsupported, KernelMissing, torch.cuda.OutOfMemoryError) as refused:
            if candidate.name == "sdpa":
                return str(refused).splitlines()[0]
            off[candidate.name] = str(refused).splitlines()[0]
            continue
        if exact is None:
            exact = out[:, :1].float()
        elif not float((out[:, :1].float() - exact).norm() / exact.norm()) < OFF:
            off[candidate.name] = "its result is not SDPA's; `check` tells more"
            continue
        once = gpu_ms(repeated(candidate, 1))
        calls[candidate.name] = max(1, min(50, int(TURN_MS / max(once, 1e-3))))
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for candidate in timed:
            if candidate.name not in calls:
                continue
            if over():
                raise OutOfTime
            count = calls[candidate.name]
            gpu_ms(repeated(candidate, count))  # untimed: a card's clock follows what it has just been doing
            turns[candidate.name].append(gpu_ms(repeated(candidate, count)) / count)
    ms = {name: statistics.median(times) for name, times in turns.items()}
    return Point(form.head_dim, form.mask, heads, form.len_q, form.len_kv, ms.pop("sdpa"), ms, off)


def _heads(form: Form, device: torch.device) -> int:
    """As many heads, up to `HEADS`, as half of the free memory has room for; 0 where that is less than a third of them."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    # q, k, v, output and one quantised copy of k and v, in bytes; a dense mask is drawn in fp32
    head = 2 * form.head_dim * (2 * form.len_q + 4 * form.len_kv)
    mask = 8 * form.len_q * form.len_kv if form.mask == "list" else 0
    heads = min(HEADS, int((free / 2 - mask) // head))
    return heads if heads >= HEADS // 3 else 0


def main(args: argparse.Namespace) -> int:
    """The command: 0, or 1 where nothing could be timed or kept."""
    import torch

    given = [f"--{name}" for name in ("shapes", "variants", "peaked", "quick") if getattr(args, name)]
    if given:
        raise Unsupported(given[0], "does not go with --calibrate, which times its own choice of calls")
    try:
        if args.reset:
            return _reset(args.json)
        device = chosen_device(args.device)
        if device.type != "cuda":
            raise Unsupported("--calibrate", "needs a CUDA GPU; without one `auto` is PyTorch's attention")
        index = torch.cuda.current_device() if device.index is None else device.index
        return _calibrate(torch.device("cuda", index), args.json)
    except (calibration.Ignored, OSError) as error:
        print(f"error: a calibration can't be kept in this place: {error}; {calibration.FOLDER} names another one", file=sys.stderr)
        return 1


def _calibrate(device: torch.device, as_json: bool) -> int:
    import torch

    card = capability.of_device("cuda", device.index)
    progress = sys.stderr if as_json else sys.stdout
    print(f"timing on {card.name}, at most {LIMIT:.0f} s; other programs should leave the card alone", file=progress, flush=True)
    calibration.place(card.name)  # there has to be one, before a minute is spent
    with torch.cuda.device(device):
        points = list(measure(device, tell=lambda line: print(line, file=progress, flush=True)))
    torch.cuda.empty_cache()
    if not points:
        print("error: nothing could be timed", file=sys.stderr)
        return 1
    file = calibration.save(card, points)
    if as_json:
        print(json.dumps({"file": str(file), "made_for": calibration.made_for(card), "points": [asdict(p) for p in points]}, indent=2))
        return 0
    print("\n" + results(points))
    for name, reason in sorted({item for point in points for item in point.off.items()}):
        print(f"left out: {name} - {reason}")
    print(f"\nkept in {file}\n`auto` goes by it from the next start on; `{calibration.COMMAND} --reset` undoes it")
    return 0


def results(points: list[Point]) -> str:
    """The points as a table of at most 120 columns, the candidates by letters that the lines above it explain."""
    letters = dict(zip(sorted({name for point in points for name in point.ms}), string.ascii_uppercase))
    lines = [
        "calls are head_dim, heads, queries x keys, mask; the letters are so many times as fast as SDPA:",
        *(f"{letter}  {name}" for name, letter in letters.items()),
    ]
    rows = []
    for point in points:
        gains = (f"{point.sdpa_ms / point.ms[name]:#.3g}" if name in point.ms else "-" for name in letters)
        best = next(map(str, point.faster()), None)
        call = f"{point.head_dim}  {point.heads}  {point.len_q:,} x {point.len_kv:,}  {point.mask}"
        rows.append((call, f"{point.sdpa_ms:.3f}", *gains, letters[best] if best else "SDPA"))
    head = ("call", "SDPA, ms", *letters.values(), "auto")
    return "\n".join([*lines, "", table(head, rows, numeric=range(1, 2 + len(letters)))])


def _reset(as_json: bool) -> int:
    removed = [str(file) for file in calibration.reset()]
    print(json.dumps({"removed": removed}) if as_json else "\n".join(f"removed {file}" for file in removed) or "there is no calibration")
    return 0
