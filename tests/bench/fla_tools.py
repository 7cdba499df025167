"""What the comparisons with flash-linear-attention share: timing, CUDA graphs, and fla's tuning.

fla's kernels choose among many candidates at their first call. Worker processes compile those side
by side beforehand into Triton's own cache (TRITON_CACHE_DIR), where a second run finds them: a
script calls precompile(), which starts it again with `--compile-share INDEX/COUNT`, and there it
calls compile_only() before it calls fla.
"""

import argparse
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
import time

import torch

REPEATS = 30


def timed(run, repeats=REPEATS):
    """Median milliseconds between events around calls that are queued without waiting."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))


def copy_rate():
    """Bytes read plus bytes written per second."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / timed(lambda: target.copy_(source))


def capture(run):
    """A graph of one run(), which was called before, and what it returned."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def versions():
    import fla
    import triton
    return dict(device=torch.cuda.get_device_name(), fla=fla.__version__, torch=torch.__version__,
                triton=triton.__version__)


def describe(report):
    return (f"{report['device']}, fla {report['fla']}, torch {report['torch']}, triton "
            f"{report['triton']}, copy {report['copy_bytes_per_second'] / 1e9:.0f} GB/s")


# ---- Tuning -------------------------------------------------------------------------------------


def compile_only(share):
    """From here on fla's tuned kernels are compiled, their candidates shared out among workers, and
    not launched: results are whatever was in memory."""
    from triton.runtime.autotuner import Autotuner
    index, count = map(int, share.split("/"))
    turn = itertools.count()

    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(kwargs):
            if next(turn) % count != index:
                continue
            try:
                self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
            except Exception as error:  # the tuning skips what does not compile, too
                print(f"{self.base_fn.__name__} {config}: {error}"[:200], file=sys.stderr)
        self.nargs = None

    Autotuner.run = run


def precompile(count, script, arguments):
    """Runs `script` as `count` such workers; what fails there is compiled later, one by one."""
    start = time.time()
    command = [sys.executable, os.path.abspath(script), *arguments, "--compile-share"]
    workers = [subprocess.Popen([*command, f"{i}/{count}"], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True) for i in range(count)]
    for i, worker in enumerate(workers):
        errors = worker.communicate()[1]
        if worker.returncode != 0:
            print(f"worker {i} ended with {worker.returncode}: {errors[-400:]}", file=sys.stderr)
    print(f"compiled fla's candidates with {count} workers in {time.time() - start:.0f} s",
          flush=True)


def shorten_tuning():
    """30 ms of repetitions for each candidate instead of 100: still tens of runs and a median."""
    import triton.testing
    triton.testing.do_bench = functools.partial(triton.testing.do_bench, warmup=5, rep=30)


def tune_anew():
    """Forgets what fla's kernels chose. Their choice is kept without regard to the number of
    sequences or tokens: this gives each size its own."""
    from triton.runtime.autotuner import Autotuner
    for tuner in [x for x in gc.get_objects() if issubclass(type(x), Autotuner)]:
        tuner.cache.clear()
        tuner.cache_results = False  # nor from the disk


def add_tuning_arguments(parser):
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes that compile fla's candidates first; 0: none")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
