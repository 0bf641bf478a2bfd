"""Writes the README's tables from the rows in results/: python benchmarks/report.py [--check]"""

import argparse
import json
import pathlib
import sys

from snnfuse.parallel.plan import LayerCost, predict

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
PEERS = {  # a column of the table of the libraries: who is in it
    "ours": ("snnfuse",),
    "SpikingJelly": ("spikingjelly", "spikingjelly_cupy"),
    "snnTorch": ("snntorch",),
    "Norse": ("norse",),
    "Spyx": ("spyx",),
    "jaxpike": ("jaxpike",),
    "sparx": ("sparx",),
}
NO_NEURON = "relu"  # a way that measures the network around the neurons, and is no library's spiking network


def power(n):
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def core_table():
    everything = [json.loads(line) for line in (HERE / "results/core.jsonl").read_text().splitlines()]
    rows = [r for r in everything if r["case"] != "compile"]
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
    measured = f"\n\nMeasured on: {where}; {rate}. Rows: `benchmarks/results/core.jsonl`.\n"
    return "\n".join(lines) + measured + compile_table([r for r in everything if r["case"] == "compile"])


def compile_table(rows):
    """Part of the table of core; nothing where nothing was compiled for its time."""
    if not rows:
        return ""
    shapes = dict.fromkeys((r["T"], r["M"]) for r in rows)
    heads = [f"T = {T}, {power(M)} lanes" for T, M in shapes]
    lines = [f"| seconds to compile | {' | '.join(heads)} | first call |", "|---" * (len(heads) + 2) + "|"]
    for name in dict.fromkeys(r["implementation"] for r in rows):
        mine = {(r["T"], r["M"]): r for r in rows if r["implementation"] == name}
        cells = [f"{r['compile_s']:.2f}" if r["status"] == "ok" else r["status"][:60] for r in map(mine.get, shapes)]
        first = next((f"{r['first_s']:.2f}" for r in mine.values() if "first_s" in r), "")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {first} |")
    once = lambda key: ", ".join(dict.fromkeys(str(r[key]) for r in rows))
    where = f"{once('device')}, JAX {once('jax')}, {once('date')}, commit {once('commit')}"
    what = (
        "LIF in float32, forward and backward, traced, lowered and compiled; first call: of one step, with the imports"
    )
    return "\n" + "\n".join(lines) + f"\n\n{what}. Measured on: {where}. Rows: case `compile` of the same file.\n"


