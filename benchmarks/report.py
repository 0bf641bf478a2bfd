"""Writes the tables of benchmarks/README.md, and what README.md and the page "Getting started" say, from the rows in results/.

    python benchmarks/report.py              write the tables
    python benchmarks/report.py --check      write nothing; fail if a table differs from its rows

It fails if a row has failed and `EXPECTED` does not list it.
"""

import sys
from functools import partial
from statistics import fmean
from textwrap import fill

from core import cells
from neurons import PAPERS
from runner import HERE, RESULTS, rows

from snnfuse.parallel.plan import LayerCost, predict

AUTOTUNER = "XLA failed while it tried cuDNN's algorithms"
EXPECTED = [  # (results file, fields of the failed row, what a table says in place of its time)
    ("largest_T", dict(library="snnfuse", memory="lean", T=10240), AUTOTUNER),
    ("largest_T", dict(library="snnfuse", memory="lean", T=9920), AUTOTUNER),
    ("largest_T", dict(library="snnfuse", memory="packed", T=4928), "out of memory"),
    ("largest_T", dict(library="spikingjelly", T=1900), "out of memory"),
    ("multi_gpu", dict(case="lif-stack", T=16384, devices=1), "out of memory"),
    ("peers", dict(library="spikingjelly", implementation="native"), "needs a build from source"),
    ("peers", dict(library="spikingjelly", implementation="storage", dtype="bfloat16"), "wrong gradient"),
    ("tune", dict(status="out of time"), "the time that was given ended before this shape"),
]
NAMES = {"snnfuse": "snnfuse", "spikingjelly": "SpikingJelly", "snntorch": "snnTorch", "norse": "Norse"}
NAMES |= {"spyx": "Spyx", "jaxpike": "jaxpike", "sparx": "sparx"}
WAYS = {  # an implementation, or what else calls or replaces the neurons, in the order of a table
    "pallas": "fused",
    "triton": "fused, triton",
    "mosaic": "fused, mosaic",
    "compiled_step": "`compiled_step`",
    "joined": "`compiled_step`, joined optimizer",
    "nnx.jit": "`nnx.jit`",
    "scan": "`lax.scan`",
    "relu": "ReLU for neurons",
}
PLAIN = {  # the tables that show each row of a file as it is, by `head={format of a row's fields}`
    "flips": "input={case}; implementation=`{implementation}`; spikes compared={slots:,}; that differ={differ}",
    "accuracy": "run={case}; implementation=`{implementation}`; mesh={mesh}; seed={seed}; steps={steps}; "
    "held-out accuracy={held_out_accuracy:.2%}; final loss={final_loss:.4f}; seconds={seconds:.0f}; remark={note}",
    "loader": "case={case}; workers={workers}; on the device, ms={resident_ms:.2f}; fed by the loader, ms={fed_ms:.2f}; "
    "ratio={fed_over_resident:.3f}",
    "few_bits": "weights={case}; rounding={note}; ReLU network, seeds 0 to 2={relu[0]:.1%}, {relu[1]:.1%}, {relu[2]:.1%}; "
    "spiking network, T = 32={spiking[0]:.1%}, {spiking[1]:.1%}, {spiking[2]:.1%}",
    "delay_layers": "layer={case}; longest delay={steps}; computed by={implementation}; dtype={dtype}; ms={ms:.2f}",
    "streaming": "network={case}; called by=`{implementation}`; steps in a call={T}; ms per call={call_ms:.2f}; "
    "99th percentile={late_ms:.2f}; us per step={us_per_step:.0f}",
    "on_cpu": "library={library}; ms={ms:.1f}; over snnfuse={over:.2f}; "
    "quartiles={quartiles[0]:.1f} to {quartiles[1]:.1f}; shortest={shortest_ms:.1f}",
    "contract": "implementation={implementation}; tests=`{tests}`; passed={passed}; failed={failed}; commit={commit}",
}
LAUNCHED = 0.05  # ms; below that, launching the kernels takes much of the time, and it varies
PAGE = HERE.parent / "notebooks" / "docs" / "pages" / "index.md"
TABLES = {}  # name: a function that makes the text between the table's markers in benchmarks/README.md


