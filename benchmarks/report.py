"""Writes the tables of benchmarks/README.md, and one in README.md, from the rows in results/.

    python benchmarks/report.py              write them
    python benchmarks/report.py --check      change nothing; fail if a table differs from its rows

It fails if a row has failed and `EXPECTED` does not list it.
"""

import argparse
import collections
import sys

from runner import HERE, RESULTS, rows

from snnfuse.parallel.plan import LayerCost, predict

EXPECTED = [  # (results file, fields of the failed row, what a table says in place of its time)
    ("largest_T", dict(library="snnfuse", memory="lean", T=10240), "XLA failed while it tried cuDNN's algorithms"),
    ("largest_T", dict(library="snnfuse", memory="lean", T=9920), "XLA failed while it tried cuDNN's algorithms"),
    ("largest_T", dict(library="snnfuse", memory="packed", T=4928), "out of memory"),
    ("largest_T", dict(library="spikingjelly", T=1900), "out of memory"),
    ("multi_gpu", dict(case="lif-stack", T=16384, devices=1), "out of memory"),
    ("peers", dict(library="spikingjelly", implementation="native"), "not in the wheel, only in a build from source"),
    ("peers", dict(library="spikingjelly", implementation="storage", dtype="bfloat16"), "wrong gradient"),
    ("contract", dict(commit="ab068ea"), "the machine's time ended; all of it passed at commit c3009ab"),
    (
        "contract",
        dict(commit="d12e23f", implementation="mosaic and triton"),
        "time limit; all passed at commit d3f4741",
    ),
    ("tune", dict(status="out of time"), "the time that was given ended before this shape"),
]
NAMES = {
    "snnfuse": "snnfuse",
    "spikingjelly": "SpikingJelly",
    "spikingjelly_cupy": "SpikingJelly",
    "snntorch": "snnTorch",
}
NAMES |= {"norse": "Norse", "spyx": "Spyx", "jaxpike": "jaxpike", "sparx": "sparx"}
KINDS = {"pallas": "fused", "scan": "`lax.scan`", "relu": "ReLU for neurons", "flax_relu": "ReLU, Flax's layers"}


def expected(file, row):
    """The words of `EXPECTED` for a failed row, or None."""
    for name, fields, words in EXPECTED:
        if name == file and all(row.get(k) == v for k, v in fields.items()):
            return words
    return None


def unexpected():
    """The failed rows that are not expected, and the expectations that no row meets."""
    failed = [(path.stem, row) for path in RESULTS.glob("*.jsonl") for row in rows(path.stem) if row["status"] != "ok"]
    for file, row in failed:
        if expected(file, row) is None:
            yield f"results/{file}.jsonl: a row has failed: {row['case']}, {row['status'][:100]}"
    for name, fields, _ in EXPECTED:
        if not any(file == name and all(row.get(k) == v for k, v in fields.items()) for file, row in failed):
            yield f"EXPECTED lists a failure that is not in results/{name}.jsonl: {fields}"


