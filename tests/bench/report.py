#!/usr/bin/env python3
"""Markdown tables and a plot from what compare_fla.py, compare_fla_decode.py, compare_fla_model.py,
gla-bench-engine and gla-bench-decode-attention gave with --json: report.py FILE... [--svg FILE]
[--note TEXT].

Several files may speak of one model: what a later one has takes the place of what an earlier one
had, so that fla need not be measured again with each change of ours.
"""

import argparse
import json
import math
import sys
from xml.sax.saxutils import escape

STATES = ("float32", "int16")
BENCHES = ("model", "engine", "decode", "decode_attention", "operators")


def milliseconds(value):
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def microseconds(value):
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def title_of(model):
    return model.upper() if model.startswith("gla-") else model


def sequences(row):
    return f"{row['seqs']} sequence{'s' if row['seqs'] > 1 else ''}"


# ---- Models -------------------------------------------------------------------------------------


def merge_rows(rows, more, key):
    by_key = {row[key]: row for row in rows}
    for row in more:
        known = by_key.setdefault(row[key], {key: row[key], "fla": None, "ours": {}, "limit": {}})
        known["fla"] = row.get("fla") or known["fla"]
        known["ours"].update(row["ours"])
        known["limit"].update(row.get("limit", {}))
    return [by_key[value] for value in sorted(by_key)]


def models_of(report):
    """Those of compare_fla_model.py, or gla-bench-engine's one in the same form."""
    if report["bench"] == "model":
        return report["models"]
    state, rate = report["state_dtype"], report["copy_bytes_per_second"]
    decode = [dict(seqs=row["seqs"], ours={state: row["ms_per_step"]},
                   limit={state: 1e3 * row["bytes_per_step"] / rate}) for row in report["decode"]]
    prefill = [dict(tokens=row["tokens"], ours={state: row["ms"]}) for row in report["prefill"]]
    return [dict(model=report["model"], decode=decode, prefill=prefill)]


def merge_models(reports):
    models = {}
    for report in reports:
        for model in models_of(report):
            known = models.setdefault(model["model"], dict(decode=[], prefill=[]))
            known["decode"] = merge_rows(known["decode"], model["decode"], "seqs")
            known["prefill"] = merge_rows(known["prefill"], model["prefill"], "tokens")
    return models


def model_table(name, model):
    """A column for each number of sequences and each prompt, a line for each figure."""
    columns = [*model["decode"], *model["prefill"]]

    def line(title, value):
        values = [value(row) for row in columns]
        return [[title, *map(milliseconds, values)]] if any(x is not None for x in values) else []

    def of_fla(kind):
        return lambda row: (row["fla"] or {}).get(kind)

    def speedup(state):
        def value(row):
            graph, ours = of_fla("graph")(row), row["ours"].get(state)
            return graph / ours if graph and ours else None
        return value

    rows = line("fla, eager", of_fla("eager")) + line("fla, graph", of_fla("graph"))
    for state in STATES:
        rows += line(f"ours, {state} states", lambda row: row["ours"].get(state))
        rows += line(f"limit, {state} states", lambda row: row["limit"].get(state))
        rows += line(f"fla's graph / ours, {state}", speedup(state))
    head = [f"{title_of(name)}, ms per step",
            *map(sequences, model["decode"]),
            *(f"prompt of {row['tokens']}" for row in model["prefill"])]
    return table(head, rows)


def engine_title(report, row):
    return f"{title_of(report['model'])}, {report['state_dtype']} states, {sequences(row)}"


def positions_table(reports):
    """A column for each position: the time of a step should be the same in all."""
    positions = sorted({row["position"] for report in reports for row in report["positions"]})
    lines = {}
    for report in reports:
        for row in report["positions"]:
            lines.setdefault(engine_title(report, row), {})[row["position"]] = row

    def memory(rows):
        taken = (row["memory_free_before"] - row["memory_free_after"] for row in rows.values())
        return f"{max(taken) / 2 ** 20:.1f}"

    head = ["decode at position, ms per step", *(f"{position:,}" for position in positions),
            "memory taken meanwhile, MiB"]
    return table(head, [[title,
                         *(milliseconds(rows.get(position, {}).get("ms_per_step"))
                           for position in positions), memory(rows)]
                        for title, rows in lines.items()])


