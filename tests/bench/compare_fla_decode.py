#!/usr/bin/env python3
"""The decode step of GLA's layer, one token for each sequence, of fla and of ours, on one GPU.

fla's fused_recurrent_gla as its layer calls it, float32 states, bfloat16 else; alone, and with what
stands around it in the layer: the gate's second product, logsigmoid and division before it, norm
and output gate behind it, in fla's kernels where it has them. Results are compared with the
recurrence in float64. A replayed CUDA graph runs through as many sets of inputs as make up 256 MiB
(at most 256), so that no cache holds them. fla's kernels are tuned anew for each number of
sequences.

--decode-json puts figures of ours beside them: rows {"shape", "state", "seqs", "us"}, or those of
`gla-bench-kernels --json`. The limit is states read and written at the rate of a plain copy.
"""

import argparse
import json
import sys

import torch
import torch.nn.functional as F

import fla_tools
import gla_ops

SHAPES = {"340m": (4, 128, 256), "1.3b": (4, 256, 512)}  # heads, K, V
RANK, NORMALIZER = 16, 16
ROUND_BYTES, MOST_SETS = 256 << 20, 256
CHECKED_SEQS = 8
TOLERANCE = 0.01  # RMS ratio to float64; results are bfloat16


class Case:
    """fla's step on as many sets of inputs as defeat the caches."""

    def __init__(self, shape, seqs):
        from fla.modules import FusedRMSNormGated
        self.heads, self.key_dim, self.value_dim = SHAPES[shape]
        size = 8 * seqs * self.heads * self.key_dim * self.value_dim
        random = torch.Generator("cuda").manual_seed(seqs)

        def normal(*sizes, dtype=torch.bfloat16):
            return torch.randn(*sizes, generator=random, device="cuda").to(dtype)

        rows = (seqs, 1, self.heads)
        self.weight = normal(self.heads * self.key_dim, RANK) * RANK ** -0.5
        self.bias = normal(self.heads * self.key_dim)
        self.norm = FusedRMSNormGated(self.value_dim).to("cuda", torch.bfloat16)
        self.sets = [dict(q=normal(*rows, self.key_dim), k=normal(*rows, self.key_dim),
                          v=normal(*rows, self.value_dim), gate_in=normal(seqs, 1, RANK),
                          gate=F.logsigmoid(normal(*rows, self.key_dim)) / NORMALIZER,
                          output_gate=normal(*rows, self.value_dim),
                          state=normal(seqs, self.heads, self.value_dim, self.key_dim,
                                       dtype=torch.float32))  # V first, as fla's layer keeps it
                     for _ in range(min(-(-ROUND_BYTES // size), MOST_SETS))]

    @staticmethod
    def operator(inputs, gate=None):
        from fla.ops.gla import fused_recurrent_gla
        return fused_recurrent_gla(inputs["q"], inputs["k"], inputs["v"],
                                   inputs["gate"] if gate is None else gate,
                                   initial_state=inputs["state"], output_final_state=True,
                                   state_v_first=True)

    def gate_of(self, inputs):
        product = F.linear(inputs["gate_in"], self.weight, self.bias)
        return (F.logsigmoid(product) / NORMALIZER).view_as(inputs["gate"])

    def layer(self, inputs):
        o, state = self.operator(inputs, self.gate_of(inputs))
        return self.norm(o, inputs["output_gate"]), state

    def check(self):
        """The larger RMS ratio of results and states to the recurrence in float64."""
        inputs = self.sets[0]
        o, state = self.operator(inputs)
        cut = {name: x[:CHECKED_SEQS].double() for name, x in inputs.items()}
        expected = gla_ops.naive(cut["q"], cut["k"], cut["v"], cut["gate"],
                                 cut["state"].transpose(2, 3))
        return max(gla_ops.ratio(o[:CHECKED_SEQS], expected[0]),
                   gla_ops.ratio(state[:CHECKED_SEQS].transpose(2, 3), expected[1]))

    def microseconds(self, run):
        """Of one step, in a graph of a round through the sets."""
        run(self.sets[0])
        graph, _ = fla_tools.capture(lambda: [run(inputs) for inputs in self.sets])
        return 1e3 * fla_tools.timed(graph.replay) / len(self.sets)


def measure(shape, seqs, rate):
    fla_tools.tune_anew()
    case = Case(shape, seqs)
    error = case.check()
    heads, key_dim, value_dim = SHAPES[shape]
    row = dict(shape=shape, seqs=seqs, sets=len(case.sets), error=error,
               fla=case.microseconds(case.operator), fla_layer=case.microseconds(case.layer),
               limit=8e6 * seqs * heads * key_dim * value_dim / rate)
    print(f"{shape}, {seqs} sequences: {row['fla']:.1f} us, with gate and norm "
          f"{row['fla_layer']:.1f} us, off by {error:.1e}", flush=True)
    return row


def read_ours(path):
    """Microseconds by shape, sequences and state."""
    with open(path) as file:
        rows = json.load(file)
    if isinstance(rows, dict):
        rows = rows["rows"]
    names = {f"{h}x{k}x{v}": shape for shape, (h, k, v) in SHAPES.items()}
    ours = {}
    for row in rows:
        if row.get("tokens", 1) != 1 or row.get("op", "gla") != "gla":
            continue
        shape = row.get("shape") or f"{row['heads']}x{row['key_dim']}x{row['value_dim']}"
        shape = names.get(shape, shape).removeprefix("gla-")
        seqs = row["seqs"] if "seqs" in row else row["sequences"]
        ours[shape, seqs, row.get("state", "float32")] = \
            row["us"] if "us" in row else row["microseconds"]
    return ours


def print_table(rows, states):
    def show(value):
        return "-" if value is None else f"{value:.1f}"

    layout = "{:6} {:>9} {:>10} {:>10} {:>10}" + " {:>12}" * len(states)
    print("\nmicroseconds\n" + layout.format("shape", "sequences", "fla", "with gate",
                                             "fp32 limit", *(f"ours {x}" for x in states)))
    for row in rows:
        print(layout.format(row["shape"], row["seqs"], show(row.get("fla")),
                            show(row.get("fla_layer")), show(row.get("limit")),
                            *(show(row["ours"].get(state)) for state in states)))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--seqs", default="1,32,256")
    parser.add_argument("--decode-json", help="figures of ours")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    shapes, seqs = args.shapes.split(","), [int(part) for part in args.seqs.split(",")]
    if not set(shapes) <= set(SHAPES):
        parser.error(f"{args.shapes}: expected some of {', '.join(SHAPES)}")
    rate = fla_tools.copy_rate()
    torch.cuda.empty_cache()
    report = dict(bench="decode", **fla_tools.versions(), copy_bytes_per_second=rate, rows=[])
    print(fla_tools.describe(report), flush=True)
    fla_tools.shorten_tuning()
    ours = read_ours(args.decode_json) if args.decode_json else {}
    for shape in shapes:
        for count in seqs:
            row = measure(shape, count, rate)
            row["ours"] = {state: us for (at_shape, at_seqs, state), us in ours.items()
                           if (at_shape, at_seqs) == (shape, count)}
            report["rows"].append(row)
            torch.cuda.empty_cache()
    print_table(report["rows"], sorted({state for _, _, state in ours}))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    return 0 if all(row["error"] <= TOLERANCE for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
