#!/usr/bin/env python3
"""Forward and backward of simple GLA and GLA on the CPU against PyTorch, float32, all cores.

PyTorch runs the recurrence token by token, and a chunkwise form made of its matrix products (tiles
of 64), with automatic differentiation. The recurrence is timed on the first NAIVE_LENGTH tokens and
counted up to the full length: its cost is the same for every token. All results are compared first:
with the recurrence in float64 on a short shape, and with PyTorch's chunkwise form on the timed one.
The contestants take turns, so that other work on the machine hits all alike; medians are printed.
The exit code is 1 when a comparison fails.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch

import gla_ops

SHAPES = {"1x2048": (1, 2048), "8x256": (8, 256)}
OPS = ("simple_gla", "gla")
HEADS, KEY_DIM, VALUE_DIM = 4, 128, 256  # GLA-340M
CHUNK = 64
NAIVE_LENGTH = 128
CHECK_LENGTH = 130
TOLERANCE = 1e-4
INPUTS = ("q", "k", "v", "gate", "initial_state")
NAMES = ("o", "ht", "dq", "dk", "dv", "dg", "dh0")


def make_inputs(op, batch, length, seed):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    rows, states = (batch, length, HEADS), (batch, HEADS, KEY_DIM, VALUE_DIM)
    gate = normal(*rows) if op == "simple_gla" else normal(*rows, KEY_DIM)
    return dict(q=normal(*rows, KEY_DIM), k=normal(*rows, KEY_DIM), v=normal(*rows, VALUE_DIM),
                gate=torch.nn.functional.logsigmoid(gate) / 16, initial_state=normal(*states),
                d_o=normal(*rows, VALUE_DIM), d_final_state=normal(*states))


def chunkwise(q, k, v, gate, initial_state):
    """The same as gla_ops.naive() in tiles of CHUNK tokens, for a length that they divide.

    A gate per key dimension is split into exp(G_t) exp(-G_s): right for the mild gates used here,
    whose sums over a tile stay far from where float32 overflows, and all that a matrix product can
    do.
    """
    batch, length, heads, key_dim = q.shape
    tiles = (batch, length // CHUNK, CHUNK, heads)
    q, k, v = (x.reshape(*tiles, -1).transpose(2, 3).contiguous()
               for x in (q * key_dim ** -0.5, k, v))
    mask = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    scalar = gate.dim() == 3
    gate = gate.reshape(*tiles, -1).transpose(2, 3).contiguous()
    sums = gate.cumsum(3)  # [B, N, H, C, 1 or K]
    last = sums[..., -1:, :]
    if scalar:
        decay = (sums - sums.transpose(3, 4)).masked_fill(~mask, float("-inf")).exp()
        weights = q @ k.transpose(3, 4) * decay
    else:
        weights = ((q * sums.exp()) @ (k * (-sums).exp()).transpose(3, 4)).masked_fill(~mask, 0)
    inside = weights @ v
    q_decayed, k_decayed = q * sums.exp(), k * (last - sums).exp()
    updates = k_decayed.transpose(3, 4) @ v
    keep = last.exp().transpose(3, 4)  # [B, N, H, 1 or K, 1]
    state, befores = initial_state, []
    for n in range(tiles[1]):
        befores.append(state)
        state = state * keep[:, n] + updates[:, n]
    o = inside + q_decayed @ torch.stack(befores, 1)
    return o.transpose(2, 3).reshape(batch, length, heads, -1), state


def differentiate(operator, inputs):
    """Results and gradients by name."""
    leaves = [inputs[name].detach().requires_grad_() for name in INPUTS]
    outputs = operator(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [inputs["d_o"], inputs["d_final_state"]])
    return dict(zip(NAMES, (tensor.detach() for tensor in (*outputs, *gradients))))


def check(title, found, expected):
    ratios = {name: gla_ops.ratio(found[name], expected[name]) for name in NAMES}
    good = all(value <= TOLERANCE for value in ratios.values())  # false for NaN
    text = " ".join(f"{name} {value:.1e}" for name, value in ratios.items())
    print(f"  {title:34} {text}  {'ok' if good else 'FAILED'}", flush=True)
    return dict(title=title, ratios=ratios, ok=good)


def run_ours(library, inputs, form):
    problem = gla_ops.Problem(library, inputs, form=form)
    problem.poison()
    problem.run()
    return problem


def checks(library, op, inputs):
    short = make_inputs(op, 2, CHECK_LENGTH, seed=7)
    expected = differentiate(gla_ops.naive, {name: x.double() for name, x in short.items()})
    tiled = differentiate(chunkwise, inputs)
    for name, form in (("recurrent", gla_ops.RECURRENT), ("chunkwise", gla_ops.CHUNKWISE)):
        yield check(f"{name} - float64, {CHECK_LENGTH} tokens",
                    run_ours(library, short, form).results(), expected)
        yield check(f"{name} - PyTorch's chunkwise",
                    run_ours(library, inputs, form).results(), tiled)


def contestants(library, inputs, length):
    """Name to (milliseconds of forward, of forward and backward), each run once."""
    cut = {name: x if name in ("initial_state", "d_final_state") else
           x[:, :NAIVE_LENGTH].contiguous() for name, x in inputs.items()}

    def of_torch(operator, given, factor):
        def forward():
            with torch.no_grad():
                operator(*(given[name] for name in INPUTS))

        def clock(run):
            start = time.perf_counter()
            run()
            return 1e3 * factor * (time.perf_counter() - start)

        return lambda: (clock(forward), clock(lambda: differentiate(operator, given)))

    def of_ours(form):
        problem = gla_ops.Problem(library, inputs, form=form)
        return lambda: (problem.time(1, False, backward=False)[0], problem.time(1, False)[0])

    return {"torch recurrence": of_torch(gla_ops.naive, cut, length / NAIVE_LENGTH),
            "torch chunkwise": of_torch(chunkwise, inputs, 1),
            "recurrent": of_ours(gla_ops.RECURRENT),
            "chunkwise": of_ours(gla_ops.CHUNKWISE)}


def compare(library, op, shape, rounds):
    batch, length = SHAPES[shape]
    inputs = make_inputs(op, batch, length, seed=42)
    print(f"{op} {shape}", flush=True)
    row = dict(op=op, shape=shape, checks=list(checks(library, op, inputs)))
    runs = contestants(library, inputs, length)
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    for key, choose in (("milliseconds", statistics.median), ("least_milliseconds", min)):
        row[key] = {name: dict(forward=choose(pair[0] for pair in pairs),
                               both=choose(pair[1] for pair in pairs))
                    for name, pairs in times.items()}
    print("  " + ", ".join(f"{name} {value['forward']:.1f} / {value['both']:.1f} ms"
                           for name, value in row["milliseconds"].items()), flush=True)
    return row


def print_table(rows):
    names = list(rows[0]["milliseconds"])
    layout = "{:10} {:7} {:20}" + " {:>17}" * len(names) + " {:>12}"
    print("\nmilliseconds\n" + layout.format("op", "shape", "", *names, "torch/ours"))
    for row in rows:
        for part, title in (("forward", "forward"), ("both", "forward + backward")):
            values = [row["milliseconds"][name][part] for name in names]
            row.setdefault("speedup", {})[part] = min(values[:2]) / min(values[2:])
            print(layout.format(row["op"], row["shape"], title, *(f"{v:.1f}" for v in values),
                                f"{row['speedup'][part]:.2f}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--library", dest="lib", default="build/release/lib/libgla_ops_cpu.so")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    ops, shapes = args.ops.split(","), args.shapes.split(",")
    for value, known in [(ops, OPS), (shapes, SHAPES)]:
        if not set(value) <= set(known):
            parser.error(f"{','.join(value)}: expected some of {', '.join(known)}")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    library = gla_ops.Library(args.lib, threads=threads)
    print(f"{library.device_name}, {threads} threads, torch {torch.__version__}; the recurrence in "
          f"torch: {NAIVE_LENGTH} tokens, counted up")
    rows = [compare(library, op, shape, args.rounds) for op in ops for shape in shapes]
    print_table(rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(device=library.device_name, threads=threads, torch=torch.__version__,
                           naive_length=NAIVE_LENGTH, rows=rows), file, indent=1)
    return 0 if all(check["ok"] for row in rows for check in row["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