def mixed_table(reports):
    head = ["decode rows and prompts in one step", "ms per step", "new tokens/s", "prompt tokens/s"]
    return table(head, [[f"{engine_title(report, row)} + {row['prompts']} x "
                         f"{row['prompt_tokens'] // row['prompts']}",
                         milliseconds(row["ms_per_step"]),
                         f"{row['new_tokens_per_second']:,.0f}",
                         f"{row['prompt_tokens_per_second']:,.0f}"]
                        for report in reports for row in report["mixed"]])


# ---- Operators ----------------------------------------------------------------------------------


def merge_decode(reports):
    rows = {}
    for report in reports:
        for row in report["rows"]:
            shape = row["shape"].removeprefix("gla-")
            known = rows.setdefault((shape, row["seqs"]), dict(
                shape=shape, seqs=row["seqs"], fla=None, fla_layer=None, limit=None, ours={}))
            if report["bench"] == "decode":
                known.update(fla=row["fla"], fla_layer=row["fla_layer"], limit=row["limit"])
                known["ours"].update(row["ours"])
            else:
                known["ours"][row["state"]] = row["us"]
                if row["state"] == "float32":
                    known["limit"] = row["limit_us"]
    return [rows[key] for key in sorted(rows)]


def decode_table(reports):
    rows = merge_decode(reports)
    states = sorted({state for row in rows for state in row["ours"]})
    head = ["decode, us", "fla", "fla with gate and norm", "limit, float32",
            *(f"ours, {state}" for state in states)]
    return table(head, [[f"{row['shape']}, {sequences(row)}",
                         *map(microseconds, (row["fla"], row["fla_layer"], row["limit"])),
                         *(microseconds(row["ours"].get(state)) for state in states)]
                        for row in rows])


def operators_table(report):
    rows = []
    for row in report["rows"]:
        graph, eager = row["fla"]["graph"] or {}, row["fla"]["eager"]
        cells = [f"{row['op'].replace('_', ' ')} {row['shape']}"]
        for part, ours in row["ours"]["graph"].items():
            best = graph.get(part)
            cells += [" / ".join(microseconds(1e3 * value) if value else "-"
                                 for value in (ours, best, eager[part])),
                      f"{(best or eager[part]) / ours:.2f}"]
        rows.append(cells)
    head = ["us, ours / fla graph / fla eager"]
    for part in report["rows"][0]["ours"]["graph"]:
        head += [part, "fla / ours"]
    return table(head, rows)


# ---- The plot -----------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 440, 62, 14, 84, 56
INK, FAINT = "#222222", "#dddddd"
SERIES = {  # colour, shape of the marks
    "fla": ("#d55e00", "square", "fla, CUDA graph, float32 states"),
    "float32": ("#0072b2", "circle", "ours, float32 states"),
    "int16": ("#009e73", "triangle", "ours, int16 states"),
}


class Panel:
    """One model: both axes logarithmic."""

    def __init__(self, name, model, x, labels):
        self.left, self.name, self.labels = x + LEFT, name, labels
        self.rows = model["decode"]
        self.lines = {"fla": [(row["seqs"], (row["fla"] or {}).get("graph")) for row in self.rows],
                      **{state: [(row["seqs"], row["ours"].get(state)) for row in self.rows]
                         for state in STATES}}
        self.lines = {key: [point for point in line if point[1] is not None]
                      for key, line in self.lines.items()}
        self.limits = {state: self.limit(state) for state in STATES}
        seqs = [row["seqs"] for row in self.rows]
        self.seqs = sorted(set(seqs))
        values = [y for line in (*self.lines.values(), *self.limits.values()) for _, y in line]
        self.x_range = math.log(min(seqs) / 1.25), math.log(max(seqs) * 1.25)
        self.y_range = math.log(min(values) / 1.25), math.log(max(values) * 1.25)

    def limit(self, state):
        """The bytes of a step are those of the weights and of each state: a line through two."""
        points = [(row["seqs"], row["limit"][state]) for row in self.rows if state in row["limit"]]
        if len(points) < 2:
            return points
        (x0, y0), (x1, y1) = points[0], points[-1]
        steps = [x0 * (x1 / x0) ** (i / 40) for i in range(41)]
        return [(x, y0 + (y1 - y0) * (x - x0) / (x1 - x0)) for x in steps]

    def x(self, seqs):
        low, high = self.x_range
        return self.left + (WIDTH - LEFT - RIGHT) * (math.log(seqs) - low) / (high - low)

    def y(self, value):
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log(value) - low) / (high - low)

    def path(self, points, style):
        steps = " L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        return f'<path d="M{steps}" fill="none" {style}/>' if points else ""

    def draw(self):
        right, bottom = self.left + WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM
        yield text(self.left, TOP - 12, title_of(self.name), weight="bold", size=14)
        low, high = map(math.exp, self.y_range)
        for value in (m * 10.0 ** e for e in range(-3, 5) for m in (1, 2, 5)):
            if low <= value <= high:
                y = self.y(value)
                yield line(self.left, y, right, y, FAINT)
                yield text(self.left - 7, y + 4, f"{value:g}", anchor="end")
        for seqs in self.seqs:
            x = self.x(seqs)
            yield line(x, TOP, x, bottom, FAINT)
            yield text(x, bottom + 17, seqs, anchor="middle")
        yield line(self.left, bottom, right, bottom, INK)
        yield line(self.left, TOP, self.left, bottom, INK)
        yield text((self.left + right) / 2, bottom + 38, "sequences in a decode step",
                   anchor="middle")
        if self.labels:
            middle = (TOP + bottom) / 2
            yield text(self.left - 44, middle, "milliseconds per step", anchor="middle",
                       more=f'transform="rotate(-90 {self.left - 44} {middle})"')
        for state in STATES:
            yield self.path(self.limits[state], limit_style(SERIES[state][0]))
        for key, (colour, shape, _) in SERIES.items():
            yield self.path(self.lines[key], line_style(colour))
            for seqs, value in self.lines[key]:
                yield mark(shape, self.x(seqs), self.y(value), colour)


