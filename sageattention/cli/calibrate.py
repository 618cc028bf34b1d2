"""`bench --calibrate`: times what `auto` may choose on this card beside torch's SDPA, and writes what `auto` then goes by.

Calls of today's models, then calls drawn at random, of each kind in turn (head dimensions, masks, lengths, grouped heads), each with every
variant and accumulator that is ready. The candidates take turns; a time is the median. A variant whose result is not SDPA's is never
chosen. `LIMIT` holds for everything: the more calls a card manages, the better are the costs that are fitted to them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from ..device import capability
from ..errors import KernelMissing, Unsupported
from ..planning import calibration, rules, verdicts
from ..planning.calibration import Calibration, Point
from ..planning.cost import KINDS, TORCH, Form, Kind
from ..planning.measured import MEASURED
from ..variants import Candidate, settled
from .bench import dtype_of
from .candidates import Attention, chosen_device, ready
from .text import table
from .timing import gpu_ms, queued_ms
from .workloads import MODELS, SHAPES

if TYPE_CHECKING:
    import torch

    from ..device.capability import Capability

LIMIT = 55.0  # seconds
SEED = 0  # of the calls that are drawn
LONGEST_MS = 20.0  # that SDPA may take for a call, as predicted
TURNS, TURN_MS, MOST_CALLS = 3, 2.0, 10
# A candidate that takes HOPELESS times the fastest one's time is not timed further. Calls under TELLING_MS decide nothing: they show
# launches alone.
HOPELESS, TELLING_MS = 1.8, 0.3
OFF = 0.1  # relative L2 distance from SDPA; the coarsest variant has .04
REPORT_S = 5.0  # between two lines of progress

# Calls of models, and how many times they count: they are what users run.
MODEL_FORMS = tuple(
    Form(s.batch * s.heads, s.batch * s.kv_heads, s.len_q, s.len_kv, s.head_dim) for s in (*SHAPES.values(), *MODELS.values())
)
MODEL_WEIGHT = 5.0

# What is drawn: head dimensions of models by the compiled one, masks as often as models have them.
HEAD_DIMS = {64: (40, 64, 64), 128: (72, 80, 96, 128, 128, 128), 256: (160, 192, 256, 256)}
ROUND: tuple[Kind, ...] = tuple(kind for kind in KINDS for _ in range(3 if kind[1] == "none" else 1))
TOKENS, TEXT = (64, 131072), (77, 226, 256, 512)
HEADS, GROUPS = 64, (2, 3, 4, 6, 8)
SQUARE, CROSS, GROUPED = 0.6, 0.3, 0.25  # probabilities: as many keys as queries; else: keys of a text; K and V with fewer heads


def drawn(source: random.Random, kind: Kind) -> Form:
    """A call of a kind, lengths and heads spread evenly over their logarithms."""
    head_dim, mask = kind
    len_q, len_kv = (round(math.exp(source.uniform(*map(math.log, TOKENS)))) for _ in range(2))
    if mask == "causal" or source.random() < SQUARE:
        len_kv = len_q
    elif source.random() < CROSS:
        len_kv = source.choice(TEXT)
    heads = round(math.exp(source.uniform(0, math.log(HEADS))))
    groups = [group for group in GROUPS if heads % group == 0]
    heads_kv = heads // source.choice(groups) if groups and source.random() < GROUPED else heads
    return Form(heads, heads_kv, len_q, len_kv, source.choice(HEAD_DIMS[head_dim]), mask, len_q if mask in ("bool", "additive") else 1)


def forms(card: Capability) -> Iterator[Form]:
    """Calls to time on a card, without end: models' first, then drawn ones."""

    def fits(form: Form) -> bool:
        return rules.predict(form, card, card.arch)[0][TORCH] <= LONGEST_MS

    yield from filter(fits, MODEL_FORMS)
    source = random.Random(SEED)
    for kind in cycle(ROUND):
        form = drawn(source, kind)
        while not fits(form):
            form = drawn(source, kind)
        yield form


