"""The most memory that preparing a data set, and going through it once with the loader, takes: rows of results/data_rss.jsonl.

    python benchmarks/data_rss.py            N-MNIST's format and events a sample, at a tenth of its size and in full

The files are random, of the published format, not N-MNIST; each step runs in a process of its own, whose peak resident
size (VmHWM of Linux, of that program alone) is the number. It is to stay where it is while the set grows tenfold. Needs 3 GB of disk, and minutes.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from measure import record

EVENTS = 4_000  # about N-MNIST's mean


def write_archives(folder: Path, sizes: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(100):
        t = np.sort(rng.integers(0, 300_000, EVENTS))
        x, y, p = rng.integers(0, 34, EVENTS), rng.integers(0, 34, EVENTS), rng.integers(0, 2, EVENTS)
        files.append(np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tobytes())
    folder.mkdir(parents=True)
    for split, size in sizes.items():
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as zipped:
            for i in range(size):
                zipped.writestr(f"{split.title()}/{i % 10}/{i:05d}.bin", files[i % len(files)])


def import_only(folder: Path) -> dict:
    from snnfuse.data import catalog, loader  # noqa: F401

    catalog.builder("nmnist", folder)
    return {}


def prepare(folder: Path) -> dict:
    from snnfuse.data import catalog

    cls = catalog.data_set("nmnist")
    cls.ARCHIVES = tuple(
        a._replace(digest="md5:" + hashlib.file_digest(open(folder / "nmnist" / a.file, "rb"), "md5").hexdigest())
        for a in cls.ARCHIVES
    )
    made = catalog.prepare("nmnist", folder, manual=folder)
    return {"bytes_on_disk": made.info.dataset_size, "samples": made.info.splits["train"].num_examples}


def iterate(folder: Path) -> dict:
    from snnfuse.data import catalog
    from snnfuse.data.events import Sensor
    from snnfuse.data.loader import Frames, load

    source = catalog.source("nmnist", "train", folder)
    batches = load(source, Frames(Sensor(34, 34), T=16), batch=100, epochs=1, device=False)
    return {"batches": sum(1 for _ in batches), "samples": len(source)}


STEPS = {"import": import_only, "prepare": prepare, "iterate": iterate}


def main() -> None:
    for sizes in ({"train": 6_000, "test": 1_000}, {"train": 60_000, "test": 10_000}):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            write_archives(Path(folder) / "nmnist", sizes)
            for step in STEPS:
                start = time.perf_counter()
                done = subprocess.run([sys.executable, __file__, step, folder], capture_output=True, text=True)
                if done.returncode:
                    record("data_rss", case=f"nmnist_format_{step}", status="failed", why=done.stderr[-500:])
                    continue
                row = json.loads(done.stdout.splitlines()[-1])
                packages = {name: version(name) for name in ("tensorflow-datasets", "array-record", "grain", "numpy")}
                seconds = time.perf_counter() - start
                record(
                    "data_rss", case=f"nmnist_format_{step}", status="ok", seconds=seconds, **sizes, **row, **packages
                )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        found = STEPS[sys.argv[1]](Path(sys.argv[2]))
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        print(json.dumps(found | {"peak_rss_mib": int(peak) / 1024}))