def shows(columns=None, file=None):
    """Registers a table: a function that returns its rows. Without `columns` the function returns the text itself."""

    def register(make):
        name = make.__name__
        TABLES[name] = (lambda: table(file or name, make(), columns)) if columns else make
        return make

    return register


# H100 or H200: ratios compare equal cards
card = lambda r: r.get("device", "").removeprefix("NVIDIA ").partition(" ")[0]
digits = lambda ms: f"{ms:#.3g}".rstrip(".")
power = lambda n: f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)
line = lambda cells: f"| {' | '.join(cells)} |"
# A row of PyTorch has the field "graph" if no CUDA graph could be captured. Then calls are compared.
peer_cell = lambda r: f"{'no graph' if 'graph' in r else digits(r['ms'])} / {digits(r['call_ms'])}"
timed = lambda r: r["call_ms" if "graph" in r else "ms"]


def expected(file, row):
    """The words of `EXPECTED` for a failed row, or None."""
    found = (words for name, fields, words in EXPECTED if name == file and fields.items() <= row.items())
    return next(found, None)


def unexpected():
    """The failed rows that are not expected, and the expectations that no row meets."""
    failed = [(path.stem, row) for path in RESULTS.glob("*.jsonl") for row in rows(path.stem) if row["status"] != "ok"]
    for file, row in failed:
        if expected(file, row) is None:
            yield f"results/{file}.jsonl: a row has failed: {row['case']}, {row['status'][:100]}"
    for name, fields, _ in EXPECTED:
        if not any(file == name and expected(file, row) and fields.items() <= row.items() for file, row in failed):
            yield f"EXPECTED lists a failure that is not in results/{name}.jsonl: {fields}"


def merged(found, *fields):
    """One row for each value of the fields. It has the fields of all rows with that value; of equal fields, the last."""
    rows = {}
    for r in found:
        rows.setdefault(tuple(r.get(field) for field in fields), {}).update(r)
    return list(rows.values())


def table(file, found, columns):
    """A table of `found`, and a line that says where it was measured."""
    return f"{grid(file, found, columns)}\n\n{where(file, found)}"


def grid(file, found, columns):
    """A table of `found`. The first empty cell of a failed row says why it failed."""
    heads, formats = zip(*(column.rsplit("=", 1) for column in columns.split("; ")), strict=True)
    lines = [line(heads), "|---" * len(heads) + "|"]
    for row in found:
        cells = [_cell(text, row | dict(gpu=card(row))) for text in formats]
        if row.get("status", "ok") != "ok":
            cells[cells.index("")] = expected(file, row) or "failed"
        lines.append(line(cells))
    return "\n".join(lines)


def _cell(text, row):
    try:
        return text.format_map(row)
    except (KeyError, ValueError, TypeError):  # the row has no such number
        return ""


def where(file, found):
    once = lambda key: ", ".join(dict.fromkeys(str(row[key]) for row in found if key in row))
    versions = "".join(f", {name} {once(key)}" for name, key in (("JAX", "jax"), ("PyTorch", "torch")) if once(key))
    measured = f"Measured on: {once('device')}{versions}; {once('date')}; commit {once('commit')}."
    return f"{measured} Rows: [`results/{file}.jsonl`](results/{file}.jsonl)."


def fused_layers():
    """The rows of fused layers, each with the time and the memory of scan on the same GPU."""
    key = lambda r: (r["case"], r["T"], r["M"], r["dtype"], card(r))
    layers = [r for r in rows("core") if "ms" in r]
    scans = {key(r): r for r in layers if r["implementation"] == "scan"}
    scan = lambda r: dict(scan=scans[key(r)]["ms"], units=scans[key(r)]["peak_units"], lanes=power(r["M"]))
    fused = [r | scan(r) for r in layers if r["implementation"] in ("pallas", "triton") and key(r) in scans]
    return sorted(fused, key=lambda r: (card(r), r["implementation"]))


