"""Do the commands that the project promises work on this machine, and how long do they take?

    python benchmarks/checks.py contract        every implementation against `lax.scan`, by the tests; needs a GPU
    python benchmarks/checks.py demo            `make demo` in a fresh clone, set-up included

Rows go to results/contract.jsonl and results/demo.jsonl.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runner import HERE, Case, main, question, split


@question("contract", implementations=("pallas,mosaic,triton", "which of them"))
def contract(args):
    tests = "tests/test_imports.py" if args.tiny else "tests/test_ops_contract.py"
    for name in ["planted"] if args.tiny else split(args.implementations):
        key = dict(case="contract", implementation=name, tests=f"{tests} -k {name}")
        yield Case(key, run_tests, ([tests, "-k", name],))


def run_tests(arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done, seconds = timed(command, HERE.parent)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    row = dict(passed=counts.get("passed", 0), failed=counts.get("failed", 0) + counts.get("error", 0), seconds=seconds)
    return row | (dict(status=f"pytest ended with {done.returncode}") if done.returncode else {})


@question("demo", gpu=False)
def demo(args):
    command = [sys.executable, "experiments/train.py", "--help"] if args.tiny else ["make", "demo"]
    yield Case(dict(case="demo", command=" ".join(command[-2:]), seed=0), run_demo, (command,))


def run_demo(command):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", HERE.parent, f"{folder}/clone"], check=True)
        done, wall = timed(command, f"{folder}/clone")
        summaries = [json.loads(path.read_text()) for path in Path(folder).glob("clone/runs/*/summary.json")]
    row = dict(wall_s=wall) | (dict(status=f"exit {done.returncode}") if done.returncode else {})
    wanted = ("held_out_accuracy", "seconds", "samples_per_s")
    return row | {key: summary[key] for summary in summaries for key in wanted}


def timed(command, folder):
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done, time.perf_counter() - start


if __name__ == "__main__":
    main(__doc__, "contract", "demo")
