#!/usr/bin/env python3
"""Steps of whole models, decode and prefill, of flash-linear-attention and of ours, on one GPU.

fla's GLAForCausalLM with random bfloat16 weights and float32 states, as `pip install
flash-linear-attention` gives it, is called eagerly and replayed as a CUDA graph. Its decode step
ends with the logits of one token for each sequence. In the graph it reads the same states at each
replay and writes the new ones beside them, as its layers do; the copy back that a generation under
that graph would need is not there. Its kernels are tuned anew for each number of sequences.

Ours is gla-bench-engine of the same sizes, once for each --state-dtype; its step has the upload of
the plan, greedy sampling and the download of the ids in it. The limit is the bytes of a step (the
weights once, every state read and written) at the rate of a plain copy in device memory.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time

import torch

import fla_tools

CONFIGS = {  # as gla-bench-engine has them
    "gla-340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=4, intermediate_size=2816,
                     vocab_size=32000, tie_word_embeddings=True),
    "gla-1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_heads=4, intermediate_size=5632,
                     vocab_size=32000, tie_word_embeddings=False),
}
STATES = ("float32", "int16")
EAGER_REPEATS = 10


# ---- fla ----------------------------------------------------------------------------------------


def make_model(config, **changes):
    from fla.models import GLAConfig, GLAForCausalLM
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = GLAForCausalLM(GLAConfig(**{**CONFIGS[config], **changes}))
    return model.to(torch.bfloat16).eval()


def tokens(model, seqs, length):
    return torch.arange(seqs * length, device="cuda").view(seqs, length) * 7919 % \
        model.config.vocab_size


def weight_bytes(model):
    """What a step reads: without the embeddings, unless the head has them too."""
    total = sum(weight.nbytes for weight in model.parameters())  # shared ones come once
    embeddings = 0 if model.config.tie_word_embeddings else model.model.embeddings.weight.nbytes
    return total - embeddings


def states_of(cache):
    return [cache[i]["recurrent_state"] for i in range(len(cache))]


class Decode:
    """One token for each of `seqs` sequences; each call goes on from the states of the last."""

    def __init__(self, model, seqs):
        self._model, self._ids = model, tokens(model, seqs, 1)
        self.cache = model(self._ids, use_cache=True).past_key_values

    def __call__(self):
        return self._model(self._ids, past_key_values=self.cache, use_cache=True).logits

    def replay(self):
        """The graph of a step, whose logits were found to be an eager step's; and what it needs."""
        states = states_of(self.cache)  # the graph reads these, so they must stay
        expected = self()
        for i, state in enumerate(states):
            self.cache[i]["recurrent_state"] = state
        torch.cuda.empty_cache()
        graph, logits = fla_tools.capture(self)
        check_replay(graph, logits, expected)
        return graph, states


class Prefill:
    """One prompt from the empty state to the logits of its last token."""

    def __init__(self, model, length):
        self._model, self._ids = model, tokens(model, 1, length)

    def __call__(self):
        return self._model(self._ids, use_cache=True, logits_to_keep=1).logits

    def replay(self):
        expected = self()
        graph, logits = fla_tools.capture(self)
        check_replay(graph, logits, expected)
        return graph, None


def check_replay(graph, logits, expected):
    """A capture that lost work would look fast: its results are poisoned and made anew."""
    logits.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    error = (logits.float() - expected.float()).abs().max() / expected.float().std()
    if not error <= 1e-2:
        raise RuntimeError(f"the logits of the replay are off by {error:.1e}")


def time_fla(make):
    """Milliseconds eager and replayed; what does not fit, or cannot be captured, says why."""
    fla_tools.tune_anew()
    row = dict(eager=None, graph=None, reason=None)
    try:
        step = make()
        row["eager"] = fla_tools.timed(step, EAGER_REPEATS)
        graph, kept = step.replay()
        row["graph"] = fla_tools.timed(graph.replay)
        del graph, kept
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {error}"[:300]
        print(f"  fla: {row['reason']}", file=sys.stderr)
    step = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return row


def measure_fla(config, args):
    model = make_model(config)
    cache = model(tokens(model, 1, 1), use_cache=True).past_key_values
    result = dict(parameters=sum(weight.numel() for weight in model.parameters()),
                  weight_bytes=weight_bytes(model),
                  state_bytes=sum(state.nbytes for state in states_of(cache)), decode={},
                  prefill={})
    for seqs in args.seqs:
        result["decode"][seqs] = row = time_fla(lambda: Decode(model, seqs))
        print(f"  fla, {seqs} sequences: eager {show(row['eager'])}, graph {show(row['graph'])} ms",
              flush=True)
    for length in args.prompt:
        result["prefill"][length] = row = time_fla(lambda: Prefill(model, length))
        print(f"  fla, prompt of {length}: eager {show(row['eager'])}, graph "
              f"{show(row['graph'])} ms", flush=True)
    return result


# ---- Ours ---------------------------------------------------------------------------------------


