"""Digits that people other than those of spoken_digits say: 240 of the unknown words in the test files of Speech Commands.

    python experiments/digits_of_others.py manual/speech_commands manual/digits_of_others
    python -m snnfuse.data prepare digits_of_others --manual manual --rate 8000
    python experiments/spoken_digits.py --data.also digits_of_others --data.held_out theo

A recording takes a second. The table split.csv says which part of it is loud, with a margin, because the recordings of
spoken_digits are cut like that.
"""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np

from snnfuse.data import formats

WORDS = "zero one two three four five six seven eight nine".split()


def loud(sound: np.ndarray, rate: int) -> tuple[int, int]:
    """(start, stop) of the part from the first to the last 20 ms that are at most 30 decibels below the loudest, with 50 ms around it."""
    width, hop, margin = rate // 50, rate // 100, rate // 20
    starts = np.arange(0, max(1, len(sound) - width + 1), hop)
    power = np.array([np.square(sound[i : i + width].astype(np.float64)).mean() for i in starts])
    found = starts[power > 1e-3 * power.max()] if power.max() else starts
    return max(0, int(found[0]) - margin), min(len(sound), int(found[-1]) + width + margin)


def main(source: Path, folder: Path) -> int:
    """Copies the recordings of digits, and writes their table. Returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file", "label", "speaker", "split", "start", "stop")]
    for path in sorted((source / "_unknown_").glob("*.wav")):
        word, speaker, *_ = path.name.split("_")
        if word in WORDS:
            sound, rate = formats.read_wav(path.read_bytes(), str(path))
            rows.append((path.name, WORDS.index(word), speaker, "train", *loud(sound, rate)))
            shutil.copy(path, folder / path.name)
    with open(folder / "split.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return len(rows) - 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{main(Path(sys.argv[1]), Path(sys.argv[2]))} recordings in {sys.argv[2]}")
