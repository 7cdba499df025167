#!/usr/bin/env python3
"""Forward and backward of simple GLA and GLA against flash-linear-attention, on one GPU.

One process, the same tensors for both: q, k, v and do bfloat16, states float32, GLA's gate
bfloat16 (as fla's layer has it), simple GLA's float32; initial and final state and their gradients
are there. First every result is compared, on a short shape with the recurrence in float64 and on
each timed shape with each other; then forward, backward and both are timed, called eagerly and
replayed as CUDA graphs. With --forward-only the backward passes are left out everywhere. The exit
code is 1 when a comparison fails or two runs of ours differ in a bit.

Needs a GPU, PyTorch, and fla as `pip install flash-linear-attention` gives it.
"""

import argparse
import itertools
import json
import statistics
import sys
import time

import torch

import fla_tools
import gla_ops
from fla_tools import timed

SHAPES = {  # batch, length, heads, K, V
    "340m-8x2048": (8, 2048, 4, 128, 256),
    "340m-1x32768": (1, 32768, 4, 128, 256),
    "340m-1x2048": (1, 2048, 4, 128, 256),
    "1.3b-8x2048": (8, 2048, 4, 256, 512),
    "1.3b-1x32768": (1, 32768, 4, 256, 512),
    "1.3b-1x2048": (1, 2048, 4, 256, 512),
}
OPS = ("simple_gla", "gla")
CHECK_LENGTH = 193  # three tiles of 64 and one token more
# RMS ratios: ours to the float64 recurrence, and ours to fla's, each of which may be off by that.
TOLERANCE = {"o": 0.004}
TOLERANCE_ELSE = 0.005
TOLERANCE_MUTUAL = 0.01
NAMES = ("o", "ht", "dq", "dk", "dv", "dg", "dh0")
FORWARD = ("o", "ht")


def tuned_at(shapes):
    """The first shape of each size of head: fla tunes there, and for the others takes the same."""
    first = {}
    for shape in shapes:
        first.setdefault(SHAPES[shape][2:], shape)
    return list(first.values())


def make_inputs(op, batch, length, heads, key_dim, value_dim, seed=42):
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=random, device="cuda").to(dtype)

    rows = (batch, length, heads)
    gate = normal(*rows, dtype=torch.float32) if op == "simple_gla" else normal(*rows, key_dim)
    states = (batch, heads, key_dim, value_dim)
    return dict(q=normal(*rows, key_dim), k=normal(*rows, key_dim), v=normal(*rows, value_dim),
                gate=torch.nn.functional.logsigmoid(gate) / 16,
                initial_state=normal(*states, dtype=torch.float32),
                d_o=normal(*rows, value_dim), d_final_state=normal(*states, dtype=torch.float32))


class Fla:
    """fla's operator on `inputs`; results as tensors by name."""

    forward_only = False  # whether both() and results() leave the backward pass out

    def __init__(self, op, inputs):
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
        self._op = chunk_gla if op == "gla" else chunk_simple_gla
        names = ("q", "k", "v", "gate", "initial_state")
        self.leaves = [inputs[name].detach().requires_grad_() for name in names]
        self.gradients = (inputs["d_o"], inputs["d_final_state"])

    def forward(self):
        q, k, v, gate, h0 = self.leaves
        return self._op(q, k, v, gate, initial_state=h0, output_final_state=True)

    def backward(self, outputs, keep=False):
        return torch.autograd.grad(outputs, self.leaves, self.gradients, retain_graph=keep)

    def both(self):
        if self.forward_only:
            with torch.no_grad():
                return self.forward()
        outputs = self.forward()
        return (*outputs, *self.backward(outputs))

    def results(self):
        return dict(zip(NAMES, (tensor.detach() for tensor in self.both())))


def allow_gated_backward():
    """Lets fla run the gated backward of simple GLA on Hopper with Triton 3.4 to 3.7.0.

    fla 0.6 refuses it there because Triton miscompiles it for tiles of 64 along K (fla's own issue
    640). At the shapes here the tile is 128 wide; the comparison with float64 judges the results.
    """
    from fla.ops.common import chunk_o
    from fla.utils import hardware
    blocked = hardware.IS_NVIDIA_HOPPER and not getattr(chunk_o, "TRITON_ABOVE_3_7_1", True)
    if blocked:
        chunk_o.TRITON_ABOVE_3_7_1 = True
    return blocked


def call_for_compilation(op, shape):
    batch, length, heads, key_dim, value_dim = SHAPES[shape]
    Fla(op, make_inputs(op, batch, min(length, 256), heads, key_dim, value_dim)).both()
    torch.cuda.synchronize()


# ---- Comparing ----------------------------------------------------------------------------------


def float64_results(inputs):
    leaves = {name: inputs[name].double().requires_grad_()
              for name in ("q", "k", "v", "gate", "initial_state")}
    outputs = gla_ops.naive(*leaves.values())
    gradients = torch.autograd.grad(outputs, list(leaves.values()),
                                    [inputs["d_o"].double(), inputs["d_final_state"].double()])
    return dict(zip(NAMES, (tensor.detach() for tensor in (*outputs, *gradients))))