def limit_style(colour):
    return f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 4"'


def line_style(colour):
    return f'stroke="{colour}" stroke-width="2"'


def line(x0, y0, x1, y1, colour):
    return f'<path d="M{x0:.1f} {y0:.1f} L{x1:.1f} {y1:.1f}" stroke="{colour}"/>'


def text(x, y, content, anchor="start", size=12, weight="normal", more=""):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'font-weight="{weight}" {more}>{escape(str(content))}</text>')


def mark(shape, x, y, colour):
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    if shape == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    return f'<path d="M{x:.1f} {y - 5:.1f} l5 9 h-10 z" fill="{colour}"/>'


def legend(shown):
    """One line for what is measured, one for the limits."""
    x = LEFT
    for key in shown:
        colour, shape, name = SERIES[key]
        yield f'<path d="M{x} 20 h28" {line_style(colour)}/>'
        yield mark(shape, x + 14, 20, colour)
        yield text(x + 35, 24, name)
        x += 50 + 6.4 * len(name)
    x = LEFT
    for state in (key for key in shown if key in STATES):
        name = f"limit, {state} states: bytes of a step at the copy rate"
        yield f'<path d="M{x} 42 h28" {limit_style(SERIES[state][0])}/>'
        yield text(x + 35, 46, name)
        x += 50 + 6.4 * len(name)


def plot(models, note):
    panels = [Panel(name, model, i * WIDTH, labels=i == 0)
              for i, (name, model) in enumerate(models.items())]
    width, height = WIDTH * max(2, len(panels)), HEIGHT + (18 if note else 0)
    shown = [key for key in SERIES if any(panel.lines[key] for panel in panels)]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
             f'fill="{INK}">', f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
             *legend(shown), *(part for panel in panels for part in panel.draw() if part)]
    if note:
        parts.append(text(LEFT, height - 10, note, size=11))
    return "\n".join(parts) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--svg", help="file to draw the steps of the models in")
    parser.add_argument("--note", help="a line beneath the plot")
    args = parser.parse_args()
    reports = []
    for path in args.files:
        with open(path) as file:
            reports.append(json.load(file))
        if reports[-1].get("bench") not in BENCHES:
            sys.exit(f"{path}: 'bench' is {reports[-1].get('bench')!r}, expected one of "
                     f"{', '.join(BENCHES)}")

    def of(*benches, having=None):
        return [report for report in reports
                if report["bench"] in benches and (having is None or report.get(having))]

    models = merge_models(of("model", "engine"))
    for name, model in models.items():
        print(model_table(name, model))
    for having, show in (("positions", positions_table), ("mixed", mixed_table)):
        if of("engine", having=having):
            print(show(of("engine", having=having)))
    if of("decode", "decode_attention"):
        print(decode_table(of("decode", "decode_attention")))
    for report in of("operators"):
        print(operators_table(report))
    if args.svg and models:
        with open(args.svg, "w") as file:
            file.write(plot(models, args.note))


if __name__ == "__main__":
    main()
