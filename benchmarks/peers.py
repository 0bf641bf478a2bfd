"""snnfuse beside the other libraries, on the same tensors and on one device.

    python benchmarks/peers.py                    three minutes on an H100; rows go to results/peers.jsonl
    python benchmarks/peers.py --tiny             small shapes, without a GPU too; rows are printed only
    python benchmarks/peers.py --keep             what has no time yet in results/peers.jsonl, in the same order
    python benchmarks/peers.py --only 'shd|n512' --libraries snnfuse,spikingjelly --keep

The peers are not dependencies of snnfuse: `pip install --no-deps --target FOLDER` them and put FOLDER on PYTHONPATH. One
that cannot be imported is a row that says so. Each library has a process of its own, which waits while another is timed.
`adapters/` says how each is called; `PLAN` in which order. A case is checked before it is timed: its spikes are those of
our scan on the same input (of a LIF layer alone, its gradients too); a wrong one has no time.
"""

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from adapters import cases  # noqa: E402

OURS = {"snnfuse": ["pallas", "scan"]}
JELLY = {"spikingjelly": ["triton", "native"]}
TORCH = {"snntorch": ["loop"], "norse": ["loop"]}
JAX = {"spyx": ["run"], "jaxpike": ["unroll", "remat"], "sparx": ["unroll 1", "unroll 8"]}
ONE = {"spyx": ["run"], "jaxpike": ["unroll"], "sparx": ["unroll 8"]}
PLAN = [  # the most important first: the budget cuts the end
    ("lif_T32_N1048576", "float32", OURS | JELLY),
    ("lif_T32_N1048576", "bfloat16", OURS | {"spikingjelly": ["triton", "storage", "native"]}),
    ("lif_T500_N8192", "float32", OURS | JELLY),
    ("resnet18_28", "tf32", {"spikingjelly": ["triton", "relu"]}),
    ("resnet18_28", "bfloat16", {"snnfuse": ["pallas"], "spikingjelly": ["triton", "relu"]}),
    ("open_neuromorphic_n512", "tf32", {"snnfuse": ["pallas", "scan"], "spikingjelly": ["triton"]} | TORCH | ONE),
    ("lif_T32_N1048576", "float32", TORCH | JAX | {"spikingjelly_cupy": ["cupy"]}),
    ("shd", "tf32", {"snnfuse": ["pallas", "scan"], "spikingjelly": ["triton"]} | TORCH | ONE),
    ("resnet18_28", "tf32", {"snnfuse": ["pallas"]}),
    ("lif_T256_N131072", "float32", OURS | JELLY),
    ("open_neuromorphic_n4096", "tf32", {"snnfuse": ["pallas"], "spikingjelly": ["triton"]} | ONE),
    ("open_neuromorphic_n16384", "tf32", {"snnfuse": ["pallas"], "spikingjelly": ["triton"]} | ONE),
    ("lif_T500_N8192", "float32", JAX | TORCH | {"spikingjelly_cupy": ["cupy"]}),
    ("lif_T32_N1048576", "bfloat16", ONE),
    ("lif_T32_N1048576", "float32", {"snnfuse": ["mosaic", "triton"], "spikingjelly": ["storage"]}),
    ("lif_T32_N1048576", "bfloat16", {"snnfuse": ["mosaic", "triton"]}),
    ("lif_T500_N8192", "float32", {"snnfuse": ["mosaic", "triton"]}),
    ("resnet18_28", "bfloat16", {"spikingjelly": ["cast"]}),
    ("open_neuromorphic_n4096", "tf32", TORCH),
    ("open_neuromorphic_n16384", "tf32", TORCH),
    ("lif_T256_N131072", "float32", ONE | TORCH | {"snnfuse": ["mosaic", "triton"]}),
]


def tasks(tiny):
    """(library, way, case, dtype), in order."""
    for case, dtype, libraries in PLAN:
        for library, ways in libraries.items():
            for way in ways:
                if tiny and way == "pallas":  # which needs a GPU; a network of it would be interpreted for minutes
                    way = "scan" if case.startswith("resnet") else "interpret"
                yield library, way, case, dtype


def work(library, pipe, first_on_path):
    """A library's process: says what it is, then answers (function, arguments) with a row."""
    sys.path[:0] = first_on_path
    try:
        adapter = importlib.import_module(f"adapters.{library}")
        side = importlib.import_module(f"adapters.with_{adapter.SIDE}")
        pipe.send(dict(version=adapter.version(), device=side.DEVICE) | side.versions(library))
    except Exception as e:  # a missing library is a row
        pipe.send(dict(status=f"not here: {e!r}"[:300]))
        return
    pipe.send(adapter.REFERENCE)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # no more questions
            return
        try:
            pipe.send(getattr(side, function)(adapter, *arguments))
        except Exception as e:  # a failure is a row
            pipe.send(dict(status=f"failed: {e!r}"[:300]))


