"""What changed between two commits' rows of a results file: `make bench-compare A=<revision> B=<revision>`.

    python benchmarks/compare.py HEAD~5 HEAD                        results/core.jsonl as each of them has it
    python benchmarks/compare.py A B --rows peers --tolerance 0.03

A row is known by all of it that is not measured. Fails if one got slower than the tolerance, or has no time any more.
"""

import argparse
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
KNOWN_BY = ("case", "model", "T", "M", "C", "B", "size", "input", "dtype", "precision", "memory")
KNOWN_BY += ("library", "implementation", "how", "device")


def rows(text):
    """{what a row is known by: row}; of several, the last."""
    parsed = [json.loads(line) for line in text.splitlines()]
    return {tuple((k, str(row[k])) for k in KNOWN_BY if k in row): row for row in parsed}


def compare(before, after, tolerance):
    """(a line for each row that changed by more than the tolerance, whether one of them is a regression)"""
    lines, regressed = [], False
    for key, old in before.items():
        new, name = after.get(key), " ".join(value for _, value in key)
        if not old.get("ms"):
            continue
        if new is None or not new.get("ms"):
            lines.append(f"GONE     {name}: {old['ms']:.4g} ms, now {new['status'] if new else 'no row'}")
            regressed = True
        elif abs(ratio := new["ms"] / old["ms"] - 1) > tolerance:
            word = "SLOWER" if ratio > 0 else "faster"
            lines.append(f"{word:8} {name}: {old['ms']:.4g} -> {new['ms']:.4g} ms ({ratio:+.0%})")
            regressed |= ratio > 0
    for key, new in after.items():
        if new.get("ms") and not before.get(key, {}).get("ms"):
            lines.append(f"new      {' '.join(value for _, value in key)}: {new['ms']:.4g} ms")
    return lines, regressed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rows", default="core", help="the name of a file in results/")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a time: what does not count as a change")
    args = parser.parse_args()
    texts = []
    for revision in (args.before, args.after):
        show = ["git", "show", f"{revision}:./results/{args.rows}.jsonl"]
        got = subprocess.run(show, capture_output=True, text=True, cwd=HERE)
        if got.returncode:
            sys.exit(got.stderr.strip())
        texts.append(rows(got.stdout))
    lines, regressed = compare(*texts, args.tolerance)
    print("\n".join(lines) or f"no time changed by more than {args.tolerance:.0%}")
    sys.exit(regressed)


if __name__ == "__main__":
    main()