FUSED = "`lax.scan` ms={scan:.2f}; fused ms={ms:.3f}; speed-up={over_scan:.1f}x; share of the copy rate={of_copy_rate:.2f}; "
FUSED += "memory of scan={units:.1f}; fused={peak_units:.2f}"


@shows()
def core():
    copies = [r for r in rows("core") if r["case"] == "copy"]
    copy = " and ".join(f"{r['bytes_per_s'] / 1e12:.2f} TB/s on an {card(r)}" for r in copies)
    columns = "neuron={case}; T={T}; lanes={lanes}; dtype={dtype}; by={implementation}; " + FUSED + "; GPU={gpu}"
    found = [r for r in fused_layers() if r["case"] not in PAPERS]
    return f"The copy rate was {copy}.\n\n{table('core', found, columns)}"


@shows("neuron={case}; dtype={dtype}; " + FUSED + "; firing rate={firing_rate:.2f}", file="core")
def papers():
    found = [r for r in fused_layers() if r["case"] in PAPERS]
    return sorted(found, key=lambda r: (r["dtype"], PAPERS.index(r["case"])))


@shows()
def compile_time():
    found = [r | {f"{r['T']} {r['M']}": r["compile_s"]} for r in rows("core") if r["case"] == "compile"]
    columns = dict.fromkeys(f"T = {r['T']}, {power(r['M'])} lanes={{{r['T']} {r['M']}:.2f}}" for r in found)
    columns = "; ".join(["implementation=`{implementation}`", *columns, "first call={first_s:.2f}"])
    return table("core", merged(found, "implementation"), columns)


@shows()
def choice():
    found = []
    for case, dtype in dict.fromkeys((cell.case, cell.dtype) for cell in cells()):
        mine = [cell for cell in cells() if (cell.case, cell.dtype) == (case, dtype)]
        long = [cell for cell in mine if min(cell.ms.values()) >= LAUNCHED]
        near = lambda some: f"{sum(cell.over <= 1.05 for cell in some)} of {len(some)}"
        worst = max(long, key=lambda cell: cell.over)
        says = f"{worst.over:.2f}: {worst.chosen}, not {worst.fastest}, at T = {worst.T}, {power(worst.M)} lanes"
        says = says if worst.chosen != worst.fastest else "none"
        found.append(dict(case=case, dtype=dtype, cells=len(mine), near=near(mine), large=near(long), worst=says))
    columns = "neuron={case}; dtype={dtype}; cells={cells}; within 5 %={near}; above 50 us, within 5 %={large}; "
    return f"{grid('choice', found, columns + 'slowest choice={worst}')}\n\n{where('choice', rows('choice'))}"


@shows(
    "layer={case}; T={T}; B={B}; H={size}; run by={how}; precision={exact}; ms={ms:.3g}; forward ms={forward_ms:.3g}; "
    "us per step={us_per_step:.3g}; peak MB={peak_mb:.0f}; GPU={gpu}"
)
def recurrent():
    way = lambda r: r.get("implementation", "PyTorch").replace("triton", "fused").replace("scan", "`lax.scan`")
    found = [r | dict(how=way(r), exact=r.get("note", r["dtype"])) for r in rows("recurrent")]
    return sorted(found, key=lambda r: (-r["B"], r["size"], card(r), r["ms"]))


@shows(
    "network={case}; T={T:,}; batch={B}; backward pass={memory}; input MB={inputs_mb:,.0f}; peak MB={peak_mb:,.0f}; "
    "ms per step={ms:.1f}; spikes that differ={flips}; gradient error={gradient_error:.1e}; GPU={gpu}"
)
def long_sequences():
    """One line for each way to train; if its gradients were compared, that is in the same line."""
    found = [r | dict(case=r["case"].removeprefix("gradients, ")) for r in rows("long_sequences")]
    return sorted(
        merged(found, "case", "T", "B", "memory", "device"), key=lambda r: (r["case"] != "dense", r["T"], r["memory"])
    )