class Worker:
    def __init__(self, library, first_on_path=()):
        self.library, self.first_on_path = library, list(first_on_path)
        self.facts = None
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(library, theirs, self.first_on_path), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, seconds):
        if not self.pipe.poll(seconds):
            self.process.kill()
            self.process.join()
            return dict(status=f"failed: not done in {seconds:.0f} s")
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return dict(status=f"failed: the process died ({self.process.exitcode})")

    def ready(self, seconds):
        """Whether it can be asked; `facts` are then its versions, else why not."""
        if self.facts is None:
            self.facts = self.answer(seconds)
            if "status" not in self.facts:
                self.reference = self.answer(seconds)
        return "status" not in self.facts

    def ask(self, seconds, function, *arguments):
        self.pipe.send((function, arguments))
        return self.answer(seconds)


CONTEXT = multiprocessing.get_context("spawn")


class Run:
    """The workers, the references they are compared with, and the clock."""

    def __init__(self, args):
        self.args, self.start = args, time.perf_counter()
        self.workers, self.references = {}, {}

    def worker(self, library):
        worker = self.workers.get(library)
        if worker is None or (worker.facts and "status" not in worker.facts and not worker.process.is_alive()):
            path = [self.args.cupy] if library == "spikingjelly_cupy" and self.args.cupy else []
            worker = self.workers[library] = Worker(library, path)
        return worker

    def reference(self, case, dtype, neuron, seconds):
        """What our scan gives, from our own process; made once."""
        key = case.name, dtype, neuron
        if case.kind != "resnet" and key not in self.references:
            ours = self.worker("snnfuse")
            if not ours.ready(seconds):
                return ours.facts
            self.references[key] = ours.ask(seconds, "reference", case, dtype, neuron)
        return self.references.get(key, {})

    def row(self, library, way, name, dtype):
        case = cases.find(name, self.args.tiny)
        if self.left() <= 0:
            return dict(status=f"not run: the budget of {self.args.budget:.0f} s was spent")
        worker, seconds = self.worker(library), min(self.args.case_seconds, self.left() + 10)
        if not worker.ready(60):
            return dict(worker.facts)
        reference = self.reference(case, dtype, worker.reference, seconds)
        if "status" in reference:
            return dict(status=f"no reference: {reference['status']}")
        return worker.facts | worker.ask(seconds, "run", case, dtype, way, reference)

    def left(self):
        return self.args.budget - (time.perf_counter() - self.start)


def record(path, row):
    """A row as `measure.record` writes it, without JAX in this process."""
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=HERE).stdout.strip()
    row = dict(case=None, library=None, how=None, dtype=None, status="ok") | row
    if row["status"] != "ok":
        row["ms"] = None
    row |= dict(
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        commit=os.environ.get("SNNFUSE_COMMIT") or git("rev-parse", "--short", "HEAD") or "unknown",
        dirty=bool(git("status", "--porcelain", "--untracked-files=no", "--", "../snnfuse", ".", ":!results")),
    )
    digits = lambda v: float(f"{v:.5g}") if isinstance(v, float) else v
    row = {k: [digits(x) for x in v] if isinstance(v, tuple) else digits(v) for k, v in row.items()}
    if path:
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def start(path, todo, keep):
    """What of `todo` has no time in the file yet; what is to be run anew is removed from it."""
    lines = path.read_text().splitlines() if keep and path.exists() else []
    task = lambda r: (r["library"], r["how"], r["case"], r["dtype"])
    done = {task(r) for r in map(json.loads, lines) if r["status"] == "ok"}
    todo = [t for t in todo if t not in done]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines if task(json.loads(line)) not in todo))
    return todo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes; 'pallas' in the interpreter")
    parser.add_argument("--only", default="", help="a regular expression of cases")
    parser.add_argument("--libraries", default="", help="of these alone")
    parser.add_argument("--ways", default="", help="a regular expression of ways")
    parser.add_argument("--budget", type=float, default=190, help="seconds, after which the other rows say so")
    parser.add_argument("--case-seconds", type=float, default=60, help="the longest that one row may take")
    parser.add_argument("--cupy", default="", help="a folder with SpikingJelly 0.0.0.0.14")
    parser.add_argument("--keep", action="store_true", help="keep the rows that have a time, and run the others")
    parser.add_argument("--out", type=pathlib.Path, help="the file of the rows")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    path = args.out or (None if args.tiny else HERE / "results/peers.jsonl")
    chosen = args.libraries.split(",") if args.libraries else []
    todo = [
        (library, way, case, dtype)
        for library, way, case, dtype in tasks(args.tiny)
        if (not chosen or library in chosen) and re.search(args.only, case) and re.search(args.ways, way)
    ]
    if path:
        todo = start(path, todo, args.keep)
    run = Run(args)
    for library in dict.fromkeys(["snnfuse", *(library for library, *_ in todo)]):
        run.worker(library)  # they import side by side
    for library, way, case, dtype in todo:
        begin = time.perf_counter()
        row = run.row(library, way, case, dtype)
        took = time.perf_counter() - begin
        record(path, dict(case=case, library=library, how=way, dtype=dtype) | row | dict(row_s=took))


if __name__ == "__main__":
    main()
