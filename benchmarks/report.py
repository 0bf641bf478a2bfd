"""Writes the README's tables from the rows in results/: python benchmarks/report.py [--check]"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- core: made by benchmarks/report.py -->\n", "<!-- /core -->\n"


def power(n):
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def core_table():
    rows = [json.loads(line) for line in (HERE / "results/core.jsonl").read_text().splitlines()]
    copy = next(r for r in rows if r["case"] == "copy")
    scans = {(r["case"], r["T"], r["M"], r["dtype"]): r for r in rows if r.get("implementation") == "scan"}
    lines = [
        "| neuron | T | lanes | dtype | `lax.scan` ms | fused ms | speed-up | of copy rate | memory, in units of xs: scan | fused |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.get("implementation") != "pallas":
            continue
        scan = scans[r["case"], r["T"], r["M"], r["dtype"]]
        star = "" if r["commit"] == copy["commit"] else f" ({r['commit']})"
        label = f"| {r['case']}{star} | {r['T']} | {power(r['M'])} | {r['dtype']}"
        if r["status"] != "ok":
            lines.append(f"{label} | | {r['status']} | | | | |")
            continue
        lines.append(
            f"{label} | {scan['ms']:.2f} | {r['ms']:.3f} | {r['over_scan']:.1f}x | {r['of_copy_rate']:.2f} "
            f"| {scan['peak_units']:.1f} | {r['peak_units']:.2f} |"
        )
    where = f"{copy['device']}, JAX {copy['jax']}, {copy['date']}, commit {copy['commit']} where no other is named"
    rate = f"copy rate {copy['bytes_per_s'] / 1e12:.2f} TB/s"
    return "\n".join(lines) + f"\n\nMeasured on: {where}; {rate}. Rows: `benchmarks/results/core.jsonl`.\n"


def main(check):
    text = README.read_text()
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    made = head + START + core_table() + END + tail
    if check and made != text:
        sys.exit("README.md does not say what benchmarks/results says: run python benchmarks/report.py")
    README.write_text(made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README differs, and change nothing")
    main(parser.parse_args().check)
