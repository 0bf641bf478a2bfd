"""python -m snnfuse.data list | prepare NAME | info NAME | show NAME --index I

Data sets are kept in --folder, by default $TFDS_DATA_DIR or ~/tensorflow_datasets. Archives are looked for in
--manual/NAME, by default FOLDER/downloads/manual/NAME; --download fetches those that may be fetched. `prepare` also takes
a name of your own: --manual/NAME then holds pictures, SPLIT/CLASS/*.png, or recordings (sound .wav, signals .npy or .npz,
events .npz or .aedat) and split.csv, a table with the columns file, label and split.
"""

import argparse
import json
import sys
from pathlib import Path

from snnfuse.data import catalog, show


def _list(options) -> None:
    for name in catalog.CATALOG:
        found = catalog.data_set(name)
        if path := catalog.prepared_in(name, options.folder):
            state = f"prepared in {path}"
        elif name in catalog.BUILT_IN:
            state = "needs no download"
        elif all(archive.direct for archive in found.ARCHIVES):
            state = "can be downloaded"
        else:
            state = f"get it from {found.ARCHIVES[0].url}"
        print(f"{name:20} {state}\n{'':20} {found.__doc__.splitlines()[0]}")
    for path in sorted(catalog.data_dir(options.folder).glob("*/*.*.*/dataset_info.json")):
        if (name := path.parents[1].name) not in catalog.CATALOG:
            print(f"{name:20} prepared in {path.parent}\n{'':20} {json.loads(path.read_text()).get('description', '')}")


def _prepare(options) -> None:
    before = catalog.prepared_in(options.name, options.folder)
    made = catalog.prepare(
        options.name,
        options.folder,
        manual=options.manual,
        download=options.download,
        size=options.size,
        rate=options.rate,
        window=options.window,
        on_bad=options.on_bad,
        on_unsorted=options.on_unsorted,
    )
    sizes = ", ".join(f"{split} {part.num_examples}" for split, part in made.info.splits.items())
    again = "; this was done before: remove that folder to prepare it again" if before else ""
    print(f"{options.name} is prepared in {made.data_dir}: {sizes}{again}")
    for what in ("skipped", "sorted"):
        done = dict(made.info.metadata or {}).get(what, {"count": 0})
        if done["count"]:
            print(f"{what} {done['count']} samples:", *done["first"], sep="\n  ")


def _info(options) -> None:
    print(json.dumps(show.summary(options.name, options.folder), indent=1))


def _show(options) -> None:
    out = options.out or Path(f"{options.name}_{options.split}_{options.index}.png")
    print(show.render(options.name, options.split, options.index, out, options.folder, options.T, options.count))


def _size(text: str) -> tuple[int, int]:
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, such as 64, or 64x48; got {text!r}")
    return sides[0], sides[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m snnfuse.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for run in (_list, _prepare, _info, _show):
        command = commands.add_parser(run.__name__[1:])
        command.set_defaults(run=run)
        command.add_argument("--folder", type=Path)
        if run is not _list:
            command.add_argument("name", metavar="NAME")
        if run is _prepare:
            command.add_argument("--manual", type=Path)
            command.add_argument("--download", action="store_true")
            command.add_argument(
                "--size",
                type=_size,
                metavar="H[xW]",
                help="pixels: your own pictures are resized to it; the camera of your own events has it",
            )
            command.add_argument("--rate", type=int, metavar="HZ", help="resample .wav files to this rate")
            command.add_argument(
                "--window", type=float, metavar="MS", help="cut your own events into samples of this many milliseconds"
            )
            command.add_argument("--on-bad", choices=("raise", "skip"), default="raise")
            command.add_argument(
                "--on-unsorted",
                choices=("raise", "sort", "skip"),
                help="for events whose times go back; default: the value of --on-bad",
            )
        if run is _show:
            command.add_argument("--split", default="train")
            command.add_argument("--index", type=int, default=0)
            command.add_argument(
                "--count", type=int, default=1, help="a sheet of so many samples, evenly spaced from --index to the end"
            )
            command.add_argument("--out", type=Path, help=".png: a strip of frames; .gif: one after another")
            command.add_argument("-T", type=int, help="frames of equal duration, of events; 10 by default")
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, IndexError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
