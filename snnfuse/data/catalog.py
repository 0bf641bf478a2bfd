"""Data sets by name: list them, prepare one, and read it as a random-access source, without TensorFlow.

A name that is not in `CATALOG` is a folder of your own: pictures, or recordings and their table, see `prepare`.
"""

import difflib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

from snnfuse.data import archives
from snnfuse.data.events import Sensor
from snnfuse.data.optional import require

_HERE = "snnfuse.data.builders."
CATALOG = {
    "mnist5k": _HERE + "images.Mnist5k",
    "digits": _HERE + "images.Digits",
    "mnist": _HERE + "images.Mnist",
    "fashion_mnist": _HERE + "images.FashionMnist",
    "cifar10": _HERE + "images.Cifar10",
    "cifar100": _HERE + "images.Cifar100",
    "nmnist": _HERE + "neuromorphic.NMNIST",
    "cifar10dvs": _HERE + "neuromorphic.CIFAR10DVS",
    "dvs128_gesture": _HERE + "neuromorphic.DVS128Gesture",
    "shd": _HERE + "neuromorphic.SHD",
    "ssc": _HERE + "neuromorphic.SSC",
    "synthetic_saccades": _HERE + "synthetic.SyntheticSaccades",
    "spoken_digits": _HERE + "audio.SpokenDigits",
    "speech_commands": _HERE + "audio.SpeechCommands",
    "emg_roshambo": _HERE + "signals.EmgRoshambo",
    "dvs128_objects": _HERE + "cameras.Dvs128Objects",
}
BUILT_IN = ("mnist5k", "digits", "synthetic_saccades")  # they need no download, so their first use prepares them


def data_dir(folder: str | os.PathLike | None = None) -> Path:
    """The folder of prepared data sets: `folder`, or else $TFDS_DATA_DIR, or else ~/tensorflow_datasets as tfds has it."""
    return Path(folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def data_set(name: str) -> type:
    """The class of a name in `CATALOG`, or of your own prepared data. It describes the samples and lists the archives.

    No optional package is needed.
    """
    if name not in CATALOG and name in (own := own_names()):
        return _own_prepared(name, own[name])
    if name not in CATALOG:
        close = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"name must be one of {', '.join(CATALOG)}, or a folder of yours that is prepared; got {name!r}{hint}"
        )
    module, _, cls = CATALOG[name].rpartition(".")
    return getattr(import_module(module), cls)


def _own_prepared(name: str, path: Path) -> type:
    """The class of your own data that are prepared in `path`."""
    features = json.loads((path / "features.json").read_text())["featuresDict"]["features"]
    told = _told(path)
    parts = {"name": name, "LABELS": tuple((path / "label.labels.txt").read_text().splitlines())}
    own = lambda module, kind, **more: type(name, (getattr(import_module(_HERE + module), kind),), parts | more)
    if "audio" in features:
        return own("audio", "WavFolder", RATE=int(told["rate"]))
    if "signal" in features:
        return own("signals", "SignalFolder", CHANNELS=int(told["channels"]))
    if "events" in features:
        window = int(told["window"]) if "window" in told else None
        return own("cameras", "EventFolder", SENSOR=Sensor(*map(int, told["sensor"])), WINDOW=window)
    return own("images", "ImageFolder", SHAPE=_shape(path))


def _shape(path: Path) -> tuple[int, ...]:
    """The shape of the pictures that are prepared in `path`; () for recordings."""
    features = json.loads((path / "features.json").read_text())["featuresDict"]["features"]
    return tuple(map(int, features["image"]["tensor"]["shape"]["dimensions"])) if "image" in features else ()


def own_names(folder: str | os.PathLike | None = None) -> dict[str, Path]:
    """Your own prepared data sets: their names and folders."""
    found = {}
    for path in sorted(data_dir(folder).glob("*/*.*.*/features.json")):
        kinds = re.findall(r'"(image|audio|signal|events)": \{', path.read_text())
        if (name := path.parents[1].name) not in CATALOG and kinds and (path.parent / "label.labels.txt").exists():
            found[name] = path.parent
    return found