def table(file, columns, found):
    """A table with a row per row of `found`. `columns`: head -> format string; the first empty cell of a failed row says why."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in found:
        cells = [_cell(text, row) for text in columns.values()]
        if row.get("status", "ok") != "ok":
            cells[cells.index("")] = expected(file, row) or "failed"
        lines.append("| " + " | ".join(cells) + " |")
    used = [row for row in found if "device" in row]
    once = lambda key: ", ".join(dict.fromkeys(str(row[key]) for row in used if key in row))
    versions = "".join(f", {name} {once(key)}" for name, key in (("JAX", "jax"), ("PyTorch", "torch")) if once(key))
    where = f"Measured on: {once('device')}{versions}; {once('date')}; commit {once('commit')}. " if used else ""
    return "\n".join(lines), f"{where}Rows: [`results/{file}.jsonl`](results/{file}.jsonl)."


def _cell(text, row):
    try:
        return text.format_map(row)
    except (KeyError, ValueError, TypeError):  # the row has no such number
        return ""


def digits(ms):
    return f"{ms:#.3g}".rstrip(".")


def power(n):
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def core():
    found = [r | dict(lanes=power(r["M"])) for r in rows("core") if r.get("implementation") == "pallas" and "ms" in r]
    key = lambda r: (r["case"], r["T"], r["M"], r["dtype"])
    scans = {key(r): r for r in rows("core") if r.get("implementation") == "scan" and r["case"] != "compile"}
    found = [r | dict(scan=scans[key(r)]["ms"], units=scans[key(r)]["peak_units"]) for r in found]
    columns = {"neuron": "{case}", "T": "{T}", "lanes": "{lanes}", "dtype": "{dtype}", "`lax.scan` ms": "{scan:.2f}"}
    columns |= {"fused ms": "{ms:.3f}", "speed-up": "{over_scan:.1f}x", "share of the copy rate": "{of_copy_rate:.2f}"}
    columns |= {"memory of scan": "{units:.1f}", "memory fused": "{peak_units:.2f}"}
    copy = next(r["bytes_per_s"] for r in rows("core") if r["case"] == "copy")
    caption = (
        "Device time of the forward and the backward pass of one layer. A layer must at least read x and write s, then "
    )
    caption += (
        "read x and ds and write dx. A share of 1.00 would mean that it moves these bytes as fast as `x + 1` does, "
    )
    caption += f"which reached {copy / 1e12:.2f} TB/s. Memory is in units of the input."
    return caption, *table("core", columns, found)


def compile_time():
    found = collections.defaultdict(dict)
    for r in (r for r in rows("core") if r["case"] == "compile"):
        mine = {k: r[k] for k in ("implementation", "device", "jax", "date", "commit", "first_s") if k in r}
        found[r["implementation"]] |= mine | {f"{r['T']} {r['M']}": r["compile_s"]}
    columns = {"implementation": "`{implementation}`"}
    columns |= {f"T = {T}, 2^{M.bit_length() - 1} lanes": f"{{{T} {M}:.2f}}" for T, M in SHAPES_COMPILED}
    caption = (
        "Seconds to trace, lower and compile a LIF layer in float32, forward and backward. The first call of a process "
    )
    caption += "has a single step, and includes the imports that it causes."
    return caption, *table("core", columns | {"first call": "{first_s:.2f}"}, found.values())


SHAPES_COMPILED = [(16, 2**12), (256, 2**12), (4096, 2**12), (500, 2**13)]


def resnet():
    found = sorted(rows("resnet"), key=lambda r: (r["size"], r["case"], r["dtype"]))
    key = lambda r: (r["size"], r["case"], r["dtype"])
    scans = {key(r): r["ms"] for r in found if r["implementation"] == "scan"}
    faster = lambda r: dict(over=scans[key(r)] / r["ms"]) if r["implementation"] == "pallas" and key(r) in scans else {}
    found = [r | faster(r) | dict(neurons=KINDS[r["implementation"]], kept=r["memory"] or "") for r in found]
    columns = {
        "network": "{case}",
        "input": "{B} x 3 x {size} x {size}",
        "precision": "{dtype}",
        "neurons": "{neurons}",
    }
    columns |= {
        "memory option": "{kept}",
        "ms per step": "{ms:.2f}",
        "speed-up": "{over:.1f}x",
        "peak MB": "{peak_mb:.0f}",
    }
    caption = (
        "A training step of spiking ResNets (forward, backward, Adam) with T = 32, on random spikes. The speed-up is "
    )
    caption += "over `lax.scan`. ReLU for neurons: our network with ReLU in their place, for comparison."
    return caption, *table("resnet", columns, found)


def norm():
    columns = {"layer": "{case}", "lanes": "{M}", "channels": "{C}", "dtype": "{dtype}", "ms": "{ms:.3f}"}
    columns |= {"spikes that differ": "{flips}"}
    caption = "Batch normalisation and a LIF layer, forward and backward, T = 32. Fused: one kernel each way (`NormSpiking`). "
    caption += (
        "Unfused: the normalised current is stored in between. Two passes: an experiment that is not in the library."
    )
    return caption, *table("norm", columns, rows("norm"))


def largest_T():
    found = sorted(rows("largest_T"), key=lambda r: (r["library"], r.get("memory") or "", -r["T"]))
    found = [r | dict(of=f"{NAMES[r['library']]}, {r['dtype']}", kept=r.get("memory") or "") for r in found]
    found = [r | (dict(gb=r["peak_mb"] / 1e3) if "peak_mb" in r else {}) for r in found]
    columns = {"Spiking-ResNet-18 of": "{of}", "memory option": "{kept} ", "T": "{T:,}", "peak GB": "{gb:.1f}"}
    caption = "The longest sequences of 100 samples (3 x 28 x 28) whose training step fits on one GPU."
    return caption, *table("largest_T", columns | {"ms per step": "{ms:.0f}"}, found)


def timed(row):
    """Milliseconds to compare: on the device, or as called if no CUDA graph could be captured."""
    return row["call_ms"] if "graph" in row else row["ms"]


def best(case, dtype, ours):
    """The fastest correct row of snnfuse, or of each other library."""
    found = [r for r in rows("peers") if (r["case"], r["dtype"]) == (case, dtype) and r["implementation"] != "relu"]
    fastest = {}
    for r in sorted((r for r in found if r["status"] == "ok"), key=timed, reverse=True):
        fastest[NAMES[r["library"]]] = r
    return fastest.get("snnfuse") if ours else {k: v for k, v in fastest.items() if k != "snnfuse"}


def peers():
    found, every = [], [name for name in dict.fromkeys(NAMES.values()) if name != "snnfuse"]
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows("peers")):
        mine, others = best(case, dtype, True), best(case, dtype, False)
        row = {name: peer_cell(r) for name, r in (others | {"snnfuse": mine}).items()}
        found.append(dict(case=case, dtype=dtype, verdict=verdict(mine, others), **row))
    columns = {"case": "{case}", "dtype": "{dtype}"} | {name: f"{{{name}}}" for name in ("snnfuse", *every)}
    text, _ = table("peers", columns | {"fastest other library": "{verdict}"}, found)
    measured = [r for r in rows("peers") if r["status"] == "ok"]
    _, where = table("peers", {}, measured)
    used = ", ".join(dict.fromkeys(f"{r['library']} {r['version']}" for r in measured))
    differ = max(r["flips"] / r["slots"] for r in measured if "slots" in r)
    caption = (
        "Milliseconds on the device / milliseconds as called from Python. On the device means, for PyTorch, a replayed "
    )
    caption += (
        "CUDA graph; if none could be captured, calls are compared. Each library runs in its fastest way whose spikes "
    )
    caption += (
        f"are those of our `lax.scan` (at most {differ:.3%} of them differ); Spyx is compared with its own neuron. "
    )
    caption += (
        "For the ResNet only times are compared. lif: a LIF layer, forward and backward. open_neuromorphic: a linear "
    )
    caption += "layer and LIF, T = 500, B = 16. shd: a training step in SHD's shapes, T = 256, B = 256. resnet18_28: a "
    caption += "training step of Spiking-ResNet-18, T = 32, B = 100."
    return caption, text, f"{where} Versions: {used}."


def peer_cell(r):
    return f"{'no graph' if 'graph' in r else digits(r['ms'])} / {digits(r['call_ms'])}"


def verdict(mine, others):
    """How many times as long the fastest other library takes; in bold if it is faster than ours."""
    if not mine or not others:
        return ""
    name = min(others, key=lambda name: timed(others[name]))
    ratio = timed(others[name]) / timed(mine)
    return f"{ratio:.3g}x ({name})" if ratio >= 1 else f"**{ratio:.3g}x ({name}) is faster than ours**"


def resnet18_layers(size=28, channels=3):
    """What the cost model sees: the 17 convolutions with the neurons behind each; the stem halves the size twice."""
    size = -(-size // 2)
    layers = [LayerCost(64 * size**2, 2 * 49 * channels * 64 * size**2, 49 * channels * 64)]
    size, before = -(-size // 2), 64
    for width in (64, 128, 256, 512):
        size = size if width == 64 else -(-size // 2)
        for _ in range(4):
            layers.append(LayerCost(width * size**2, 2 * 9 * before * width * size**2, 9 * before * width))
            before = width
    return layers


MODELLED = {"resnet18": (resnet18_layers(), 2)}  # layers, bytes per number
MODELLED |= {"lif-stack": ([LayerCost(neurons=8192, flops=0, weights=1, normalised=False)] * 8, 4)}


def predicted(r):
    """What the cost model says about a row, and how far off it is."""
    if r["case"] not in MODELLED or "library" in r or r["status"] != "ok":
        return ""
    layers, itemsize = MODELLED[r["case"]]
    mesh = r["mesh"].get("data", 1), r["mesh"].get("time", 1)
    ms = 1e3 * predict(layers, r["T"], r["B"], *mesh, itemsize=itemsize, synchronised=r["synchronised"]).seconds
    return f"{digits(ms)} ({ms / r['ms'] - 1:+.0%})"


def multi_gpu():
    steps = [r for r in rows("multi_gpu") if "mesh" in r]
    steps.sort(key=lambda r: (r["case"], "time" in r["mesh"], "library" in r, r["T"], r["devices"]))
    key = lambda r, B: (r["case"], r.get("library"), r["T"], B)
    ones = {key(r, r["B"]): r for r in steps if r["devices"] == 1 and r["status"] == "ok"}
    found = []
    for r in steps:
        how = [r["case"], r["dtype"], "SpikingJelly" if "library" in r else ""]
        how += ["BatchNorm synchronised" if r.get("synchronised") and r["case"] == "resnet18" else ""]
        how += ["a process per device" if r.get("processes") else "", f"sums in {r['sums']}" if r.get("sums") else ""]
        over = []
        if r["status"] == "ok" and r["devices"] > 1:
            same, part = (ones.get(key(r, B)) for B in (r["B"], r["B"] // r["devices"]))
            over += [f"{same['ms'] / r['ms']:.2f}x"] if same else []
            over += [f"weak {r['samples_per_s'] / part['samples_per_s']:.2f}x"] if part else []
        row = dict(how=", ".join(filter(None, how)), over=", ".join(over) or " ", predicted=predicted(r) or " ")
        row |= dict(on=",".join(f"{axis}={n}" for axis, n in r["mesh"].items()))
        row |= dict(time=digits(r["ms"])) if r["status"] == "ok" else {}
        found.append({k: v for k, v in r.items() if not (k == "peak_mb" and "library" in r)} | row)
    columns = {
        "case": "{how}",
        "devices": "{devices}",
        "mesh": "{on}",
        "T": "{T}",
        "batch": "{B}",
        "ms per step": "{time}",
    }
    columns |= {"samples/s": "{samples_per_s:,.0f}", "peak MB per device": "{peak_mb:,.0f}"}
    columns |= {"over one device": "{over}", "predicted ms": "{predicted}"}
    calls = [r for r in rows("multi_gpu") if "bytes" in r]
    ms = lambda case, pick: digits(pick((r["bytes"], r["ms"]) for r in calls if r["case"] == case)[1])
    kinds = ("all-reduce", "hand-over")
    ways = [f"{case} of 1 KB takes {ms(case, min)} ms, of 256 MB {ms(case, max)} ms" for case in kinds]
    caption = (
        "A training step on one and two GPUs of a host. Over one device: the speed-up at the same batch; weak: samples "
    )
    caption += "per second, beside one device with its part of the batch. Predicted: the cost model of `snnfuse.parallel`, with "
    caption += (
        f"its error. Between two devices, as called: an {'; a '.join(ways)}. SpikingJelly's peak is left out, because "
    )
    caption += "its rows include the first steps, which try algorithms."
    return caption, *table("multi_gpu", columns, found)


def accuracy():
    found = [r | dict(on=r.get("mesh") or "one device") for r in rows("accuracy")]
    columns = {"run": "{case}", "implementation": "`{implementation}`", "devices": "{on}", "steps": "{steps}"}
    columns |= {
        "held-out accuracy": "{held_out_accuracy:.1%}",
        "final loss": "{final_loss:.4f}",
        "seconds": "{seconds:.0f}",
    }
    caption = (
        "Spiking-ResNet-18 with T = 32 and batches of 100, trained on 5,000 MNIST digits in bfloat16. The runs on one "
    )
    caption += "device start from the same seed. ![Loss curves](results/accuracy_mnist5k_r18.png)"
    return caption, *table("accuracy", columns, found)


def flips():
    columns = {"input": "{case}", "implementation": "`{implementation}`", "spikes compared": "{slots:,}"}
    caption = "Spikes of a LIF layer that differ from those of `lax.scan`, T = 32."
    return caption, *table("flips", columns | {"that differ": "{differ}"}, rows("flips"))


def contract():
    columns = {"implementation": "{implementation}", "tests": "`{tests}`", "passed": "{passed}", "failed": "{failed}"}
    columns |= {"commit": "{commit}", "remark": ""}
    return "Every implementation against `lax.scan`, by the tests.", *table("contract", columns, rows("contract"))


def loader():
    columns = {
        "case": "{case}",
        "source": "{source}",
        "workers": "{workers}",
        "batches on the device, ms": "{resident_ms:.2f}",
    }
    columns |= {"fed by the loader, ms": "{fed_ms:.2f}", "ratio": "{fed_over_resident:.3f}"}
    return "A training step with and without the loader.", *table("loader", columns, rows("loader"))


def data_rss():
    columns = {"step": "{case}", "training samples": "{train:,}", "peak memory, MiB": "{peak_rss_mib:.0f}"}
    caption = (
        "Memory of one process that prepares a data set in N-MNIST's format, and of one that goes through it once."
    )
    return caption, *table("data_rss", columns | {"seconds": "{seconds:.0f}"}, rows("data_rss"))


def gains():
    """What a user gains, beside the best other library; at most ten rows."""
    found = []
    for what, case, dtype in (
        ("LIF layer, T = 32, 2^20 lanes, float32", "lif_T32_N1048576", "float32"),
        ("the same in bfloat16", "lif_T32_N1048576", "bfloat16"),
        ("LIF layer, T = 500, 2^13 lanes", "lif_T500_N8192", "float32"),
        ("linear layer (512) and LIF, T = 500, B = 16", "open_neuromorphic_n512", "tf32"),
        ("linear layer (16,384) and LIF, T = 500, B = 16", "open_neuromorphic_n16384", "tf32"),
        ("training step in SHD's shapes, T = 256, B = 256", "shd", "tf32"),
        ("training step of Spiking-ResNet-18, T = 32, B = 100, TF32", "resnet18_28", "tf32"),
        ("the same in bfloat16", "resnet18_28", "bfloat16"),
    ):
        mine, others = best(case, dtype, True), best(case, dtype, False)
        name, peer = min(others.items(), key=lambda item: timed(item[1]))
        row = dict(what=what, ours=f"{digits(timed(mine))} ms", peer=f"{digits(timed(peer))} ms ({name})")
        found.append(row | dict(gain=f"{timed(peer) / timed(mine):.3g}x faster"))
    mb = [r["peak_mb"] for r in (mine, peer)]
    row = dict(what="peak memory of that step", ours=f"{mb[0]:,.0f} MB", peer=f"{mb[1]:,.0f} MB ({name})")
    found.append(row | dict(gain=f"{mb[1] / mb[0]:.1f}x less"))
    fits = [r for r in rows("largest_T") if r["status"] == "ok"]
    ours, theirs = (max(r["T"] for r in fits if r["library"] == name) for name in ("snnfuse", "spikingjelly"))
    row = dict(what="longest sequence that trains on one GPU, the same network", ours=f"{ours:,} steps")
    found.append(row | dict(peer=f"{theirs:,} steps (SpikingJelly)", gain=f"{ours / theirs:.1f}x longer"))
    columns = {"on one H100": "{what}", "snnfuse": "{ours}", "best other library": "{peer}", "gain": "{gain}"}
    caption = (
        "Layers are timed forward and backward, on the device. SpikingJelly's ResNet is timed as called from Python, "
    )
    caption += (
        "because no CUDA graph of it could be captured. [All tables, and how they were measured](benchmarks/README.md)."
    )
    return caption, table("peers", columns, found)[0], ""


TABLES = (core, compile_time, resnet, norm, largest_T, peers, multi_gpu, accuracy, flips, contract, loader, data_rss)
FILES = {HERE / "README.md": TABLES, HERE.parent / "README.md": (gains,)}


def with_tables(path, tables):
    """The text of a file, with its tables made anew."""
    text = path.read_text()
    for make in tables:
        start, end = f"<!-- {make.__name__}: made by benchmarks/report.py -->", f"<!-- /{make.__name__} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            sys.exit(f"{path} must contain each of these lines once, for a table: {start} and {end}")
        head, rest = text.split(start)
        caption, lines, where = make()
        parts = filter(None, (start, caption, lines, where))
        text = head + "\n\n".join(parts) + "\n" + end + rest.split(end)[1]
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a table differs from its rows; change nothing")
    check = parser.parse_args(argv).check
    if problems := list(unexpected()):
        sys.exit("\n".join(problems))
    for path, tables in FILES.items():
        made = with_tables(path, tables)
        if check and made != path.read_text():
            sys.exit(f"{path} does not show the rows in benchmarks/results: run python benchmarks/report.py")
        path.write_text(made)


if __name__ == "__main__":
    main()