@shows(
    "network={case}; rule={implementation}; held-out accuracy={held_out_accuracy:.1%}; of each seed={each}; "
    "temporary MB, T = 100={mb100:.1f}; T = 1,000={mb1000:.1f}; T = 10,000={mb10000:,.1f}"
)
def online():
    """One line for each rule: its accuracy, and the memory of a step for each T."""
    network = lambda r: dict(case=r["case"].rpartition(", ")[2])
    needs = lambda r: {f"mb{r['T']}": r["temporary_mb"]} if "temporary_mb" in r else {}
    each = lambda r: dict(each=", ".join(f"{a:.1%}" for a in r["accuracies"])) if "accuracies" in r else {}
    found = [r | network(r) | needs(r) | each(r) for r in reversed(rows("online"))]
    return [r for r in merged(found, "case", "implementation") if "accuracies" in r][::-1]


@shows(
    "network={network}; all speakers={mean:.1%}; of each seed={each}; theo={theo:.1%}; george={george:.1%}; "
    "nicolas={nicolas:.1%}; jackson={jackson:.1%}; lucas={lucas:.1%}; yweweler={yweweler:.1%}; seconds of a training={seconds:.2f}"
)
def delays():
    """One line for each network: its accuracy on the speaker held out, the mean of the seeds."""
    found = [r | dict(network=r["case"].split(", ")[0], speaker=r["case"].split()[1]) for r in rows("delays")]
    mean = lambda field, **only: fmean(r[field] for r in found if only.items() <= r.items())
    lines = []
    for row in merged(found, "network"):
        of = partial(mean, "held_out_accuracy", network=row["network"])
        row |= {r["speaker"]: of(speaker=r["speaker"]) for r in found} | dict(mean=of())
        row |= dict(seconds=mean("seconds", network=row["network"]))
        lines.append(row | dict(each=", ".join(f"{of(seed=seed):.1%}" for seed in sorted({r["seed"] for r in found}))))
    return lines


@shows(
    "largest rate={case}; outputs={note}; " + "; ".join(f"T = {T}={{T{T}:.1%}}" for T in (4, 8, 16, 32, 64, 128, 256))
)
def conversion():
    """One line for each percentile: the accuracy at each T."""
    found = [r | {f"T{r['T']}": r["held_out_accuracy"]} for r in rows("conversion")]
    return merged(found, "case", "note")


@shows(
    "network={case}; input={B} x 3 x {size} x {size}; precision={dtype}; neurons={kind}; memory option={kept}; "
    "ms per step={ms:.2f}; speed-up={over:.1f}x; peak MB={peak_mb:.0f}; s to compile={compile_s:.0f}; GPU={gpu}"
)
def resnet():
    key = lambda r: (r["size"], r["case"], r["dtype"], r["device"])
    found = sorted(rows("resnet"), key=key)
    scans = {key(r): r["ms"] for r in found if r["implementation"] == "scan"}
    faster = lambda r: dict(over=scans[key(r)] / r["ms"]) if r["implementation"] == "pallas" and key(r) in scans else {}
    return [r | faster(r) | dict(kind=WAYS[r["implementation"]], kept=r["memory"] or "") for r in found]


