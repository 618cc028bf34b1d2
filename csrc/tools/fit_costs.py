"""Writes sageattention/planning/measured.py: what calls cost on an architecture, fitted to what a card of it was timed at.

    python -m sageattention bench --calibrate --json > calibration.json    (on the card)
    python csrc/tools/fit_costs.py calibration.json

Rows of other architectures stay as they are. Prints how far the fit is off, and `auto` behind the fastest, by kind of call.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sageattention.cli.calibrate import results  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.planning import datasheet, measured, rules  # noqa: E402
from sageattention.planning.calibration import Point, fitted  # noqa: E402
from sageattention.planning.cost import KINDS, TORCH, Cost, Costs, Kind  # noqa: E402
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
    return {kind: {c: fitted(points, c, kind, prior, multiprocessors) for c in named} for kind in KINDS}


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
    parser.add_argument("calibration", type=Path, help="what `bench --calibrate --json` printed")
    made = json.loads(parser.parse_args().calibration.read_text(encoding="utf-8"))
    points, card = [Point.from_json(point) for point in made["points"]], made["made_for"]
    arch, count = int(card["arch"].removeprefix("sm_")), int(card["multiprocessors"])
    measured.MEASURED[arch] = fitted_costs(points, arch, count)
    measured.MADE_FROM[arch] = f"{card['card']}, driver {card['driver']}, torch {card['torch']}"
    Path(measured.__file__).write_text(text(), encoding="utf-8")
    rules.table.cache_clear()
    print(results(points, Capability("cuda", arch, count, name=card["card"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