def candidates(device: torch.device) -> list[Attention]:
    """What is timed: torch's SDPA as `auto` calls it, and each way of rounding that is ready here and may turn out to be the fastest."""
    card = capability.of_device("cuda", device.index or 0)
    found: dict[str, Attention] = {}
    for candidate in ready(device, accumulators=True)[0]:
        if candidate.name == "sdpa" or _may_be_fastest(candidate, card):
            known = any((c.variant, c.scheme) == (candidate.variant, candidate.scheme) for c in found.values())
            if not known:
                found[candidate.name] = candidate
    if any(c.variant and c.variant.backend == "cuda" for c in found.values()):
        return [c for c in found.values() if not c.variant or c.variant.backend != "triton"]
    return list(found.values())


def _may_be_fastest(candidate: Attention, card: Capability) -> bool:
    """Not `reference`; where others of the architecture were measured, what `auto` chooses from there. Triton takes minutes to compile
    for cards before 8.0, and has no INT8 product there."""
    if candidate.variant is None or not candidate.variant.has_kernels:
        return False
    if rules.family(card.arch) in MEASURED:
        return settled(Candidate.parse(candidate.name)) in rules.CANDIDATES[rules.family(card.arch)]
    return candidate.variant.backend != "triton" or card.arch >= 80


def measure(
    device: torch.device, given: Iterable[Form], *, now: Callable[[], float] = time.monotonic, tell: Callable[[str], None]
) -> Iterator[Point]:
    """Time one form after the other, until `LIMIT` is over."""
    start = told = now()
    timed, count = candidates(device), 0
    for form in given:
        point = time_form(form, timed, device)
        if isinstance(point, str):
            tell(f"{form}: not timed, {point}")
        else:
            count += 1
            yield point
        if now() - told >= REPORT_S:
            told = now()
            tell(f"{told - start:.0f} s: {count} calls timed")
        if now() - start > LIMIT:
            return