def _own(name: str, folder: Path, **choices) -> type:
    """The class of your own data in `folder`: pictures below `train`, or the recordings of the table split.csv."""
    if not re.fullmatch(r"[a-z]\w*", name):
        raise ValueError(f"name must be small letters, digits and _; got {name!r}")
    table = import_module(_HERE + "table")
    if (folder / "train").is_dir():
        kind = import_module(_HERE + "images").ImageFolder
    elif (folder / table.TABLE).is_file():
        kind = _kind(table.read_table(folder / table.TABLE)[0], folder)
    else:
        neither = f"{folder} has neither a folder train nor {table.TABLE}"
        found = neither if folder.is_dir() else f"there is no folder {folder}"
        raise archives.Missing(
            f"{name} is not in the catalog ({', '.join(CATALOG)}), and {found}: "
            f"to prepare your own pictures, put them into SPLIT/CLASS/; for your own recordings, write {table.TABLE}, with the "
            f"columns {', '.join(table.COLUMNS)}"
        )
    known = inspect.signature(kind.of).parameters
    for choice, value in choices.items():
        if value is not None and choice not in known:
            raise ValueError(f"{choice} {_CHOICES[choice]}; {name} holds none")
    return kind.of(name, folder, **{choice: value for choice, value in choices.items() if choice in known})


_CHOICES = {
    "size": "resizes your own pictures, or is the size of the camera of your own events",
    "rate": "resamples .wav files",
    "window": "cuts your own recordings of events",
}


def _kind(row, folder: Path) -> type:
    """The kind of recordings in a table, by its first file."""
    suffix = Path(row.file).suffix
    if suffix == ".npz":
        arrays = import_module("snnfuse.data.formats").read_npz(row.path(folder), row.where, (), ("t", "x", "signal"))
        suffix = ".npz of signals" if "signal" in arrays else ".npz of events"
    kinds = {
        ".wav": "audio.WavFolder",
        ".npy": "signals.SignalFolder",
        ".npz of signals": "signals.SignalFolder",
        ".npz of events": "cameras.EventFolder",
        ".aedat": "cameras.EventFolder",
    }
    if suffix not in kinds:
        raise ValueError(f"{row.where}: {row.file} must be a .wav, .npy, .npz or .aedat file")
    module, _, kind = kinds[suffix].partition(".")
    return getattr(import_module(_HERE + module), kind)


def _chosen(name: str, folder: Path, **choices) -> type:
    """The class to prepare a name from a folder. Pictures in class folders may stand in for the archives of an image set."""
    if name not in CATALOG:
        return _own(name, folder, **choices)
    found = data_set(name)
    if hasattr(found, "SHAPE") and found.ARCHIVES and (folder / "train").is_dir():
        pictures = _own(name, folder, **choices)
        if (pictures.SHAPE, pictures.classes()) != (found.SHAPE, found.classes()):
            raise ValueError(
                f"{name} has {found.classes()} classes of pictures {found.SHAPE}; {folder} has {pictures.classes()} "
                f"of {pictures.SHAPE}"
            )
        return pictures
    if (rate := choices["rate"]) is not None and hasattr(found, "RATE"):
        choices["rate"] = None
        found = type(found.__name__, (found,), {"RATE": rate, "RESAMPLED": True, "__doc__": found.__doc__})
    for choice, value in choices.items():
        if value is not None:
            raise ValueError(f"{choice} {_CHOICES[choice]}; {name} is a data set of the catalog")
    return found


def builder(name: str, folder: str | os.PathLike | None = None, *, of: type | None = None, **choices):
    """The tfds builder of a name in `CATALOG`, or of the class `of`.

    Choices for broken recordings: on_bad="raise" or "skip"; on_unsorted, for events whose times go back, "raise", "sort" or
    "skip", and if it is not given the same as on_bad.
    """
    found = data_set(name) if of is None else of
    for package in ("tensorflow_datasets", "array_record", "importlib_resources"):
        require(package)
    streaming = import_module(_HERE + "streaming")
    return streaming.builder(found, data_dir=str(data_dir(folder)), **choices)