@shows(
    "network={case}; batch={B} x 3 x {size} x {size}; called by or neurons={way}; precision={dtype}; ms={ms:.2f}; "
    "GPU busy={busy_ms:.2f}; ms / busy={wall_over_busy:.2f}; images/s={samples_per_s:,.0f}; peak MB={peak_mb:.0f}; "
    "SpikingJelly / this={gain}; GPU={gpu}",
    file="step_calls",
)
def networks():
    """The networks at T = 4. The gain is over the fastest way of SpikingJelly on the same GPU."""
    found = [r for r in rows("step_calls") if "size" in r]
    network = lambda r: (card(r), r["case"])
    theirs = [r for r in found if r["implementation"].startswith("spikingjelly")]
    theirs = {network(r): r["ms"] for r in sorted(theirs, key=lambda r: -r["ms"])}
    gain = lambda r: f"{theirs[network(r)] / r['ms']:.1f}x" if network(r) in theirs else ""
    theirs_way = lambda way: ", ".join(["SpikingJelly", *way.replace("_", " ").split(" ", 1)[1:]])
    named = lambda r: dict(way=WAYS.get(r["implementation"]) or theirs_way(r["implementation"]), gain=gain(r))
    order = {way: i for i, way in enumerate(WAYS)}
    found.sort(key=lambda r: (*network(r), order.get(r["implementation"], len(order)), r["ms"]))
    return [r | named(r) for r in found]


@shows(
    "network={case}; T={T}; batch={B}; called by=`{way}`; steps in a call={steps}; us per step={us:.0f}; "
    "samples/s={samples_per_s:,.0f}; over nnx.jit={gain:.1f}x; GPU={gpu}",
    file="step_calls",
)
def small_networks():
    found = sorted((r for r in rows("step_calls") if "steps" in r), key=lambda r: (r["case"], card(r)))
    before = {(card(r), r["case"]): r["samples_per_s"] for r in found if r["implementation"] == "nnx.jit"}
    gain = lambda r: r["samples_per_s"] / before[card(r), r["case"]] if (card(r), r["case"]) in before else None
    way = lambda r: "scan" if r["steps"] > 1 else r["implementation"]
    way_of = lambda r: "scan`, `DeviceData" if r["implementation"] == "DeviceData" else way(r)
    return [r | dict(way=way_of(r), us=1e3 * r["ms"] / r["steps"], gain=gain(r)) for r in found]


@shows(
    "called by={implementation}; ms until a call returns={call_ms:.2f}; over flat={over:.2f}; machine={machine}",
    file="step_calls",
)
def host():
    found = [r for r in rows("step_calls") if r["case"] == "host"]
    flat = {r["device"]: r["call_ms"] for r in found if r["implementation"] == "flat"}
    machine = lambda r: "a CPU alone" if r["device"] == "cpu" else f"with an {card(r)}"
    return [r | dict(over=r["call_ms"] / flat[r["device"]], machine=machine(r)) for r in found]


@shows("library={of}; dtype={dtype}; memory option={kept}; T={T:,}; peak GB={gb:.1f}; ms per step={ms:.0f}")
def largest_T():
    found = sorted(rows("largest_T"), key=lambda r: (r["library"], r.get("memory") or "", -r["T"]))
    named = lambda r: dict(of=NAMES[r["library"]], kept=r.get("memory") or "-", gb=r.get("peak_mb", 0) / 1e3 or "")
    return [r | named(r) for r in found]


def best(case, dtype):
    """(the fastest correct row of snnfuse, {name: that of each other library})"""
    found = [r for r in rows("peers") if (r["case"], r["dtype"], r["status"]) == (case, dtype, "ok")]
    found = sorted((r for r in found if r["implementation"] != "relu"), key=timed, reverse=True)
    fastest = {NAMES[r["library"]]: r for r in found}
    return fastest.pop("snnfuse"), fastest


@shows()
def peers():
    found = []
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows("peers")):
        ours, others = best(case, dtype)
        cells = {name: peer_cell(r) for name, r in (others | dict(snnfuse=ours)).items()}
        found.append(dict(case=case, dtype=dtype, verdict=verdict(ours, others)) | cells)
    libraries = [f"{name}={{{name}}}" for name in NAMES.values()]
    columns = "; ".join(["case={case}; dtype={dtype}", *libraries, "fastest other library={verdict}"])
    measured = [r for r in rows("peers") if r["status"] == "ok"]
    used = ", ".join(dict.fromkeys(f"{r['library']} {r['version']}" for r in measured))
    differ = max(r["flips"] / r["slots"] for r in measured if "slots" in r)
    said = f"At most {differ:.3%} of a library's spikes differ. Versions: {used}. {where('peers', measured)}"
    return f"{grid('peers', found, columns)}\n\n{said}"


