"""Writes sageattention/planning/measured.py: what calls cost on an architecture, fitted to what a card of it was timed at.

    python -m sageattention bench --calibrate --json > calibration.json    (on the card)
    python csrc/tools/fit_costs.py calibration.json [another.json ...]

Rows of other architectures stay as they are. Prints how far the fit is off, and `auto` behind the fastest, by kind of call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sageattention.cli.calibrate import results  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.planning import datasheet, measured, rules  # noqa: E402
from sageattention.planning.calibration import Point, fitted  # noqa: E402
from sageattention.planning.cost import KINDS, TORCH, Cost, Costs, Form, Kind  # noqa: E402
from sageattention.planning.ways import kinds_of  # noqa: E402
from sageattention.variants import Candidate  # noqa: E402

HEAD = '''"""What calls cost where a card of the architecture was timed. Written by csrc/tools/fit_costs.py; docs/auto.md says how.

By family, by compiled head dimension and kind of mask, by candidate: the fields of `Cost`.
"""

from __future__ import annotations

from ..variants import Candidate
from .cost import Cost, Costs, Kind

MADE_FROM: dict[int, str] = {
%s
}
_ROWS: dict[int, dict[Kind, dict[str, tuple[float, ...]]]] = {
%s
}  # fmt: skip
MEASURED: dict[int, Costs] = {
    arch: {kind: {Candidate.parse(name): Cost(*row) for name, row in rows.items()} for kind, rows in kinds.items()}
    for arch, kinds in _ROWS.items()
}
'''


def fitted_costs(points: list[Point], arch: int, multiprocessors: int) -> Costs:
    """The costs of each candidate of `auto` in each kind of call, drawn to those of the data sheet."""

    def prior(candidate: Candidate, kind: Kind) -> Cost:
        return datasheet.static_cost(arch, candidate, kind, multiprocessors)

    named = (TORCH, *rules.CANDIDATES[arch])
    costs: Costs = {}
    for kind in KINDS:
        for candidate in named:
            for own in kinds_of(candidate, kind, arch):
                row = costs.setdefault(own, {})
                if candidate not in row:
                    row[candidate] = fitted(points, candidate, own, prior, arch, multiprocessors)
    return costs


def merged(points: list[Point]) -> list[Point]:
    """One point for each call, with the geometric means of its times."""
    by_form: dict[Form, list[Point]] = {}
    for point in points:
        by_form.setdefault(point.form, []).append(point)
    found = []
    for form, alike in by_form.items():
        timed = dict.fromkeys(candidate for point in alike for candidate in point.ms)
        ms = {c: statistics.geometric_mean(point.ms[c] for point in alike if c in point.ms) for c in timed}
        off = {candidate: reason for point in alike for candidate, reason in point.off.items()}
        found.append(Point(form, ms, off, alike[0].weight))
    return found


def text() -> str:
    """The module, by what it holds now."""
    rows = []
    for arch, kinds in sorted(measured.MEASURED.items()):
        rows.append(f"    {arch}: {{")
        for kind, candidates in kinds.items():
            rows.append(f'        ({kind[0]}, "{kind[1]}"): {{')
            rows += [f'            "{candidate}": ({", ".join(f"{c:.3g}" for c in cost)}),' for candidate, cost in candidates.items()]
            rows.append("        },")
        rows.append("    },")
    made_from = [f'    {arch}: "{made}",' for arch, made in sorted(measured.MADE_FROM.items())]
    return HEAD % ("\n".join(made_from), "\n".join(rows))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrations", type=Path, nargs="+", help="what `bench --calibrate --json` printed, on one card, once or more")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().calibrations]
    if any(run["made_for"] != runs[0]["made_for"] for run in runs):
        raise SystemExit("error: the calibrations were made for different cards, drivers or versions; give those of one")
    points, card = merged([Point.from_json(point) for run in runs for point in run["points"]]), runs[0]["made_for"]
    arch, count = int(card["arch"].removeprefix("sm_")), int(card["multiprocessors"])
    measured.MEASURED[arch] = fitted_costs(points, arch, count)
    measured.MADE_FROM[arch] = f"{card['card']}, driver {card['driver']}, torch {card['torch']}"
    Path(measured.__file__).write_text(text(), encoding="utf-8")
    rules.table.cache_clear()
    print(results(points, Capability("cuda", arch, count, name=card["card"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