def measure_ours(config, state, args):
    """gla-bench-engine's report, or None when it fails."""
    command = [args.engine, "--backend", "cuda", "--json", "--config", config, "--state-dtype",
               state, "--seqs", ",".join(map(str, args.seqs)), "--prompt",
               ",".join(map(str, args.prompt))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"  {' '.join(command)} ended with {done.returncode}: {done.stderr[-400:]}",
              file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---- Side by side -------------------------------------------------------------------------------


def row_of(rows, key, value):
    return next((row for row in rows if row[key] == value), None)


def combine(config, fla, ours, args, rate):
    """Rows of milliseconds: fla's, ours by state, the limits by state."""
    reports = {state: report for state, report in ours.items() if report}
    if fla:
        base = {key: fla[key] for key in ("parameters", "weight_bytes", "state_bytes")}
    else:
        base = {}
    model = dict(model=config, **base, decode=[], prefill=[], engine=reports)
    for seqs in args.seqs:
        row = dict(seqs=seqs, fla=fla["decode"][seqs] if fla else None, ours={}, limit={})
        if fla:
            size = fla["weight_bytes"] + 2 * seqs * fla["state_bytes"]
            row["limit"]["float32"] = 1e3 * size / rate
        for state, report in reports.items():
            found = row_of(report["decode"], "seqs", seqs)
            row["ours"][state] = found["ms_per_step"]
            row["limit"][state] = 1e3 * found["bytes_per_step"] / report["copy_bytes_per_second"]
        model["decode"].append(row)
    for length in args.prompt:
        row = dict(tokens=length, fla=fla["prefill"][length] if fla else None, ours={})
        for state, report in reports.items():
            row["ours"][state] = row_of(report["prefill"], "tokens", length)["ms"]
        model["prefill"].append(row)
    return model


def show(milliseconds):
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


def print_table(model):
    head = ("sequences", "fla eager", "fla graph", "ours fp32", "limit", "ours int16", "limit",
            "fla/fp32", "fla/int16")
    layout = "{:>14}" + " {:>10}" * (len(head) - 1)
    print(f"\n{model['model']}, milliseconds\n" + layout.format(*head))
    titles = [(str(row["seqs"]), row) for row in model["decode"]] + \
        [(f"{row['tokens']} prompt", row) for row in model["prefill"]]
    for title, row in titles:
        fla, ours, limit = row["fla"] or {}, row["ours"], row.get("limit", {})
        best = fla.get("graph") or fla.get("eager")
        speedups = [f"{best / ours[state]:.2f}" if best and ours.get(state) else "-"
                    for state in STATES]
        print(layout.format(title, show(fla.get("eager")), show(fla.get("graph")),
                            show(ours.get("float32")), show(limit.get("float32")),
                            show(ours.get("int16")), show(limit.get("int16")), *speedups))


def parse():
    def numbers(text):
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--engine", default="build/release/bin/gla-bench-engine",
                        help="ours; empty: fla alone")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--states", default=",".join(STATES), help="formats of ours")
    parser.add_argument("--seqs", type=numbers, default=[1, 8, 64, 256, 512])
    parser.add_argument("--prompt", type=numbers, default=[2048])
    parser.add_argument("--no-fla", action="store_true", help="ours alone")
    parser.add_argument("--json", help="file to write the figures to")
    fla_tools.add_tuning_arguments(parser)
    args = parser.parse_args()
    args.configs, args.states = args.configs.split(","), args.states.split(",")
    for value, known in [(args.configs, CONFIGS), (args.states, STATES)]:
        unknown = sorted(set(value) - set(known))
        if unknown:
            parser.error(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    return args


def compile_candidates(args):
    """One layer has every kernel that the model has."""
    fla_tools.compile_only(args.compile_share)
    for config in args.configs:
        model = make_model(config, num_hidden_layers=1)
        for step in itertools.chain((Decode(model, seqs) for seqs in args.seqs),
                                    (Prefill(model, length) for length in args.prompt)):
            step()
        torch.cuda.synchronize()


@torch.no_grad()
def main():
    args = parse()
    if args.compile_share:
        compile_candidates(args)
        return
    start = time.time()
    if args.workers > 0 and not args.no_fla:
        fla_tools.precompile(args.workers, __file__, sys.argv[1:])
    rate = fla_tools.copy_rate()
    torch.cuda.empty_cache()
    if args.no_fla:
        report = dict(device=torch.cuda.get_device_name())
    else:
        fla_tools.shorten_tuning()
        report = fla_tools.versions()
    report.update(bench="model", copy_bytes_per_second=rate, models=[])
    print(f"{report['device']}, copy {rate / 1e9:.0f} GB/s" if args.no_fla
          else fla_tools.describe(report), flush=True)
    finished = report["models"]
    for config in args.configs:
        print(config, flush=True)
        fla = None if args.no_fla else measure_fla(config, args)
        torch.cuda.empty_cache()
        ours = {}
        for state in (None, *(args.states if args.engine else ())):
            if state:
                ours[state] = measure_ours(config, state, args)
            report["models"] = [*finished, combine(config, fla, ours, args, rate)]
            if args.json:  # at every stage, should the next one fail
                with open(args.json, "w") as file:
                    json.dump(report, file, indent=1)
        finished = report["models"]
        print(f"  done after {time.time() - start:.0f} s", flush=True)
    for model in report["models"]:
        print_table(model)


if __name__ == "__main__":
    main()