def verdict(ours, others):
    """How many times as long the fastest other library takes; in bold if it is faster than ours."""
    name = min(others, key=lambda name: timed(others[name]))
    ratio = timed(others[name]) / timed(ours)
    return f"{ratio:.3g}x ({name})" if ratio >= 1 else f"**{ratio:.3g}x ({name}) is faster than ours**"


def resnet18_layers():
    """The layers for the cost model: 17 convolutions on 3 x 28 x 28, each with its neurons."""
    layers, before = [LayerCost(64 * 14**2, 2 * 49 * 3 * 64 * 14**2, 49 * 3 * 64)], 64
    for width, size in ((64, 7), (128, 4), (256, 2), (512, 1)):
        for _ in range(4):
            layers.append(LayerCost(width * size**2, 2 * 9 * before * width * size**2, 9 * before * width))
            before = width
    return layers


MODELLED = {"resnet18": (resnet18_layers(), 2)}  # layers, bytes per number
MODELLED |= {"lif-stack": ([LayerCost(neurons=8192, flops=0, weights=1, normalised=False)] * 8, 4)}


def predicted(r):
    """The time that the cost model of an H100 predicts for a row, and its error."""
    if r["case"] not in MODELLED or r["status"] != "ok" or "H100" not in r["device"]:
        return "-"
    layers, itemsize = MODELLED[r["case"]]
    mesh = r["mesh"].get("data", 1), r["mesh"].get("time", 1)
    ms = 1e3 * predict(layers, r["T"], r["B"], *mesh, itemsize=itemsize, synchronised=r["synchronised"]).seconds
    return f"{digits(ms)} ({ms / r['ms'] - 1:+.0%})"