def resnet_table():
    """The last row of each case."""
    rows = [json.loads(line) for line in (HERE / "results/resnet.jsonl").read_text().splitlines()]
    key = lambda r: (r["size"], r["case"], r["precision"], r["implementation"], r["memory"])
    last = dict(sorted({key(r): r for r in rows}.items(), key=lambda item: item[0][:3]))
    scans = {k[:3]: r["ms"] for k, r in last.items() if k[3] == "scan" and r["status"] == "ok"}
    names = {"pallas": "fused", "scan": "`lax.scan`", "relu": "ReLU for neurons", "flax_relu": "ReLU, flax's layers"}
    lines = [
        "| network | input | precision | neurons | kept | ms a step | speed-up | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k, r in last.items():
        label = f"| {r['case']} | {r['B']} x 3 x {r['size']} x {r['size']} | {r['precision']} | {names[r['implementation']]} | {r['memory'] or ''}"
        if r["status"] != "ok":
            lines.append(f"{label} | {r['status'][:60]} | | |")
            continue
        over = f"{scans[k[:3]] / r['ms']:.1f}x" if k[:3] in scans and r["implementation"] == "pallas" else ""
        lines.append(f"{label} | {r['ms']:.2f} | {over} | {r['peak_mb']:.0f} |")
    once = lambda key: ", ".join(dict.fromkeys(str(r[key]) for r in last.values()))
    where = f"{once('device')}, JAX {once('jax')}, {once('date')}, commit {once('commit')}"
    return (
        "\n".join(lines) + f"\n\nT = 32, random input; measured on: {where}. Rows: `benchmarks/results/resnet.jsonl`.\n"
    )


def peers_table():
    rows = [json.loads(line) for line in (HERE / "results/peers.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["how"] != NO_NEURON]
    peers = {name: who for name, who in PEERS.items() if any(r["library"] in who for r in rows)}
    lines = [f"| case | dtype | {' | '.join(peers)} | fastest peer over ours |", "|---" * (len(peers) + 3) + "|"]
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        here = [r for r in rows if (r["case"], r["dtype"]) == (case, dtype)]
        of = {name: [r for r in here if r["library"] in who] for name, who in peers.items()}
        best = {name: min(map(compared, timed(rows)), default=None) for name, rows in of.items()}
        cells = map(cell, of.values())
        lines.append(f"| {case} | {dtype} | {' | '.join(cells)} | {verdict(best)} |")
    measured = timed(rows)
    used = dict.fromkeys(f"{r['library']} {r['version']}" for r in measured)
    once = lambda key: ", ".join(dict.fromkeys(r[key] for r in measured if key in r))
    where = f"{once('device')}, JAX {once('jax')}, PyTorch {once('torch')}, {once('date')}, commit {once('commit')}"
    differ = max(r["flips"] / r["slots"] for r in measured if "slots" in r)
    what = "Milliseconds on the device (of PyTorch: a CUDA graph, replayed) / as called; each library in its fastest"
    what += " way that gave our scan's spikes" + (" (Spyx: of its own neuron)" if "Spyx" in peers else "")
    what += f", but at {differ:.3%} of all places at most" if differ else ""
    what += "; of the ResNet nothing is compared" if any(r["case"].startswith("resnet") for r in measured) else ""
    what += "; where no graph could be captured, calls are compared" if any("graph" in r for r in measured) else ""
    beside = dict.fromkeys(r["beside"] for r in measured if "beside" in r)
    what += f"; *: measured beside {', '.join(beside)}" if beside else ""
    return (
        "\n".join(lines)
        + f"\n\n{what}. Measured on: {where}; {', '.join(used)}. Rows: `benchmarks/results/peers.jsonl`.\n"
    )


def resnet18(size: int, channels: int = 2) -> list[LayerCost]:
    """Its 17 convolutions with the neurons behind each; the stem halves twice."""
    size = -(-size // 2)
    layers = [LayerCost(64 * size**2, 2 * 49 * channels * 64 * size**2, 49 * channels * 64)]
    size, before = -(-size // 2), 64
    for width in (64, 128, 256, 512):
        size = size if width == 64 else -(-size // 2)
        for _ in range(4):
            layers.append(LayerCost(width * size**2, 2 * 9 * before * width * size**2, 9 * before * width))
            before = width
    return layers


STACK = [LayerCost(neurons=8192, flops=0, weights=1, normalised=False)] * 8
MODELLED = {"resnet18": (resnet18(28, 3), 2), "lif-stack": (STACK, 4)}  # what the cost model sees, bytes a number


def multi_gpu_table():
    """The prediction is the cost model's, with the rates of an H100."""
    rows = [json.loads(line) for line in (HERE / "results/multi_gpu.jsonl").read_text().splitlines()]
    key = lambda r, batch: (r["case"], r.get("library"), r["T"], batch)
    which = lambda r: (*key(r, r["batch"]), *map(str, map(r.get, ("mesh", "synchronised", "processes", "sums"))))
    steps = list({which(r): r for r in rows if "mesh" in r}.values())  # the last of each
    steps.sort(key=lambda r: (r["case"], "time" in r["mesh"], "library" in r, r["T"], r["devices"]))
    ones = {key(r, r["batch"]): r for r in steps if r["devices"] == 1 and r["status"] == "ok"}
    lines = [
        "| case | devices | mesh | T | batch | ms a step | samples/s | peak MB a device | over one device | predicted ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in steps:
        dtype = r.get("dtype") or ("bfloat16" if r["case"] == "resnet18" else "float32")
        case = f"{r['case']}, {dtype}" + (", SpikingJelly" if "library" in r else "")
        case += ", BatchNorm synchronised" if r.get("synchronised") and r["case"] == "resnet18" else ""
        case += ", a process each" if "processes" in r else ""
        case += f", gradients summed in {r['sums']}" if r.get("sums") else ""
        mesh = ",".join(f"{axis}={n}" for axis, n in r["mesh"].items())
        label = f"| {case} | {r['devices']} | {mesh} | {r['T']} | {r['batch']}"
        if r["status"] != "ok":
            lines.append(f"{label} | {failed(r)} | | | | |")
            continue
        same, part = (ones.get(key(r, batch)) for batch in (r["batch"], r["batch"] // r["devices"]))
        over = [f"{same['ms'] / r['ms']:.2f}x"] if same else []
        over += [f"weak {r['samples_per_s'] / part['samples_per_s']:.2f}x"] if part else []
        peak = "" if "library" in r else f"{r['peak_mb']:,.0f}"
        lines.append(
            f"{label} | {digits(r['ms'])}{'*' * ('beside' in r)} | {r['samples_per_s']:,.0f} | {peak} "
            f"| {', '.join(over) if r['devices'] > 1 else ''} | {predicted(r)} |"
        )
    calls = [r for r in rows if "bytes" in r]
    ms = lambda case, pick: digits(pick((r["bytes"], r["ms"]) for r in calls if r["case"] == case)[1])
    ways = [f"{case} of 1 KB {ms(case, min)} ms, of 256 MB {ms(case, max)} ms" for case in ("all-reduce", "hand-over")]
    once = lambda key: ", ".join(dict.fromkeys(str(r[key]) for r in rows if key in r))
    where = f"{once('device')}, JAX {once('jax')}, PyTorch {once('torch')}, {once('date')}, commit {once('commit')}"
    what = "Over one device: at the same batch; weak: samples/s, over one device with its part of the batch. SpikingJelly's peak is left out: "
    what += "in its rows it is that of the first steps too. "
    beside = dict.fromkeys(r["beside"] for r in steps if "beside" in r)
    what += f"*: measured beside {', or '.join(beside)}. " if beside else ""
    what += f"Between two devices, as called: {'; '.join(ways)}. Measured on: {where}"
    return "\n".join(lines) + f"\n\n{what}. Rows: `benchmarks/results/multi_gpu.jsonl`.\n"


def predicted(r):
    """What the cost model says of a row, and how far off it is."""
    if r["case"] not in MODELLED or "library" in r:
        return ""
    layers, itemsize = MODELLED[r["case"]]
    mesh = r["mesh"].get("data", 1), r["mesh"].get("time", 1)
    found = predict(layers, r["T"], r["batch"], *mesh, itemsize=itemsize, synchronised=r["synchronised"])
    return f"{digits(found.seconds * 1e3)} ({found.seconds * 1e3 / r['ms'] - 1:+.0%})"


def failed(row):
    status = row["status"]
    return "out of memory" if "out of memory" in status.lower() else status.split(". ")[0][:90]


def timed(rows):
    return [r for r in rows if r["status"] == "ok"]


def compared(row):
    """Its milliseconds on the device, or as called where there is no graph that would tell them."""
    return row["call_ms"] if "graph" in row else row["ms"]


def cell(rows):
    if best := min(timed(rows), key=compared, default=None):
        star = "*" if "beside" in best else ""
        return f"{'no graph' if 'graph' in best else digits(best['ms'])} / {digits(best['call_ms'])}{star}"
    tried = [r for r in rows if not r["status"].startswith("not run")]
    return (tried or rows)[0]["status"].split(":")[0] if rows else ""


def digits(ms):
    return f"{ms:#.3g}".rstrip(".")


def verdict(best):
    """How many times as long the fastest of the others takes; plainly, if that is one of them."""
    ours, others = best["ours"], {name: ms for name, ms in best.items() if ms and name != "ours"}
    if not ours or not others:
        return ""
    name = min(others, key=others.get)
    ratio = f"{others[name] / ours:.3g}x ({name})"
    return ratio if others[name] >= ours else f"**{ratio} is faster than ours**"


def largest_T_table():
    rows = [json.loads(line) for line in (HERE / "results/largest_T.jsonl").read_text().splitlines()]
    rows.sort(key=lambda r: (r["library"], r["how"], -r["T"]))
    lines = ["| Spiking-ResNet-18 of | kept | T | peak GB | ms a step |", "|---|---|---|---|---|"]
    names = {"snnfuse": "ours", "spikingjelly": "SpikingJelly"}
    for r in rows:
        label = f"| {names[r['library']]}, {r['dtype']} | {r['how'] if r['library'] == 'snnfuse' else ''} | {r['T']:,}"
        if r["status"] != "ok":
            lines.append(f"{label} | {failed(r)} | |")
        else:
            lines.append(f"{label} | {r['peak_mb'] / 1e3:.1f} | {r['ms']:.0f} |")
    once = lambda key: ", ".join(dict.fromkeys(str(r[key]) for r in rows if key in r))
    where = f"{once('device')}, JAX {once('jax')}, PyTorch {once('torch')}, {once('date')}, commit {once('commit')}"
    return "\n".join(lines) + f"\n\nMeasured on: {where}. Rows: `benchmarks/results/largest_T.jsonl`.\n"


TABLES = {
    "core": core_table,
    "resnet": resnet_table,
    "largest_T": largest_T_table,
    "peers": peers_table,
    "multi_gpu": multi_gpu_table,
}


def main(check):
    text = made = README.read_text()
    for name, table in TABLES.items():
        start, end = f"<!-- {name}: made by benchmarks/report.py -->\n", f"<!-- /{name} -->\n"
        if (HERE / f"results/{name}.jsonl").exists():
            if start not in made:
                sys.exit(f"README.md must say where the table {name} goes: {start}{end}")
            head, rest = made.split(start)
            made = head + start + table() + end + rest.split(end)[1]
    if check and made != text:
        sys.exit("README.md does not say what benchmarks/results says: run python benchmarks/report.py")
    README.write_text(made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README differs, and change nothing")
    main(parser.parse_args().check)
