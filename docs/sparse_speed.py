"""Draws `sparse.svg`, error against time of block-sparse calls, from `sparse.json`: `python docs/sparse_speed.py`.

`python docs/sparse_speed.py --record` first measures on an idle GPU, in a minute: inputs of kind `video`, 16 heads, the prefix as a sink.
Where comfy-kitchen is installed, its `sol_attn` is one of the curves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from speed import text

FOLDER = Path(__file__).resolve().parent
FIGURES, PICTURE = FOLDER / "sparse.json", FOLDER / "sparse.svg"
sys.path.insert(0, str(FOLDER.parent))

from sageattention import sageattn, sageattn_sparse  # noqa: E402
from sageattention.block_order import cube_order  # noqa: E402
from sageattention.cli import video, workloads  # noqa: E402

HEADS, TOKENS, HEAD_DIM = 16, 104050, 128  # h3_768p_15s, with fewer heads
ROWS, TURNS = 192, 3  # queries that are compared, calls that are timed
FP16 = "sageattn_qk_int8_pv_fp16_cuda"
PEER = "comfy-kitchen sol_attn, frame-major"


class Curve(NamedTuple):
    """Settings of one selection in one order of tokens."""

    name: str
    colour: str
    cube: tuple[int, int, int] | None
    selection: str
    parameter: str
    values: tuple[float, ...]
    variant: str = "auto"


TAUS, KEEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0), (0.03, 0.05, 0.08, 0.12, 0.2)
CURVES = (
    Curve("sol, frame-major", "#8fb4dc", None, "sol", "tau", (1.0, 1.3, 1.6, 2.0)),
    Curve("topk, frame-major", "#9a9a9a", None, "topk", "keep", KEEPS),
    Curve("topk, 4x4x4 cubes", "#4e9a51", (4, 4, 4), "topk", "keep", KEEPS),
    Curve("mass, 4x4x4 cubes", "#2f6db5", (4, 4, 4), "mass", "tau", TAUS),
    Curve("mass, 2x8x4 cubes", "#c77d1e", (2, 8, 4), "mass", "tau", TAUS),
    Curve("mass, 4x4x4 cubes, FP16", "#7a4ea3", (4, 4, 4), "mass", "tau", TAUS, FP16),
)
COLOURS = {curve.name: curve.colour for curve in CURVES} | {PEER: "#c0392b"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 880, 520, 70, 52, 250, 52


def measure() -> dict[str, Any]:
    """Milliseconds and error of every setting on this GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = workloads.Shape("video", 1, HEADS, TOKENS, TOKENS, HEAD_DIM)
    q, k, v = (
        x.bfloat16() for x in video.build(lambda *size: torch.randn(*size, generator=generator, device="cuda"), shape)
    )  # fmt: skip
    prefix, *grid = video.grid_of(TOKENS)
    rows = torch.linspace(prefix, TOKENS - 1, ROWS, device="cuda").long()
    exact = torch.stack(
        [torch.softmax(q[0, h, rows].double() @ k[0, h].double().T * HEAD_DIM**-0.5, -1) @ v[0, h].double() for h in range(HEADS)]
    )

    def row(name: str, value: float, call: Callable[[], torch.Tensor]) -> dict[str, Any]:
        off = call()[0, :, rows].double() - exact
        errors = (off.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).tolist()
        found = {"curve": name, "value": value, "ms": _ms(call), "error": statistics.mean(errors), "worst": max(errors)}
        return {key: round(x, 4) if isinstance(x, float) else x for key, x in found.items()}

    found = [row("dense, FP8", 0, lambda: sageattn(q, k, v)), row("dense, FP16", 0, lambda: sageattn(q, k, v, variant=FP16))]
    for curve in CURVES:
        order = curve.cube and cube_order(*grid, prefix=prefix, cube=curve.cube, device="cuda")
        for value in curve.values:
            given = {"selection": curve.selection, curve.parameter: value, "variant": curve.variant}
            found.append(row(curve.name, value, lambda o=order, g=given: sageattn_sparse(q, k, v, order=o, sinks=prefix, **g)))
    found += (row(PEER, tau, call) for tau, call in _peer(q, k, v, prefix))
    return {"gpu": torch.cuda.get_device_name(), "date": date.today().isoformat(), "rows": found}


