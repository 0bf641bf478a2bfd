"""How much memory does it take to prepare a data set, and to go through it once with the loader?

    python benchmarks/data_rss.py        minutes and 3 GB of disk; rows go to results/data_rss.jsonl

The files have N-MNIST's format and events per sample, but random content; the set has a tenth of N-MNIST's size, then all of
it. Each step runs in a process of its own; `peak_rss_mib` is the peak resident size of that process (VmHWM of Linux). It should
stay the same while the set becomes ten times larger.
"""

import hashlib
import re
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
from runner import Case, main, question

EVENTS = 4_000  # about N-MNIST's mean


@question("data_rss", gpu=False)
def data_rss(args):
    for train in (40,) if args.tiny else (6_000, 60_000):
        with tempfile.TemporaryDirectory() as folder:
            test = train // 6
            if not args.list:
                write_archives(Path(folder) / "nmnist", train=train, test=test)
            for step in (import_only, prepare, iterate):
                key = dict(case=f"nmnist_format_{step.__name__.removesuffix('_only')}", train=train, test=test)
                yield Case(key, measure, (step, Path(folder)), "fresh")


def write_archives(folder, **sizes):
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


def measure(step, folder):
    start = time.perf_counter()
    row = step(folder) | dict(seconds=time.perf_counter() - start)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    packages = {name: version(name) for name in ("tensorflow-datasets", "array-record", "grain", "numpy")}
    return row | dict(peak_rss_mib=int(peak) / 1024) | packages


def import_only(folder):
    from snnfuse.data import catalog, loader  # noqa: F401

    catalog.builder("nmnist", folder)
    return {}


def prepare(folder):
    from snnfuse.data import catalog

    cls = catalog.data_set("nmnist")

    def known(archive):
        with open(folder / "nmnist" / archive.file, "rb") as file:
            return archive._replace(digest="md5:" + hashlib.file_digest(file, "md5").hexdigest())

    with mock.patch.object(cls, "ARCHIVES", tuple(map(known, cls.ARCHIVES))):  # ours have other digests than N-MNIST's
        made = catalog.prepare("nmnist", folder, manual=folder)
    return dict(bytes_on_disk=made.info.dataset_size, samples=made.info.splits["train"].num_examples)


def iterate(folder):
    from snnfuse.data import catalog
    from snnfuse.data.events import Sensor
    from snnfuse.data.loader import Frames, load

    source = catalog.source("nmnist", "train", folder)
    batches = load(source, Frames(Sensor(34, 34), T=16), batch=min(100, len(source)), epochs=1, device=False)
    return dict(batches=sum(1 for _ in batches), samples=len(source))


if __name__ == "__main__":
    main(__doc__, "data_rss")
