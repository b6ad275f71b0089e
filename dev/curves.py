"""Draws one chart of several runs' validation loss over the minutes of training, as an SVG that stands alone.

    python dev/curves.py --output docs/images/NAME.svg Transformer=out/text_t/base Hybrid=out/text_hybrid/base
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from nanochat.report import read_log
from nanochat.report_chart import HEIGHT, WIDTH, Point, Series, line_chart

COLORS = ("#2a6fd0", "#d9602b", "#158f72")  # as in the report, legible on white and on black
STYLE = (
    ".line{fill:none;stroke-width:2}.chart text{font:12px system-ui,sans-serif;fill:#7d8590}"
    ".grid,.axis{stroke:#7d8590;stroke-width:1}.grid{opacity:.3}.hit{fill:transparent}"
    + "".join(f".line.s{i}{{stroke:{c}}}.dot.s{i},.chart .t{i}{{fill:{c}}}" for i, c in enumerate(COLORS))
)


def over_minutes(records: list[dict[str, Any]], key: str) -> list[Point]:
    """(minutes of training, value) of each evaluation: its record has the step, a record of training the time."""
    minutes = {r["step"]: r["time"] / 60 for r in records if "time" in r}
    found = [(minutes[r["step"]], float(r[key])) for r in records if key in r and r["step"] in minutes]
    return [(at, value) for at, value in found if math.isfinite(value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="+", metavar="NAME=STAGE_DIR", help="at most three")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--key", default="val_bpb")
    parser.add_argument("--title", default="Bits per byte of validation text")
    parser.add_argument("--label", default="bits per byte")
    args = parser.parse_args()
    series = []
    for i, item in enumerate(args.curves):
        name, _, directory = item.partition("=")
        points = over_minutes(read_log(Path(directory) / "log.jsonl"), args.key)
        if not points:
            parser.error(f"{directory}/log.jsonl has no {args.key}")
        series.append(Series(name, points, i, dots=True))
    if len(series) > len(COLORS):
        parser.error(f"{len(series)} curves are more than {len(COLORS)}")
    chart = line_chart(args.title, series, "minutes of training", args.label, log_y=False)
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}" '
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(chart.replace("<svg ", size, 1).replace("<title>", f"<style>{STYLE}</style><title>", 1))
    for one in series:
        print(f"{one.name}: {one.points[-1][1]:.4f} after {one.points[-1][0]:.2f} minutes, {len(one.points)} points")


if __name__ == "__main__":
    main()
