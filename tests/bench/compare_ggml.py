#!/usr/bin/env python3
"""Decode steps on the CPU against ggml's operators, in turns in one run.

ggml's side (compare_ggml.cc) is one graph per step with the same matrix products, bfloat16 weights,
float32 activations, and ggml_gated_linear_attn on as many state elements. It leaves out what else a
step has (norms, gates, embedding, the state written back to its slot, sampling); ours, of
gla-bench-engine, is the whole step. --ggml names a checkout, which is built here, for this machine
and the CPU only, with the settings that were fastest for it:

    git clone --depth 1 https://github.com/ggml-org/ggml
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# hidden, layers, keys, values, gate rank, intermediate, vocabulary, square heads of ggml's operator
SHAPES = {
    "gla-340m": (1024, 24, 512, 1024, 16, 2816, 32000, 128),
    "bard-6m": (256, 6, 128, 256, 16, 768, 2048, 32),
}
STEPS = {"gla-340m": 20, "bard-6m": 300}


def build(ggml, folder):
    """The path of the program, built against the checkout `ggml`."""
    run = lambda *command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run("cmake", "-S", ggml, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF",
        "-DGGML_NATIVE=ON", "-DGGML_LLAMAFILE=ON", "-DGGML_OPENMP=OFF", "-DGGML_BUILD_EXAMPLES=OFF",
        "-DGGML_BUILD_TESTS=OFF", "-DCMAKE_C_FLAGS=-w", "-DCMAKE_CXX_FLAGS=-w")
    run("cmake", "--build", folder, "--target", "ggml", "--parallel", str(os.cpu_count()))
    program = os.path.join(folder, "compare_ggml")
    libraries = [os.path.join(folder, "src", f"lib{name}.a")
                 for name in ("ggml", "ggml-cpu", "ggml-base")]
    run("c++", "-std=c++20", "-O2", "-I", os.path.join(ggml, "include"),
        os.path.join(HERE, "compare_ggml.cc"), "-o", program, *libraries,
        "-lpthread", "-ldl", "-lm")
    return program


def output_of(*command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", required=True, help="checkout of ggml")
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "ggml"))
    parser.add_argument("--engine",
                        default=os.path.join(ROOT, "build", "release", "bin", "gla-bench-engine"))
    parser.add_argument("--configs", default="gla-340m,bard-6m")
    parser.add_argument("--seqs", default="1,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    program = build(args.ggml, args.build)

    report = []
    print(f"{'model':10} {'seqs':>5} {'':14} {'ms/step: best':>14} {'median':>8} {'tokens/s':>9} "
          f"{'ours / ggml':>12} {'% of read rate':>15}")
    for config in args.configs.split(","):
        steps = STEPS[config]
        for seqs in map(int, args.seqs.split(",")):
            times = {"ggml": [], "float32": [], "bfloat16": []}
            shares = {}
            for _ in range(args.rounds):
                numbers = (*SHAPES[config], seqs, args.threads, steps)
                times["ggml"].append(output_of(program, *map(str, numbers))["ms_per_step"])
                for dtype in ("float32", "bfloat16"):
                    ours = output_of(args.engine, "--config", config, "--dtype", dtype, "--seqs",
                                     str(seqs), "--threads", str(args.threads), "--prompt", "1",
                                     "--steps", str(steps), "--json")["decode"][0]
                    times[dtype].append(ours["ms_per_step"])
                    shares.setdefault(dtype, []).append(ours["share_of_read_rate"])
            ggml = statistics.median(times["ggml"])
            for name, ms in times.items():
                median = statistics.median(ms)
                share = f"{100 * statistics.median(shares[name]):15.0f}" if name in shares else ""
                print(f"{config:10} {seqs:5} {name:14} {min(ms):14.3f} {median:8.3f} "
                      f"{1e3 * seqs / median:9.0f} {ggml / median:12.2f} {share}", flush=True)
                report.append(dict(config=config, seqs=seqs, who=name, ms=ms,
                                   share_of_read_rate=shares.get(name)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