def prepare(
    name: str,
    folder: str | os.PathLike | None = None,
    *,
    manual: str | os.PathLike | None = None,
    download=False,
    size: tuple[int, int] | None = None,
    rate: int | None = None,
    window: float | None = None,
    **choices,
):
    """Prepare a data set from its archives, and return its builder. A data set that is prepared already is only opened.

    The archives are in `manual`/NAME; `manual` is FOLDER/downloads/manual by default. With `download`, missing archives are
    fetched first. A preparation that fails leaves nothing behind.

    Your own pictures: files `manual`/NAME/SPLIT/CLASS/*.png, the splits train, test, ...; `size` (H, W) resizes them. Those
    of an image set of the catalog may come in this form too. NAME is any name that is not in `CATALOG`.

    Your own recordings: files in `manual`/NAME, and a table split.csv with the columns file, label and split; start and stop
    say which part of a file is meant; other columns are kept as texts. All files are of one kind: .wav (`rate`, in hertz,
    resamples them, and those of a set of the catalog too); signals, .npy or .npz with an array `signal`; events, .aedat or .npz with t, x, y and p (`size` is that of
    the camera, and `window`, in milliseconds, cuts each recording into samples).
    """
    if path := prepared_in(name, folder):
        _check_prepared(name, path, size, rate, window)
        if name not in CATALOG:
            _check_on_unsorted(name, choices, "sensor" in _told(path))
            return prepared(name, folder)
    if manual and name in BUILT_IN:
        raise ValueError(f"manual is the folder of archives, or of your own data; {name} needs neither")
    manual = Path(manual or data_dir(folder) / "downloads" / "manual")
    found = _chosen(name, manual / name, size=size, rate=rate, window=window)
    _check_on_unsorted(name, choices, hasattr(found, "SENSOR"))
    made = builder(name, folder, of=found, **choices)
    if is_prepared(made):
        return made
    for archive in found.ARCHIVES if download else ():
        try:
            archives.find(archive, manual / name, name)
        except archives.Missing:
            archives.fetch(archive, manual / name)
    tfds = require("tensorflow_datasets")
    print(f"preparing {name} in {made.data_dir}", file=sys.stderr)
    try:
        with redirect_stdout(io.StringIO()):  # tfds says that it downloads, which it does not
            made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual)))
    except BaseException:
        with suppress(OSError):  # tfds removes its unfinished folder, and leaves an empty one around it
            Path(made.data_dir).parent.rmdir()
        raise
    return made


def _check_on_unsorted(name: str, choices: dict, holds_events: bool) -> None:
    if choices.get("on_unsorted") and not holds_events:
        raise ValueError(f"on_unsorted is for events whose times go back; {name} holds no events")


def _told(path: Path) -> dict:
    """The metadata of prepared data, which their builder wrote; empty if it wrote none."""
    told = path / "metadata.json"
    return json.loads(told.read_text()) if told.exists() else {}


def _check_prepared(name: str, path: Path, size, rate, window) -> None:
    """Raises ValueError if data that are prepared already are not what is asked for."""
    told = _told(path)
    own_events = "sensor" in told and name not in CATALOG
    pixels = _shape(path)[:2] or own_events and tuple(told["sensor"][:2])
    length = own_events and (told["window"] / 1000 if "window" in told else "None")
    made_with = {"size": pixels, "rate": sound_rate(path), "window": length}
    for option, asked in {"size": size and tuple(size), "rate": rate, "window": window}.items():
        had = made_with[option] or None
        known = had or name not in CATALOG  # `_chosen` names options that a set of the catalog lacks
        if known and asked not in (None, had):
            raise ValueError(
                f"{name} is prepared in {path} with {option} {had}: remove that folder to prepare it again; got {option} {asked}"
            )


def sound_rate(path: Path) -> int | None:
    """Samples a second of the sound that is prepared in `path`; None for other data."""
    told = _told(path)
    return int(told["rate"]) if "rate" in told else None


def is_prepared(made) -> bool:
    return Path(made.data_dir, "dataset_info.json").exists()


def prepared_in(name: str, folder: str | os.PathLike | None = None) -> Path | None:
    """The folder of the newest prepared version, made by snnfuse or by tfds; None if there is none. tfds is not needed."""
    found = sorted(data_dir(folder).glob(f"{name}/*.*.*/dataset_info.json"))
    return found[-1].parent if found else None


def prepared(name: str, folder: str | os.PathLike | None = None):
    """The builder of a prepared data set, made by snnfuse or by tfds. A data set in `BUILT_IN` is prepared first if needed."""
    if name not in CATALOG and (path := prepared_in(name, folder)):
        return require("tensorflow_datasets").builder_from_directory(str(path))
    made = builder(name, folder)
    if is_prepared(made):
        return made
    if name in BUILT_IN:
        return prepare(name, folder)
    if path := prepared_in(name, folder):
        return require("tensorflow_datasets").builder_from_directory(str(path))
    raise archives.Missing(
        f"{name} is not prepared in {data_dir(folder)}: python -m snnfuse.data prepare {name}"
        + (" --download" if all(archive.direct for archive in data_set(name).ARCHIVES) else "")
    )


def source(name: str, split: str, folder: str | os.PathLike | None = None) -> Sequence[dict]:
    """A split with random access: `source[i]` is a dict of NumPy arrays, `len(source)` the number of samples.

    The source can be pickled and sent to worker processes.
    """
    made = prepared(name, folder)
    if split not in made.info.splits:
        raise ValueError(f"{name} has splits {', '.join(made.info.splits)}; got {split!r}")
    return made.as_data_source(split=split)