def ratios(found, expected):
    names = FORWARD if Fla.forward_only else NAMES
    return {name: gla_ops.ratio(found[name], expected[name]) for name in names}


def within(values, limit):
    return all(value <= limit(name) for name, value in values.items())  # false for NaN


def show(title, values, good):
    text = " ".join(f"{name} {value:.1e}" for name, value in values.items())
    print(f"  {title:26} {text}  {'ok' if good else 'FAILED'}", flush=True)


def check_short(library, op, heads, key_dim, value_dim):
    """Both against the recurrence in float64."""
    inputs = make_inputs(op, 2, CHECK_LENGTH, heads, key_dim, value_dim, seed=7)
    expected = float64_results(inputs)
    problem = gla_ops.Problem(library, inputs)
    problem.poison()
    problem.run(backward=not Fla.forward_only)
    ours, fla = ratios(problem.results(), expected), ratios(Fla(op, inputs).results(), expected)
    del expected

    def limit(name):
        return TOLERANCE.get(name, TOLERANCE_ELSE)

    show(f"ours - float64, T={CHECK_LENGTH}", ours, within(ours, limit))
    show(f"fla  - float64, T={CHECK_LENGTH}", fla, within(fla, limit))
    return dict(op=op, key_dim=key_dim, value_dim=value_dim, ours=ours, fla=fla,
                ours_ok=within(ours, limit), fla_ok=within(fla, limit))


# ---- Timing -------------------------------------------------------------------------------------


def time_fla_eager(fla):
    with torch.no_grad():
        forward = timed(fla.forward)
    if fla.forward_only:
        return dict(forward=forward)
    outputs = fla.forward()
    backward = timed(lambda: fla.backward(outputs, keep=True))
    return dict(forward=forward, backward=backward, both=timed(fla.both))


def check_replay(graph, results, expected):
    """A capture that lost work would look fast: its results are poisoned and made anew."""
    for tensor in results.values():
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in results.items():
        error = gla_ops.ratio(tensor, expected[name])
        if not error <= 1e-3:
            raise RuntimeError(f"{name} of the replay is off by {error:.1e}")


def time_fla_graph(op, inputs, expected):
    """The same as captured graphs, or the reason why they cannot be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):  # autograd works on the stream of the forward pass
            fla = Fla(op, inputs)
            for _ in range(2):
                fla.both()
        torch.cuda.synchronize()
        if fla.forward_only:
            graph, outputs = fla_tools.capture(fla.both)
            check_replay(graph, dict(zip(FORWARD, outputs)), expected)
            return dict(forward=timed(graph.replay)), None
        forward, backward, both = (torch.cuda.CUDAGraph() for _ in range(3))
        with torch.cuda.graph(both, stream=stream):
            everything = fla.both()
        with torch.cuda.graph(forward, stream=stream):
            outputs = fla.forward()
        # What the forward pass saved stays as it is, so that the backward pass can run alone.
        with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
            gradients = fla.backward(outputs, keep=True)
        check_replay(both, dict(zip(NAMES, map(torch.Tensor.detach, everything))), expected)
        check_replay(forward, dict(zip(NAMES, map(torch.Tensor.detach, outputs))), expected)
        check_replay(backward, dict(zip(NAMES[2:], gradients)), expected)
        return dict(forward=timed(forward.replay), backward=timed(backward.replay),
                    both=timed(both.replay)), None
    except Exception as error:
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {error}"[:300]


def fla_extra_bytes(fla):
    """Peak memory of forward and backward beyond inputs and results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = fla.both()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in results)


def memory_beside_torch(library):
    return library.memory_in_use() - torch.cuda.memory_reserved()


def time_ours(problem):
    parts = dict(forward=(True, False), backward=(False, True), both=(True, True))
    if Fla.forward_only:
        del parts["backward"], parts["both"]
    return {mode: {part: statistics.median(problem.time(fla_tools.REPEATS, replay, *which))
                   for part, which in parts.items()}
            for mode, replay in (("graph", True), ("eager", False))}


def same_bits(problem):
    backward = not Fla.forward_only
    problem.poison()
    problem.run(backward=backward)
    first = {name: tensor.clone() for name, tensor in problem.results().items()}
    problem.poison()
    problem.run(backward=backward)
    return all(torch.equal(first[name].view(torch.uint8), tensor.view(torch.uint8))
               for name, tensor in problem.results().items())


def backward_floor_bytes(inputs):
    """q, k, v, gate and do read once, their gradients written once (12 K + 6 V for GLA's token and
    head); states are left out."""
    read = sum(inputs[name].nbytes for name in ("q", "k", "v", "gate"))
    return 2 * read + inputs["d_o"].nbytes