def time_form(form: Form, timed: list[Attention], device: torch.device) -> Point | str:
    """One point, or why there is none."""
    import torch

    if _bytes(form) > torch.cuda.mem_get_info(device)[0] / 2:
        return "the card's memory is too full"
    q, k, v, keywords = make(form, device)

    def repeated(candidate: Attention, count: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(count):
                candidate.call(q, k, v, **keywords)

        return work

    exact, off, once, host = None, {}, {}, {}
    for candidate in timed:  # warms up, and compiles
        key = settled(Candidate.parse(candidate.name))
        try:
            out = candidate.call(q, k, v, **keywords)
        except (Unsupported, KernelMissing, torch.cuda.OutOfMemoryError) as refused:
            if key == TORCH:
                return str(refused).splitlines()[0]
            off[key] = str(refused).splitlines()[0]
            continue
        if exact is None:
            exact = out[:, :1].float()
        elif not float((out[:, :1].float() - exact).norm() / exact.norm()) < OFF:
            off[key] = "its result is not SDPA's; `check` tells more"
            continue
        del out  # the next one gets its memory
        start = time.perf_counter()
        candidate.call(q, k, v, **keywords)
        host[key] = time.perf_counter() - start
        once[key] = gpu_ms(repeated(candidate, 1))
    best, weight = min(once.values()), MODEL_WEIGHT if form in MODEL_FORMS else 1.0
    if best >= LONGEST_MS:  # launches and turns don't show
        return Point(form, once, off, weight)
    works: dict[Candidate, Callable[[], object]] = {}
    counts: dict[Candidate, int] = {}
    for candidate in timed:
        key = settled(Candidate.parse(candidate.name))
        if key in once and (key == TORCH or once[key] < HOPELESS * max(best, TELLING_MS)):
            counts[key] = max(1, min(MOST_CALLS, int(TURN_MS / max(once[key], 1e-3))))
            works[key] = repeated(candidate, counts[key])
    turns: dict[Candidate, list[float]] = {key: [] for key in works}
    for _ in range(TURNS):
        for key, work in works.items():
            gpu_ms(work)  # untimed: a card's clock follows what it has just been doing
            turns[key].append(queued_ms(work, counts[key] * host[key]) / counts[key])
    return Point(form, {key: statistics.median(times) for key, times in turns.items()}, off, weight)


def make(form: Form, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """q, k, v [1, H, N, D] and the keywords of a call, normal and seeded.

    Of a bool mask the first half of the queries see pairs at random, the others all keys: masks are between the two.
    """
    import torch

    generator, dtype = torch.Generator(device).manual_seed(0), dtype_of(device)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q = randn(1, form.heads, form.len_q, form.head_dim)
    k, v = (randn(1, form.heads_kv, form.len_kv, form.head_dim) for _ in range(2))
    if form.mask == "causal":
        return q, k, v, {"is_causal": True}
    if form.mask == "keys":
        return q, k, v, {"attn_mask": torch.arange(form.len_kv, device=device)[None, None, None] < form.len_kv - form.len_kv // 8}
    if form.mask == "additive":
        return q, k, v, {"attn_mask": randn(1, 1, form.len_q, form.len_kv)}
    if form.mask == "bool":
        mask = torch.ones(1, 1, form.len_q, form.len_kv, dtype=torch.bool, device=device)
        mask[:, :, : form.len_q // 2].bernoulli_(0.7, generator=generator)
        return q, k, v, {"attn_mask": mask}
    return q, k, v, {}


def _bytes(form: Form) -> int:
    """Of q, k, v, outputs, quantised copies and a mask, which torch may copy."""
    mask = 6 * form.len_q * form.len_kv if form.mask in ("bool", "additive") else 0
    return 2 * form.head_dim * (3 * form.heads * form.len_q + 4 * form.heads_kv * form.len_kv) + mask


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
    print(f"timing on {card.name}, about {LIMIT:.0f} s; other programs should leave the card alone", file=progress, flush=True)
    calibration.place(card.name)  # there has to be one, before a minute is spent
    with torch.cuda.device(device):
        points = list(measure(device, forms(card), tell=lambda line: print(line, file=progress, flush=True)))
    torch.cuda.empty_cache()
    if not points:
        print("error: nothing could be timed", file=sys.stderr)
        return 1
    file = calibration.save(card, points)
    if as_json:
        made = {"file": str(file), "made_for": calibration.made_for(card), "points": [point.as_json() for point in points]}
        print(json.dumps(made, indent=1))
        return 0
    print("\n" + results(points, card, Calibration(tuple(points), "")))
    left_out = {(candidate, reason) for point in points for candidate, reason in point.off.items()}
    for candidate, reason in sorted(left_out):
        print(f"left out: {candidate} - {reason}")
    print(f"\nkept in {file}\n`auto` goes by it from the next start on; `{calibration.COMMAND} --reset` undoes it")
    return 0


def results(points: list[Point], card: Capability, known: Calibration | None = None) -> str:
    """By kind of call: how many were timed, how far predictions are off, and how far `auto`'s choices are behind the fastest ones.

    Args:
        known: the card's calibration; without one, `auto` goes by its tables.
    """
    rows = []
    for kind in KINDS:
        alike = [point for point in points if point.form.kind == kind]
        if not alike:
            continue
        fastest = [min(point.ms, key=point.ms.__getitem__) for point in alike]
        often = max(set(fastest), key=fastest.count)
        behind = [behind_best(point, card, known) for point in alike]
        within = sum(share <= 0.03 for share in behind)
        off = f"{statistics.fmean(error for point in alike for error in errors(point, card, known)):.0%}"
        rows.append((*kind, len(alike), f"{often} ({fastest.count(often)})", off, f"{within} of {len(alike)}", f"{max(behind):.0%}"))
    head = ("head_dim", "mask", "calls", "fastest most often", "predicted", "auto within 3 %", "at worst")
    return table(head, rows, numeric=(0, 2, 4, 5, 6))


def errors(point: Point, card: Capability, known: Calibration | None = None) -> list[float]:
    """How far predictions are off, each in terms of the measured time."""
    predicted, _ = rules.predict(point.form, card, card.arch, known)
    return [abs(ms / point.ms[candidate] - 1) for candidate, ms in predicted.items() if candidate in point.ms]


def behind_best(point: Point, card: Capability, known: Calibration | None = None) -> float:
    """By how much of its time what `auto` chooses for a call that was timed is behind the fastest that it could have chosen."""
    predicted, basis = rules.predict(point.form, card, card.arch, known)
    able = {candidate: ms for candidate, ms in predicted.items() if candidate in point.ms}
    choice = next(iter(rules.faster(able, basis)), TORCH)
    return point.ms[choice] / min(point.ms[candidate] for candidate in able) - 1


def _reset(as_json: bool) -> int:
    removed = [str(file) for file in (*calibration.reset(), *verdicts.reset())]
    print(json.dumps({"removed": removed}) if as_json else "\n".join(f"removed {file}" for file in removed) or "there is no calibration")
    return 0
