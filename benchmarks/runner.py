"""Run the cases of a question, and store their results as rows.

A script asks a question. It lists `Case`s; each has the fields that name its row and the function that measures the rest.
`main` runs them and appends one row per case to results/<question>.jsonl. A case that fails also gives a row, with the
error as its `status`. report.py fails if a failed row is not expected, so every failure is seen.

A row is one line of JSON:

    the fields in NAMED_BY   what was measured: case, library, implementation, T, M (lanes), B (batch), dtype, ...
    status                   "ok", or what went wrong
    ms, quartiles            milliseconds of device time: the median, and the lower and the upper quartile
    call_ms                  milliseconds of a call from Python, as a user makes it
    further numbers          peak_mb, compile_s, firing_rate, ...
    device, jax or torch, python, date, commit, dirty

If several rows have the same named fields, the last one counts (`rows`).
"""

import argparse
import datetime
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
NAMED_BY = "case library implementation memory T M B C size dtype input devices mesh synchronised sums processes bytes"
NAMED_BY = f"{NAMED_BY} blocks hint note source train steps tests command seed device".split()
sys.path.insert(0, str(HERE.parent))  # this checkout's snnfuse, also in worker processes
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # libraries share the GPU


@dataclass(frozen=True)
class Case:
    """One row: `key` names it, and `measure(*args)` returns its other fields, perhaps with a `status` of its own.

    `process`: "" runs in this process; cases with the same name share a worker process; "fresh" gets a new one.
    `needs` is another case; it runs once, and its result is the last argument of `measure`.

    `measure` may also be a generator that yields once when everything is compiled, and then the fields. With `--jobs` the cases
    then compile at the same time in several processes; after that they are measured, one at a time. Such cases have a `process`.
    """

    key: dict
    measure: Callable[..., dict]
    args: tuple = ()
    process: str = ""
    needs: "Case | None" = None

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in self.key.values() if value is not None)


QUESTIONS: dict[str, tuple] = {}  # the registry: name -> (cases, gpu, options), of all scripts that are imported


def question(name: str, *, gpu: bool = True, **options):
    """Registers a function `args -> cases`. `gpu`: only a GPU gives rows worth storing. `options`: name=(default, help)."""

    def register(cases):
        QUESTIONS[name] = cases, gpu, options
        return cases

    return register