@shows()
def multi_gpu():
    steps = [r for r in rows("multi_gpu") if "mesh" in r]
    steps.sort(key=lambda r: (r["case"], "time" in r["mesh"], r["T"], r["devices"], r.get("note", "")))
    setting = lambda r: (r["case"], r["T"], card(r), r.get("note"))
    ones = {(*setting(r), r["B"]): r for r in steps if r["devices"] == 1 and r["status"] == "ok"}
    found = []
    for r in steps:
        how = [r["case"], r["dtype"], card(r), "a process per device" if r.get("processes") else ""]
        how += [f"sums in {r['sums']}" if r.get("sums") else "", r.get("note", "")]
        row = dict(how=", ".join(filter(None, how)), over="-", predicted=predicted(r))
        row |= dict(on=",".join(f"{axis}={n}" for axis, n in r["mesh"].items()))
        if r["status"] == "ok":
            same, part = (ones.get((*setting(r), B)) for B in (r["B"], r["B"] // r["devices"]))
            over = [f"{same['ms'] / r['ms']:.2f}x"] if same else []
            over += [f"weak {r['samples_per_s'] / part['samples_per_s']:.2f}x"] if part else []
            row |= dict(took=digits(r["ms"]), over=", ".join(over) if r["devices"] > 1 and over else "-")
        found.append(r | row)
    sent = lambda case: sorted((r["bytes"], digits(r["ms"])) for r in rows("multi_gpu") if r["case"] == case)
    ends = {case: (sent(case)[0][1], sent(case)[-1][1]) for case in ("all-reduce", "hand-over")}
    ways = [f"{case} of 1 KB takes {small} ms, of 256 MB {large} ms" for case, (small, large) in ends.items()]
    columns = "case={how}; devices={devices}; mesh={on}; T={T}; batch={B}; ms per step={took}; samples/s={samples_per_s:,.0f}; "
    columns += "peak MB per device={peak_mb:,.0f}; over one device={over}; predicted ms={predicted}"
    return f"Between two devices, as called, an {'; a '.join(ways)}.\n\n{table('multi_gpu', found, columns)}"


GAINS = [  # what a user gains, beside the best other library: words, and the case and dtype among the peers
    ("LIF layer, T = 32, 2^20 lanes, float32", "lif_T32_N1048576", "float32"),
    ("the same in bfloat16", "lif_T32_N1048576", "bfloat16"),
    ("LIF layer, T = 500, 2^13 lanes, float32", "lif_T500_N8192", "float32"),
    ("linear layer (512) and LIF, T = 500, B = 16", "open_neuromorphic_n512", "tf32"),
    ("linear layer (16,384) and LIF, T = 500, B = 16", "open_neuromorphic_n16384", "tf32"),
    ("training step in SHD's shapes, T = 256, B = 256", "shd", "tf32"),
    ("training step of Spiking-ResNet-18, T = 32, B = 100, TF32", "resnet18_28", "tf32"),
    ("the same in bfloat16", "resnet18_28", "bfloat16"),
]


def gains():
    found = []
    for what, case, dtype in GAINS:
        ours, others = best(case, dtype)
        name, peer = min(others.items(), key=lambda item: timed(item[1]))
        gain = f"{timed(peer) / timed(ours):.3g}x faster"
        found.append((what, f"{digits(timed(ours))} ms", f"{digits(timed(peer))} ms ({name})", gain))
    mb = ours["peak_mb"], peer["peak_mb"]
    less = f"{mb[1] / mb[0]:.1f}x less"
    found.append(("peak memory of that step", f"{mb[0]:,.0f} MB", f"{mb[1]:,.0f} MB ({name})", less))
    fits = [r for r in rows("largest_T") if r["status"] == "ok"]
    T = [max(r["T"] for r in fits if r["library"] == library) for library in ("snnfuse", "spikingjelly")]
    what = "longest sequence that trains on one GPU, the same network"
    found.append((what, f"{T[0]:,} steps", f"{T[1]:,} steps (SpikingJelly)", f"{T[0] / T[1]:.1f}x longer"))
    lines = [("on one H100", "snnfuse", "best other library", "gain"), ("---",) * 4, *found]
    return "\n".join(map(line, lines))


def cpu():
    """What "Getting started" says about a CPU."""
    ours, theirs = map({r["library"]: r for r in rows("on_cpu")}.get, ("snnfuse", "snntorch"))
    said = f"""On a CPU a training step of a network {ours["case"]} with T = {ours["T"]} and a batch of {ours["B"]} takes
    {ours["ms"]:.0f} ms, and {theirs["ms"]:.0f} ms in snnTorch {theirs["version"]} with PyTorch
    {theirs["torch"].partition("+")[0]}. In both, one matrix product covers
    all time steps. These are medians of {ours["rounds"]} steps of each, in turn, on {ours["cores"]} cores; the
    shortest steps took {ours["shortest_ms"]:.0f} and {theirs["shortest_ms"]:.0f} ms ({ours["date"]}, JAX {ours["jax"]})."""
    return fill(" ".join(said.split()), 120)


TABLES |= {file: lambda file=file: table(file, rows(file), PLAIN[file]) for file in PLAIN}
FILES = {HERE / "README.md": TABLES, HERE.parent / "README.md": dict(gains=gains), PAGE: dict(cpu=cpu)}


def with_tables(path, tables):
    """The text of a file, with its tables made anew."""
    text = path.read_text()
    for name, make in tables.items():
        start, end = f"<!-- {name}: made by benchmarks/report.py -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            sys.exit(f"{path} must contain each of these lines once, for a table: {start} and {end}")
        head, rest = text.split(start)
        text = f"{head}{start}\n\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def main(argv):
    if "--help" in argv:
        return print(__doc__)
    if problems := list(unexpected()):
        sys.exit("\n".join(problems))
    for path, tables in FILES.items():
        made = with_tables(path, tables)
        if "--check" in argv and made != path.read_text():
            sys.exit(f"{path} does not show the rows in benchmarks/results: run python benchmarks/report.py")
        path.write_text(made)


if __name__ == "__main__":
    main(sys.argv[1:])