def compare(library, op, shape, rate):
    inputs = make_inputs(op, *SHAPES[shape])
    fla = Fla(op, inputs)
    problem = gla_ops.Problem(library, inputs)
    before = memory_beside_torch(library)
    problem.poison()
    problem.run(backward=not Fla.forward_only)  # its first: what it takes beside torch shows
    growth = memory_beside_torch(library) - before
    expected = fla.results()
    mutual = ratios(problem.results(), expected)
    agrees, repeatable = within(mutual, lambda name: TOLERANCE_MUTUAL), same_bits(problem)
    show(f"ours - fla, {shape}", mutual, agrees)
    torch.cuda.empty_cache()
    ours = time_ours(problem)
    graph, reason = time_fla_graph(op, inputs, expected)
    del expected
    row = dict(op=op, shape=shape, ratios=mutual, agrees=agrees, same_bits=repeatable, ours=ours,
               fla=dict(eager=time_fla_eager(fla), graph=graph, graph_reason=reason),
               ours_extra_bytes=max(problem.workspace_bytes.values()),
               fla_extra_bytes=fla_extra_bytes(fla),
               ours_growth_bytes=growth)
    best = graph or row["fla"]["eager"]
    if not Fla.forward_only:
        row["floor_bytes"] = backward_floor_bytes(inputs)
        row["floor_ms"] = 1e3 * row["floor_bytes"] / rate
        row["backward_over_floor"] = ours["graph"]["backward"] / row["floor_ms"]
    for part, milliseconds in ours["graph"].items():
        row[part + "_speedup"] = best[part] / milliseconds
    row["memory_share"] = row["ours_extra_bytes"] / max(row["fla_extra_bytes"], 1)
    return row


def print_table(rows):
    head = ("op", "shape", "", "ours graph", "eager", "fla graph", "eager", "fla/ours", "x floor",
            "extra MB", "fla's", "bits")
    layout = "{:10} {:13} {:8} {:>10} {:>8} {:>10} {:>8} {:>8} {:>8} {:>9} {:>8} {:>6}"
    print("\nmilliseconds\n" + layout.format(*head))
    for row in rows:
        for part in row["ours"]["graph"]:
            ours, fla = row["ours"], row["fla"]
            graph = (fla["graph"] or {}).get(part)
            last = part == list(ours["graph"])[-1]
            print(layout.format(
                row["op"], row["shape"], part, f"{ours['graph'][part]:.3f}",
                f"{ours['eager'][part]:.3f}", f"{graph:.3f}" if graph else "-",
                f"{fla['eager'][part]:.3f}", f"{row[part + '_speedup']:.2f}",
                f"{row['backward_over_floor']:.2f}" if part == "backward" else "",
                f"{row['ours_extra_bytes'] / 1e6:.1f}" if last else "",
                f"{row['fla_extra_bytes'] / 1e6:.1f}" if last else "",
                ("same" if row["same_bits"] else "DIFFER") if last else ""))
        if row["fla"]["graph_reason"]:
            print(f"  fla not captured: {row['fla']['graph_reason']}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--library", dest="lib", default="build/release/lib/libgla_ops_cuda.so")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--forward-only", action="store_true", help="no backward pass")
    parser.add_argument("--json", help="file to write the figures to")
    fla_tools.add_tuning_arguments(parser)
    args = parser.parse_args()
    Fla.forward_only = args.forward_only
    args.ops, args.shapes = args.ops.split(","), args.shapes.split(",")
    for value, known in [(args.ops, OPS), (args.shapes, SHAPES)]:
        unknown = sorted(set(value) - set(known))
        if unknown:
            parser.error(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    return args


def main():
    args = parse()
    if args.compile_share:
        fla_tools.compile_only(args.compile_share)
        allow_gated_backward()
        for op, shape in itertools.product(args.ops, tuned_at(args.shapes)):
            call_for_compilation(op, shape)
        return 0
    start = time.time()
    if args.workers > 0:
        fla_tools.precompile(args.workers, __file__, sys.argv[1:])
    fla_tools.shorten_tuning()
    forced = not args.forward_only and allow_gated_backward()
    library = gla_ops.Library(args.lib)
    rate = fla_tools.copy_rate()
    torch.cuda.empty_cache()
    report = dict(bench="operators", **fla_tools.versions(), copy_bytes_per_second=rate, checks=[],
                  rows=[], fla_gated_backward_forced=forced)
    print(fla_tools.describe(report) +
          (", fla's refusal of the gated backward lifted" if forced else ""), flush=True)
    for op in args.ops:
        for shape in args.shapes:
            if shape in tuned_at(args.shapes):
                Fla(op, make_inputs(op, *SHAPES[shape])).both()
                torch.cuda.empty_cache()
                print(f"{op} {shape}: fla tuned after {time.time() - start:.0f} s", flush=True)
                report["checks"].append(check_short(library, op, *SHAPES[shape][2:]))
                torch.cuda.empty_cache()
            report["rows"].append(compare(library, op, shape, rate))
            torch.cuda.empty_cache()
    print_table(report["rows"])
    report["seconds"] = time.time() - start
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    good = all(row["agrees"] and row["same_bits"] for row in report["rows"]) and \
        all(check["ours_ok"] for check in report["checks"])
    print(f"{report['seconds']:.0f} s, {'all checks passed' if good else 'A CHECK FAILED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
