"""Is one version of the library slower than another? Times two checkouts on one machine, in turn, in one run.

    python benchmarks/compare.py OLD NEW                  two folders, each with a `snnfuse` package
    python benchmarks/compare.py HEAD~5 HEAD --rounds 9   two git revisions of this repository
    python benchmarks/compare.py OLD NEW --tiny           small shapes on a CPU; checks that it runs

Times a LIF layer (T = 32, 2^20 lanes, float32 and bfloat16; T = 500, 2^13 lanes) forward and backward, and a training step
of Spiking-ResNet-18 (bfloat16, T = 32, B = 100, 28 x 28). Each checkout runs in a process of its own, with these scripts; it
must have what with_jax.py imports. In every round both are timed on each case, one right after the other; the order
alternates. It prints the median of the rounds and the ratio new / old with its quartiles, and exits with 1 if a median ratio
is above 1 + tolerance. About two minutes on an H100.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

CASES = {  # T and lanes, or T, B and the size of the images
    "lif T=32 2^20 float32": (32, 2**20),
    "lif T=32 2^20 bfloat16": (32, 2**20),
    "lif T=500 2^13 float32": (500, 2**13),
    "resnet18 bfloat16": (32, 100, 28),
}
TINY = {2: (4, 256), 3: (2, 2, 16)}


def start(folder):
    """Lets a worker process import the snnfuse of a folder, before anything else puts another one on the path."""
    sys.path.insert(0, str(folder))
    import snnfuse

    if folder not in Path(snnfuse.__file__).resolve().parents:
        raise ImportError(f"{folder}: this folder's snnfuse was wanted, {snnfuse.__file__} was imported")


@cache
def case(name, tiny):
    """(a call, compiled, how often it does what is timed), in a worker process."""
    import jax
    from with_jax import batches, forward_backward, repeated, resnet, training_step

    import snnfuse as sf

    shape = TINY[len(CASES[name])] if tiny else CASES[name]
    if "resnet" in name:
        step, sets = training_step(resnet(None, 18, "bfloat16")), batches(*shape, count=1)
        call = lambda: step(*sets[0])
    else:
        draw = lambda seed: jax.random.normal(jax.random.key(seed), shape).astype(name.split()[-1])
        sets = [((draw(2 * i) + 0.3,), draw(2 * i + 1)) for i in range(4)]
        both = forward_backward(lambda x: sf.unroll(sf.LIF(), sf.LIFParams(), None, x)[0])
        call = partial(repeated(both, sets), sets)
    for _ in range(6):
        jax.block_until_ready(call())
    return call, len(sets)


def time_case(name, tiny):
    """Milliseconds of a case."""
    import jax
    from runner import time_ms

    call, count = case(name, tiny)
    return time_ms(call, jax.block_until_ready, repeats=5, seconds=0.05)[0] / count


@contextlib.contextmanager
def folder_of(given):
    """A folder, or a git revision checked out into a temporary one."""
    if Path(given).is_dir():
        yield Path(given).resolve()
        return
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", given, "snnfuse"], cwd=root, capture_output=True)
        if archive.returncode:
            sys.exit(f"{given}: neither a folder nor a git revision: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder).resolve()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a folder or a git revision")
    parser.add_argument("new", help="a folder or a git revision")
    parser.add_argument("--rounds", type=int, default=9, help="an odd number; default 9")
    parser.add_argument("--tolerance", type=float, default=0.02, help="the largest slowdown that passes; default 0.02")
    parser.add_argument("--only", default="", help="only the cases whose name matches this regular expression")
    parser.add_argument("--tiny", action="store_true", help="small shapes, also without a GPU")
    args = parser.parse_args(argv)
    slower = []
    with folder_of(args.old) as old, folder_of(args.new) as new, tempfile.TemporaryDirectory() as cache:
        # Both processes take the same choice of algorithms, which XLA otherwise makes by timing them in each process.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_per_fusion_autotune_cache_dir={cache}"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        spawn = multiprocessing.get_context("spawn")
        workers = [ProcessPoolExecutor(1, spawn, start, (folder,)) for folder in (old, new)]
        ms = lambda worker, case: worker.submit(time_case, case, args.tiny).result()
        print(f"{'case':24} {'old ms':>9} {'new ms':>9}   new / old (quartiles)")
        for case in filter(re.compile(args.only).search, CASES):
            rounds = []
            for worker in workers:  # compiles, one after the other
                ms(worker, case)
            for i in range(args.rounds):
                pair = [ms(workers[j], case) for j in ((0, 1) if i % 2 else (1, 0))]
                rounds.append(pair if i % 2 else pair[::-1])
            ratios = [b / a for a, b in rounds]
            low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            a, b = (statistics.median(times) for times in zip(*rounds, strict=True))
            slower += [case] if ratio > 1 + args.tolerance else []
            print(f"{case:24} {a:9.4f} {b:9.4f}   {ratio:.4f} ({low:.4f} to {high:.4f})", flush=True)
        for worker in workers:
            worker.shutdown()
    print(f"slower than the tolerance: {', '.join(slower)}" if slower else "no case is slower than the tolerance")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