def _peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int) -> Iterator[tuple[float, Callable[[], torch.Tensor]]]:
    """Calls of the block-sparse attention that ComfyUI's own node uses; none where it is not installed."""
    try:
        from comfy_kitchen import sol_attn
    except ImportError:
        return
    nhd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    sinks = [0, -(-prefix // 64)]  # blocks
    for tau in (0.7, 1.0, 1.3, 1.6):
        yield tau, lambda tau=tau: sol_attn(*nhd, tau=tau, sink_blocks=sinks).transpose(1, 2)


def _ms(call: Callable[[], object]) -> float:
    """The median of `TURNS` calls after a first one."""
    times = []
    for _ in range(TURNS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def draw(known: dict[str, Any]) -> str:
    """The picture: a curve a selection, a point a setting; both axes logarithmic."""
    rows = known["rows"]
    sparse = [row for row in rows if row["curve"] in COLOURS]
    ms, errors = [row["ms"] for row in rows], [row["error"] for row in rows]
    x, y = _scale(ms, LEFT, WIDTH - RIGHT), _scale(errors, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(16, 24, f"Block-sparse attention on an {known['gpu']}: error against time, {HEADS} heads, {TOKENS:,} tokens", size=15),
    ]
    for tick in _ticks(ms):
        parts.append(f'<line x1="{x(tick):.1f}" y1="{TOP}" x2="{x(tick):.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        parts.append(text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g} ms", size=11, anchor="middle"))
    for tick in _ticks(errors):
        parts.append(f'<line x1="{LEFT}" y1="{y(tick):.1f}" x2="{WIDTH - RIGHT}" y2="{y(tick):.1f}" stroke="#e4e4e4"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", size=11, anchor="end"))
    for row in (row for row in rows if row["curve"].startswith("dense")):
        parts += _point(x(row["ms"]), y(row["error"]), "#222222")
        parts.append(text(x(row["ms"]), y(row["error"]) - 10, row["curve"], size=11, anchor="middle"))
    shown = [name for name in COLOURS if any(row["curve"] == name for row in sparse)]
    for number, name in enumerate(shown):
        points = [(x(row["ms"]), y(row["error"])) for row in sparse if row["curve"] == name]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        for a, b in points:
            parts += _point(a, b, COLOURS[name])
        top = TOP + 20 * number
        parts += _point(WIDTH - RIGHT + 20, top + 4, COLOURS[name])
        parts.append(text(WIDTH - RIGHT + 32, top + 8, name, size=11))
    said = "relative L2 error against dense attention in fp64, mean of heads; inputs of kind `video`, made up; the prefix a sink"
    parts.append(text(16, HEIGHT - 8, f"bf16, whole calls; {said}; {known['date']}", size=11))
    return "\n".join([*parts, "</svg>", ""])


def _scale(values: list[float], start: float, end: float) -> Callable[[float], float]:
    low, high = math.log(min(values) / 1.1), math.log(max(values) * 1.1)
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def _ticks(values: list[float]) -> list[float]:
    steps = (m * 10.0**e for e in range(-4, 4) for m in (1, 2, 3, 5, 7))
    return [tick for tick in steps if min(values) / 1.1 <= tick <= max(values) * 1.1]


def _point(x: float, y: float, colour: str) -> list[str]:
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="measure on this machine's GPU first")
    if parser.parse_args().record:
        known = measure()
        rows = ",\n".join(f"    {json.dumps(row)}" for row in known.pop("rows"))
        FIGURES.write_text(
            f'{{\n  "gpu": {json.dumps(known["gpu"])},\n  "date": "{known["date"]}",\n  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8"
        )  # fmt: skip
    PICTURE.write_text(draw(json.loads(FIGURES.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
