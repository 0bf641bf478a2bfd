"""The published neuromorphic data sets, from their official archives."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from snnfuse.data import formats
from snnfuse.data.archives import Archive, Files, open_files, open_one
from snnfuse.data.builders.base import EventSet, Job, Sample
from snnfuse.data.events import BadSample, Sensor

_MENDELEY = "https://data.mendeley.com/public-files/datasets/468j46mzdv/files/"
_FIGSHARE = "https://ndownloader.figshare.com/files/"
_ZENKE = "https://zenkelab.org/datasets/"


def _numbers(name: str) -> int:
    return int("".join(filter(str.isdigit, PurePosixPath(name).stem)) or -1)


def _class_folders(files: Files, ending: str) -> list[tuple[str, str, int]]:
    """(file, class folder, the number in its name) of every file with that ending, by class and number."""
    names = [name for name in files.names() if name.endswith(ending)]
    found = [(name, PurePosixPath(name).parent.name, _numbers(name)) for name in names]
    return sorted(found, key=lambda entry: (entry[1], entry[2]))


class NMNIST(EventSet):
    """N-MNIST: MNIST's 70,000 digits on a screen, seen by an ATIS that makes three saccades. 34 x 34, 0.3 s.

    `index` is the image's number in MNIST. Orchard, Jayawant, Cohen and Thakor 2015, "Converting static image
    datasets to spiking neuromorphic datasets using saccades". CC BY-SA 4.0.
    """

    name = "nmnist"
    SENSOR = Sensor(34, 34)
    LABELS = tuple("0123456789")
    EXTRA = ("index",)
    ARCHIVES = (
        Archive(
            "train.zip",
            "md5:20959b8e626244a1b502305a9e6e2031",
            _MENDELEY + "39c25547-014b-4137-a934-9d29fa53c7a0/file_downloaded",
            "Train",
        ),
        Archive(
            "test.zip",
            "md5:69ca8762b2fe404d9b9bad1103e97832",
            _MENDELEY + "05a4d654-7e03-4c15-bdfa-9bb2bcbea494/file_downloaded",
            "Test",
        ),
    )

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        return {
            split: [partial(self._job, files, *entry) for entry in _class_folders(files, ".bin")]
            for split in ("train", "test")
            for files in [open_files(paths[f"{split}.zip"], stack)]
        }

    def _job(self, files: Files, name: str, folder: str, index: int) -> Iterator[Sample]:
        where = files.full(name)
        if folder not in self.LABELS:
            raise BadSample(where, f"folder {folder!r} is none of {self.LABELS}")
        yield where, {"events": formats.read_nmnist(files.read(name), where), "label": folder, "index": index}


class CIFAR10DVS(EventSet):
    """CIFAR10-DVS: 10,000 pictures of CIFAR-10 moving before a DVS128. 128 x 128, about 1.3 s.

    It publishes no split. Ours is the usual one: the first 900 of each class train, the last 100 test. `index` is the
    number in the file's name. Li, Liu, Ji, Li and Shi 2017, "CIFAR10-DVS: an event-stream dataset for object
    classification". CC BY 4.0.
    """

    name = "cifar10dvs"
    SENSOR = Sensor(128, 128)
    LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    EXTRA = ("index",)
    TRAIN = 900  # of each class
    JOBS_PER_SHARD = 100
    ARCHIVES = tuple(
        Archive(f"{label}.zip", f"md5:{md5}", f"{_FIGSHARE}{number}", label)
        for label, number, md5 in (
            ("airplane", 7712788, "0afd5c4bf9ae06af762a77b180354fdd"),
            ("automobile", 7712791, "8438dfeba3bc970c94962d995b1b9bdd"),
            ("bird", 7712794, "a9c207c91c55b9dc2002dc21c684d785"),
            ("cat", 7712812, "52c63c677c2b15fa5146a8daf4d56687"),
            ("deer", 7712815, "b6bf21f6c04d21ba4e23fc3e36c8a4a3"),
            ("dog", 7712818, "f379ebdf6703d16e0a690782e62639c3"),
            ("frog", 7712842, "cad6ed91214b1c7388a5f6ee56d08803"),
            ("horse", 7712851, "e7cbbf77bec584ffbf913f00e682782a"),
            ("ship", 7712836, "41c7bd7d6b251be82557c6cce9a7d5c9"),
            ("truck", 7712839, "89f3922fd147d9aeff89e76a2b0b70a7"),
        )
    )

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        jobs = {"train": [], "test": []}
        for label in self.LABELS:
            files = open_files(paths[f"{label}.zip"], stack)
            of_class = [partial(self._job, files, name, label, i) for name, _, i in _class_folders(files, ".aedat")]
            jobs["train"] += of_class[: self.TRAIN]
            jobs["test"] += of_class[self.TRAIN :]
        return jobs

    def _job(self, files: Files, name: str, label: str, index: int) -> Iterator[Sample]:
        where = files.full(name)
        events = formats.read_aedat2(files.read(name), where)
        start = int(events["t"].min()) if len(events["t"]) else 0
        yield where, {"events": events, "start": start, "label": label, "index": index}


class DVS128Gesture(EventSet):
    """DVS128 Gesture: 29 people, 3 kinds of light, 11 hand and arm gestures before a DVS128. 128 x 128, about 6 s.

    A sample is one line of a recording's labels file, its events those of start <= t < end (SpikingJelly and snnTorch
    cut it so: 1,176 + 288). `start` is that line's, so that t counts from it. `user`, and `light` in the order of
    `LIGHTS`. Amir et al. 2017, "A low power, fully event-based gesture recognition system". CC BY 4.0.
    """

    name = "dvs128_gesture"
    SENSOR = Sensor(128, 128)
    LABELS = (
        "hand_clapping",
        "right_hand_wave",
        "left_hand_wave",
        "right_arm_clockwise",
        "right_arm_counter_clockwise",
        "left_arm_clockwise",
        "left_arm_counter_clockwise",
        "arm_roll",
        "air_drums",
        "air_guitar",
        "other_gestures",
    )
    LIGHTS = ("fluorescent", "fluorescent_led", "lab", "led", "natural")
    EXTRA = ("user", "light")
    JOBS_PER_SHARD = 1  # a recording, of about 12 samples
    ARCHIVES = (
        Archive(
            "DvsGesture.tar.gz",
            "md5:8a5c71fb11e24e5ca5b11866ca6c00a1",
            "https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794",
            "DvsGesture",
            direct=False,
        ),
    )

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        files = open_files(paths["DvsGesture.tar.gz"], stack)
        by_name = {PurePosixPath(name).name: name for name in files.names()}
        jobs = {}
        for split in ("train", "test"):
            if (trials := f"trials_to_{split}.txt") not in by_name:
                raise BadSample("DvsGesture", f"has no {trials}")
            recordings = [line.strip() for line in files.read(by_name[trials]).decode().splitlines() if line.strip()]
            jobs[split] = [partial(self._job, files, by_name, recording) for recording in recordings]
        return jobs

    def _job(self, files: Files, by_name: dict[str, str], recording: str) -> Iterator[Sample]:
        labels = recording.replace(".aedat", "_labels.csv")
        if missing := [name for name in (recording, labels) if name not in by_name]:
            raise BadSample(recording, f"is listed, but {missing} is missing")
        user, _, light = recording.removesuffix(".aedat").partition("_")
        if light not in self.LIGHTS or not user[4:].isdigit():
            raise BadSample(recording, f"is not named userNN_LIGHT.aedat, LIGHT one of {self.LIGHTS}")
        trials = formats.read_trials(files.read(by_name[labels]).decode(), labels, len(self.LABELS))
        events = formats.read_aedat3(files.read(by_name[recording]), recording)
        about = {"user": int(user[4:]), "light": self.LIGHTS.index(light)}
        for i, trial in enumerate(trials):
            inside = (events["t"] >= trial.start) & (events["t"] < trial.end)
            if not inside.any():  # a gesture always has events, so this file of labels is another recording's
                raise BadSample(f"{labels} trial {i}", f"no events from {trial.start} to {trial.end}")
            cut = {column: values[inside] for column, values in events.items()}
            yield f"{labels} trial {i}", {"events": cut, "start": trial.start, "label": trial.label} | about


class _HeidelbergSet(EventSet):
    SENSOR = Sensor(1, 700, 1)
    EXTRA = ("speaker",)

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        jobs = {}
        for file, path in paths.items():
            name = file.removesuffix(".zip")
            hsd = formats.Hsd(open_one(path, stack), name)
            stack.callback(hsd.file.close)
            self._keep_labels(hsd.keys, name)
            jobs[name.removesuffix(".h5").split("_")[1]] = [partial(self._job, hsd, i) for i in range(len(hsd))]
        return jobs

    def _keep_labels(self, keys: list[str], name: str) -> None:
        if len(keys) != self.classes():
            raise BadSample(name, f"{len(keys)} label names, not {self.classes()}")
        if self.label_names not in (None, keys):
            raise BadSample(name, f"label names {keys} disagree with {self.label_names}")
        self.label_names = keys

    def _job(self, hsd: formats.Hsd, index: int) -> Iterator[Sample]:
        events, label, speaker = hsd.read(index)
        yield f"{hsd.name}[{index}]", {"events": events, "label": label, "speaker": np.int64(speaker)}


class SHD(_HeidelbergSet):
    """Spiking Heidelberg Digits: 10,420 spoken digits, English and German, through a cochlea model of 700 channels.

    Cramer, Stradmann, Schemmel and Zenke 2020, https://arxiv.org/abs/1910.07407. CC BY 4.0.
    """

    name = "shd"
    LABELS = 20
    ARCHIVES = (
        Archive(
            "shd_train.h5.zip",
            "md5:f3252aeb598ac776c1b526422d90eecb",
            _ZENKE + "shd_train.h5.zip",
            "shd_train.h5",
        ),
        Archive("shd_test.h5.zip", "md5:1503a5064faa34311c398fb0a1ed0a6f", _ZENKE + "shd_test.h5.zip", "shd_test.h5"),
    )


class SSC(_HeidelbergSet):
    """Spiking Speech Commands: 105,000 spoken words of 35 kinds, through a cochlea model of 700 channels.

    Cramer, Stradmann, Schemmel and Zenke 2020, https://arxiv.org/abs/1910.07407. CC BY 4.0.
    """

    name = "ssc"
    LABELS = 35
    ARCHIVES = tuple(
        Archive(f"ssc_{split}.h5.zip", f"md5:{md5}", f"{_ZENKE}ssc_{split}.h5.zip", f"ssc_{split}.h5")
        for split, md5 in (
            ("train", "d102be95e7144fcc0553d1f45ba94170"),
            ("valid", "b4eee3516a4a90dd0c71a6ac23a8ae43"),
            ("test", "a35ff1e9cffdd02a20eb850c17c37748"),
        )
    )
