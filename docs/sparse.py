"""Measures the tables of `sparse.md` by `numerics.sparse` and writes them into it: `python docs/sparse.py`.

Each table stands between two markers, `<!-- tokens -->` and `<!-- /tokens -->`, for a number of tokens; the text around them is written by
hand. Takes half an hour on one core; `--tokens` measures one of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sageattention.block_order import cube_order  # noqa: E402
from sageattention.cli import video, workloads  # noqa: E402
from sageattention.numerics.block_selection import Selection  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402
from sageattention.numerics.sparse import Geometry, attend, exact_share, route  # noqa: E402

PAGE = ROOT / "docs" / "sparse.md"
TOKENS = (15360, 104050)
SPANS = 8  # of 128 rows, evenly spaced over the video, on which the error is measured
SPAN = 128


class Choice(NamedTuple):
    """One row of a table: the order's cube (None: frame-major), the selection, rows of a list, whether there is a tail."""

    cube: tuple[int, int, int] | None
    selection: Selection
    q_block: int = 128
    tail: bool = True

    def __str__(self) -> str:
        order = "×".join(map(str, self.cube)) if self.cube else "frame-major"
        kind, tau, keep, _ = self.selection
        rule = f"`{kind}` {keep:g}" if kind == "topk" else f"`{kind}` {tau:g}"
        return f"{order} | {rule}{'' if self.tail else ', no tail'} | {self.q_block}"


TOPK, MASS, SOL = Selection("topk", keep=0.1), Selection("mass", tau=2.0), Selection("sol", tau=1.3)
CHOICES = (
    Choice(None, TOPK, 64),
    Choice(None, TOPK),
    Choice(None, TOPK, tail=False),
    Choice(None, SOL, 64),
    Choice(None, MASS),
    *(Choice(cube, selection) for cube in ((4, 4, 4), (2, 8, 4)) for selection in (TOPK, SOL, MASS, MASS._replace(tau=1.0))),
)


def measure(tokens: int) -> str:
    """The table for a number of tokens: eight heads, one of each kind."""
    grid, heads = video.grid_of(tokens), len(video.HEADS)
    q, k, v = workloads.make("video", workloads.Shape("video", 1, heads, tokens, tokens, 128), dtype=torch.float32)
    spans = torch.linspace(grid.prefix // SPAN + 1, tokens // SPAN - 1, SPANS).long()
    lines = ["| order | selection | rows of a list | exact blocks | error, mean of heads | worst head |", "|---|---|---|---|---|---|"]
    exact: dict[tuple[int, int, int] | None, torch.Tensor] = {}
    for choice in CHOICES:
        order = cube_order(*grid[1:], choice.cube, prefix=grid.prefix) if choice.cube else None
        rows = (spans[:, None] * SPAN + torch.arange(SPAN)).flatten()
        rows = rows if order is None else order[rows].long()
        if choice.cube not in exact:
            exact[choice.cube] = torch.cat([oracle(q[:, :, part], k, v)[0] for part in rows.split(SPAN)], 2)
        geometry = Geometry(choice.q_block, order=order, sinks=[(0, grid.prefix)])
        chosen = route(q, k, v, choice.selection, geometry, tail=choice.tail, dtype=torch.float32)
        share = exact_share(chosen, tokens, tokens, geometry)
        lists = torch.zeros(chosen.bits.shape[2], 1, dtype=torch.bool)
        lists[(spans[:, None] * SPAN + torch.tensor([0, SPAN - 1])).flatten() // choice.q_block] = True
        chosen = chosen._replace(bits=chosen.bits * lists)  # the rows in between are not needed
        out = attend(q, k, v, chosen, geometry, dtype=torch.float32)[0][:, :, rows]
        errors = [workloads.relative_l2(out[:, h], exact[choice.cube][:, h]) for h in range(heads)]
        lines.append(f"| {choice} | {100 * share:.1f} % | {sum(errors) / heads:.3f} | {max(errors):.3f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def write(tokens: int, table: str) -> None:
    """Put a table between its markers."""
    text, begin, end = PAGE.read_text(encoding="utf-8"), f"<!-- {tokens} -->\n", f"\n<!-- /{tokens} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"{PAGE} has no markers for {tokens} tokens")
    head, tail = text.split(begin)[0], text.split(end)[1]
    PAGE.write_text(head + begin + table + end + tail, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, choices=TOKENS, help="measure one table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in (arguments.tokens,) if arguments.tokens else TOKENS:
        write(tokens, measure(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
