"""Recordings of sound: spoken digits, spoken commands, and any folder of .wav files with a table of labels."""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from snnfuse.data import formats
from snnfuse.data.archives import Archive
from snnfuse.data.builders.base import Feature, Sample, first_sound
from snnfuse.data.builders.table import TABLE, Row, TableSet, own, read_table
from snnfuse.data.events import BadSample


class AudioSet(TableSet):
    """Recordings: `audio` [n] int16, RATE samples a second, `label`, and the texts in `EXTRA` (as bytes)."""

    RATE: int
    RESAMPLED = False

    def features(self) -> dict[str, Feature]:
        return {"audio": (np.int16, (None,))} | dict.fromkeys(self.EXTRA, (str, ()))

    def metadata(self) -> dict:
        return {"rate": self.RATE}

    def read(self, row: Row, path: Path) -> Iterator[Sample]:
        where = f"{row.where}, {path}"
        audio, rate = formats.read_wav(path.read_bytes(), where)
        audio = row.cut(audio)
        if rate != self.RATE:
            if not self.RESAMPLED:
                raise BadSample(where, f"{rate} samples a second; the data set has {self.RATE}. --rate resamples all")
            audio = resampled(audio, rate, self.RATE)
        yield row.where, {"audio": audio}


def resampled(audio: np.ndarray, rate: int, to: int) -> np.ndarray:
    """int16 sound [n] at `rate` samples a second, at `to`: [n to / rate], by SciPy's polyphase filter."""
    import scipy.signal  # here, because the import takes a second and few data sets need it

    common = math.gcd(rate, to)
    made = scipy.signal.resample_poly(audio.astype(np.float64), to // common, rate // common)
    return np.clip(np.rint(made), -(2**15), 2**15 - 1).astype(np.int16)


class WavFolder(AudioSet):
    """Your own recordings: a folder of .wav files (16 bits, one channel, one rate) and a table split.csv of their labels."""

    @classmethod
    def of(cls, name: str, folder: Path, rate: int | None = None) -> type["WavFolder"]:
        """The data set of a folder: labels and further columns are those of its table, the rate that of its first file.

        With `rate`, in hertz, all recordings are resampled to it.
        """
        rows = read_table(folder / TABLE)
        read = lambda row: formats.read_wav(row.path(folder).read_bytes(), f"{row.where}, {row.path(folder)}")
        _, found = first_sound(partial(read, row) for row in rows)
        return own(cls, name, folder, rows, RATE=rate or found, RESAMPLED=rate is not None)


class SpeechCommands(AudioSet):
    """Speech Commands v0.02, its test files: 10 words, unknown words and silence, 4,890 clips of 1 s at 16 kHz.

    Needs the class folders of the official test archive and a table split.csv with the columns file, label, group and split:
    `group` is the speaker. No split of the test files is published, so compare no accuracy with published ones. Warden 2018,
    https://arxiv.org/abs/1804.03209. CC BY 4.0.
    """

    name = "speech_commands"
    RATE = 16_000
    EXTRA = ("group",)
    LABELS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes", "_silence_", "_unknown_")
    ARCHIVES = (
        Archive(TABLE, "", "http://download.tensorflow.org/data/speech_commands_test_set_v0.02.tar.gz", direct=False),
    )


class SpokenDigits(AudioSet):
    """Free Spoken Digit Dataset: 3,000 recordings of ten English digits by six speakers, 50 each, 8 kHz, 0.1 to 2.3 s.

    Reads the folder `recordings` of its repository, files named DIGIT_SPEAKER_INDEX.wav. The split is the authors': 0 to 4 of
    each digit and speaker are for testing, so every speaker is on both sides. `speaker` lets you hold one out. Jackson et al.,
    https://doi.org/10.5281/zenodo.1342401. CC BY-SA 4.0.
    """

    name = "spoken_digits"
    RATE = 8_000
    EXTRA = ("speaker",)
    LABELS = tuple("0123456789")
    TEST = 5
    ARCHIVES = (
        Archive(
            "recordings", "", "https://github.com/Jakobovski/free-spoken-digit-dataset", "recordings", direct=False
        ),
    )

    @classmethod
    def rows(cls, path: Path) -> list[Row]:
        rows = []
        for file in sorted(path.glob("*.wav")):
            found = re.fullmatch(r"(\d)_([A-Za-z]+)_(\d+)", file.stem)
            if not found:
                raise BadSample(str(file), "the name is not DIGIT_SPEAKER_INDEX.wav")
            digit, speaker, index = found.groups()
            split = "test" if int(index) < cls.TEST else "train"
            rows.append(Row(str(file), f"{path.name}/{file.name}", digit, split, {"speaker": speaker}))
        return rows
