"""What `auto` chooses on a GPU beside what it could have chosen: random calls, other ones than its costs were fitted to (marker gpu)."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch

from sageattention.cli import calibrate
from sageattention.device import capability
from sageattention.planning.calibration import Point
from sageattention.planning.cost import Form
from sageattention.planning.measured import MEASURED

SEED, COUNT, SECONDS = 2026, 200, 90.0
assert SEED != calibrate.SEED
MAX_FLOPS, MAX_BYTES = 1e14, 60 << 30


def drawn() -> Iterator[Form]:
    """Of every kind, up to eight batches of 64 heads and 131,072 tokens."""
    source = random.Random(SEED)
    while True:
        form, batch = calibrate.drawn(source, source.choice(calibrate.ROUND)), source.choice((1, 1, 1, 2, 4, 8))
        form = form._replace(heads=form.heads * batch, heads_kv=form.heads_kv * batch)
        if 4 * form.heads * form.len_q * form.keys_of_a_query * form.head_dim <= MAX_FLOPS and calibrate._bytes(form) <= MAX_BYTES:
            yield form


def sweep(count: int = COUNT, seconds: float = SECONDS) -> list[Point]:
    """So many calls timed, fewer where time is up."""
    device, points, end = torch.device("cuda", torch.cuda.current_device()), [], time.monotonic() + seconds
    timed = calibrate.candidates(device)
    for form in drawn():
        point = calibrate.time_form(form, timed, device)
        if isinstance(point, Point):
            points.append(point)
        if len(points) == count or time.monotonic() > end:
            return points
    raise AssertionError("drawn() has no end")


@pytest.mark.gpu
@pytest.mark.alone
def test_the_choice_is_at_most_a_little_behind_the_best() -> None:
    card = capability.of_device("cuda", torch.cuda.current_device())
    if card.arch not in MEASURED:
        pytest.skip("no card of this architecture was measured")
    points = sweep()
    behind = sorted((calibrate.behind_best(point, card), str(point.form)) for point in points)
    assert len(points) >= 50
    assert sum(share <= 0.03 for share, _ in behind) >= 0.95 * len(points), behind[-20:]
    assert behind[-1][0] <= 0.10, behind[-5:]
