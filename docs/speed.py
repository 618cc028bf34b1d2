"""Draws `speed.svg`, the README's picture, from `speed.json`: `python docs/speed.py`.

`python docs/speed.py --record bench.json` first takes the figures of a run of `python -m sageattention bench --json > bench.json` on an
idle card in place of those in speed.json.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent
FIGURES, PICTURE = FOLDER / "speed.json", FOLDER / "speed.svg"
BASELINE = "sdpa_cudnn"
SHOWN = {  # as a user knows them; in the picture's order
    "wan_480p": "Wan 2, 480p video, 32,760 tokens",
    "hd128_16k": "16,384 tokens, head_dim 128, batch 4",
    "hd64_16k": "16,384 tokens, head_dim 64, batch 4",
    "flux_1024": "FLUX, 1024 x 1024, 4,608 tokens",
    "qwen": "Qwen-Image, 1024 x 1024, 4,347 tokens",
    "sdxl_1024": "SDXL, 1024 x 1024, 4,096 tokens",
    "sd15": "SD 1.5, 512 x 512, 4,096 tokens",
    "wan_cross": "Wan 2, cross attention to 512 text tokens",
    "flux_512": "FLUX, 512 x 512, 1,536 tokens",
}
SERIES = {
    "sageattn_qk_int8_pv_fp8_cuda_sm90": ("FP8 for P·V: the fastest here", "#2f6db5"),
    "sageattn_qk_int8_pv_fp16_cuda": ("FP16 for P·V: the most accurate", "#8fb4dc"),
}
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 300, 60, 62, 40, 14
LEAST_AXIS = 2.0  # the axis goes at least so far


def record(bench: dict) -> dict:
    """What the picture needs of the report of `bench --json`."""
    wanted = (BASELINE, *SERIES)
    rows = [
        {"shape": row["shape"], "candidate": row["candidate"], "ms": round(row["graph_ms"] or row["event_ms"], 4)}
        for row in bench["rows"]
        if row["shape"] in SHOWN and row["candidate"] in wanted and not row["mask"] and row["event_ms"]
    ]
    return {"gpu": bench["machine"]["gpu"], "date": date.today().isoformat(), "rows": rows}


def ratios(known: dict) -> dict[str, dict[str, float]]:
    """{shape: {candidate: cuDNN's time over its own}}."""
    ms = {(row["shape"], row["candidate"]): row["ms"] for row in known["rows"]}
    return {
        shape: {name: ms[shape, BASELINE] / ms[shape, name] for name in SERIES if (shape, name) in ms}
        for shape in SHOWN
        if (shape, BASELINE) in ms
    }


def draw(known: dict) -> str:
    """The picture, a bar for each shape and kernel; PyTorch's attention is the line at 1."""
    found = ratios(known)
    height = TOP + ROW * len(found) + 26
    scale = (WIDTH - LEFT - RIGHT) / max(LEAST_AXIS, *(ratio for by_name in found.values() for ratio in by_name.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(16, 24, f"Speed of attention on an {known['gpu']}, PyTorch's cuDNN attention in the same run = 1", size=15),
    ]
    for number, (label, color) in enumerate(SERIES.values()):
        x = LEFT + 230 * number
        parts += [f'<rect x="{x}" y="38" width="12" height="12" fill="{color}"/>', text(x + 18, 49, label)]
    for number, (shape, by_name) in enumerate(found.items()):
        y = TOP + ROW * number
        parts.append(text(LEFT - 12, y + BAR + 5, SHOWN[shape], anchor="end"))
        for bar, (name, ratio) in enumerate(by_name.items()):
            top = y + (BAR + 2) * bar
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{ratio * scale:.1f}" height="{BAR}" fill="{SERIES[name][1]}"/>')
            parts.append(text(LEFT + ratio * scale + 6, top + 12, f"{ratio:.2f}"))
    x = LEFT + scale
    parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - 24}" stroke="#c0392b" stroke-dasharray="4 3"/>')
    parts.append(text(16, height - 8, f"bf16, from q, k, v to the output, quantisation included; medians, {known['date']}", size=11))
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, said: str, *, size: int = 13, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="#222222">{escape(said)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE", help="the output of bench --json")
    args = parser.parse_args()
    if args.record:
        known = record(json.loads(args.record.read_text(encoding="utf-8")))
        rows = ",\n".join(f"    {json.dumps(row)}" for row in known.pop("rows"))
        head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in known.items())
        FIGURES.write_text(f'{{\n{head}  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8")
    PICTURE.write_text(draw(json.loads(FIGURES.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