def rows(name: str) -> list[dict]:
    """The rows of a results file; of rows with the same named fields, the last."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return list({identity(row): row for row in map(json.loads, lines)}.values())


def identity(row: dict) -> tuple:
    return tuple((field, str(row[field])) for field in NAMED_BY if row.get(field) is not None)


def time_ms(call, wait, *, repeats=7, seconds=0.05, agree=int):
    """(median, lower quartile, upper quartile) of the milliseconds of `call()`, which must be compiled already.

    Several calls start without waiting, and `wait(result)` waits once at the end. So the device stays busy, unless Python
    starts calls too slowly. `agree` lets several processes make the same number of calls.
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    count = agree(max(1 if once > 0.1 else 3, int(seconds / once)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            out = call()
        wait(out)
        samples.append((time.perf_counter() - start) / count * 1e3)
    samples.sort()
    return tuple(samples[len(samples) * i // 4] for i in (2, 1, 3))


def each_ms(call, count, then=lambda result: None):
    """Milliseconds until `call()` returns, of `count` calls; then(result) runs after each one, outside of the time."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1e3)
        then(result)
    return times


def record(path, row):
    """Adds date and commit to a row, prints it, and appends it to `path` if there is one."""
    row |= dict(date=datetime.date.today().isoformat(), commit=_commit()[0], dirty=_commit()[1])
    line = json.dumps(_rounded(row))
    if path:
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(line + "\n")
    print(line, flush=True)


@cache
def _commit():
    """(the commit, whether files differ from it); $SNNFUSE_COMMIT names it for a copy without .git."""
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=HERE).stdout.strip()
    dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", "../snnfuse", ".", ":!results"))
    return os.environ.get("SNNFUSE_COMMIT") or git("rev-parse", "--short", "HEAD") or "unknown", dirty


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def measured(measure, args) -> dict:
    """The results of `measure`, with the device and the versions of the process that ran it."""
    halves = in_halves(measure, args)
    next(halves)
    return next(halves)


def in_halves(measure, args):
    """Yields twice: first when `measure` has compiled, if it is a generator, then the results."""
    parts = None
    try:
        if inspect.isgeneratorfunction(measure):
            parts = measure(*args)
            next(parts)
        row = {}
    except Exception as e:  # a failure is a row
        row = _failed(e)
    yield
    try:
        row = row or dict(status="ok") | (measure(*args) if parts is None else next(parts))
    except Exception as e:
        row = _failed(e)
    facts = dict(device="cpu", python=platform.python_version())
    if jax := sys.modules.get("jax"):
        facts |= dict(device=jax.devices()[0].device_kind, jax=jax.__version__)
    if torch := sys.modules.get("torch"):
        facts |= dict(torch=torch.__version__)
        facts |= dict(device=torch.cuda.get_device_name()) if torch.cuda.is_available() else {}
    yield row | facts


def _failed(error):
    return dict(status=f"{type(error).__name__}: {error}"[:300])


AHEAD = {}  # in a worker process: the cases that have compiled, by name


def compile_ahead(name, measure, args):
    AHEAD[name] = in_halves(measure, args)
    next(AHEAD[name])


def measure_ahead(name):
    return next(AHEAD.pop(name))


class Runner:
    """Runs cases in this process or in worker processes, and remembers the results that other cases need."""

    def __init__(self, seconds=600.0, here=False):
        self.seconds, self.here, self.workers, self.needed, self.ready = seconds, here, {}, {}, set()

    def row(self, case: Case) -> dict:
        args = case.args
        if case.name in self.ready:
            return case.key | self._result(case.process, measure_ahead, case.name)
        if case.needs is not None:
            name = case.needs.name
            self.needed[name] = need = self.needed.get(name) or self._run(case.needs, case.needs.args)
            if need["status"] != "ok":
                return case.key | dict(status=f"no reference: {need['status']}"[:300], device=need["device"])
            args = (*args, need)
        return case.key | self._run(case, args)

    def compile(self, cases, until):
        """Compiles cases in their worker processes, all processes at once, until `until()`. Returns those that are not ready."""
        begun = [
            (case, self._submit(case.process, compile_ahead, case.name, case.measure, case.args)) for case in cases
        ]
        while not until() and not all(future.done() for _, future in begun):
            time.sleep(0.2)
        self.ready = {case.name for case, future in begun if future.done()}
        return [case for case, future in begun if future.cancel() or case.name not in self.ready]

    def _submit(self, process, f, *args):
        if process not in self.workers:
            self.workers[process] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return self.workers[process].submit(f, *args)

    def _run(self, case, args):
        if self.here or not case.process:
            return measured(case.measure, args)
        try:
            return self._result(case.process, measured, case.measure, args)
        finally:
            if case.process == "fresh":
                self._end("fresh")

    def _result(self, process, f, *args):
        try:
            return self._submit(process, f, *args).result(self.seconds)
        except (BrokenProcessPool, TimeoutError):
            self._end(process, kill=True)
            return dict(status=f"the process died, or took more than {self.seconds:.0f} s", device="unknown")

    def _end(self, name, kill=False):
        if worker := self.workers.pop(name, None):
            for process in list((worker._processes or {}).values()) if kill else ():
                process.kill()
            worker.shutdown(wait=not kill)

    def close(self, kill=False):
        for name in list(self.workers):
            self._end(name, kill)


def main(doc: str, *names: str, argv=None, here=False) -> list[dict]:
    """The command line of a script that asks the questions `names`. Returns the rows. `here`: without worker processes."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv.pop(0) if argv and argv[0] in names else names[0]
    cases, gpu, options = QUESTIONS[name]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, also without a GPU; rows are only printed")
    parser.add_argument("--only", default="", help="run only the cases whose name matches this regular expression")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run nothing")
    parser.add_argument("--keep", action="store_true", help="skip the cases that have a row without an error already")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case starts")
    parser.add_argument("--out", type=pathlib.Path, help="append the rows to this file instead")
    parser.add_argument("--jobs", type=int, default=1, help="so many processes compile at once, then time in turn")
    for option, (default, text) in options.items():
        parser.add_argument(f"--{option}", type=type(default), default=default, help=f"{text} (default: {default!r})")
    args = parser.parse_args(argv)
    if gpu and not args.tiny and not args.list and not shutil.which("nvidia-smi"):
        parser.error("this machine has no GPU (no nvidia-smi): add --tiny to check that everything runs")
    path = args.out or (None if args.tiny else RESULTS / f"{name}.jsonl")
    done = [row for row in rows(name) if row["status"] == "ok"] if args.keep else []
    runner, start, made, late = Runner(here=here), time.perf_counter(), [], []
    left = lambda: args.budget - (time.perf_counter() - start)
    chosen = [case for case in cases(args) if re.search(args.only, case.name)]
    chosen = [case for case in chosen if not any(case.key.items() <= row.items() for row in done)]
    if args.jobs > 1 and not args.list:
        half = left() / 2
        late = runner.compile([case for case in chosen if case.process], until=lambda: left() < half)
        print(f"{len(runner.ready)} of {len(chosen)} cases compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for case in chosen:
        if args.list or left() < 0 or case in late:
            print(case.name if args.list else f"not run, its time was over: {case.name}")
        else:
            made.append(runner.row(case))
            record(path, made[-1])
    runner.close(kill=bool(late))
    return made


_count = itertools.count()


def job(args, i: int | None = None) -> str:
    """The `process` of a case for `--jobs`: number i, or the next one."""
    return f"job {(next(_count) if i is None else i) % args.jobs}" if args.jobs > 1 else ""


def split(text: str, kind=str) -> list:
    """The parts of a comma-separated option."""
    return [kind(part) for part in text.split(",") if part]
