"""Shared by all inputs: the names of a data set's classes, and the reading of its samples from disk."""

from collections.abc import Sequence
from typing import Annotated

import tyro
from jax import Array
from tqdm import tqdm

from snnfuse.data import archives, catalog
from snnfuse.data import loader as load

Name = Annotated[str, tyro.conf.arg(name="data", prefix_name=False, metavar="NAME")]
Sources = tuple[Sequence[dict], Sequence[dict]]
Batch = dict[str, Array]


class Labelled:
    """A data set in snnfuse.data, with the names of its classes."""

    def measured(self, train: Sequence[dict]):
        return self

    @property
    def classes(self) -> int:
        return catalog.data_set(self.name).classes()

    @property
    def labels(self) -> list[str]:
        names = catalog.data_set(self.name).LABELS
        return list(map(str, range(names) if isinstance(names, int) else names))


def in_memory(source: Sequence[dict], name: str) -> list[dict]:
    samples, everything = [], list(range(len(source)))
    with tqdm(everything, f"{name}: reading", leave=False) as bar:
        while len(samples) < len(source):
            some = load.read(source, everything[len(samples) :][:1000])
            samples += some
            bar.update(len(some))
    return samples


def train_and_test(name):
    """The splits train and test."""
    return tuple(one_split(name, split) for split in ("train", "test"))


def one_split(name, split):
    """A split of a data set. Raises archives.Missing, which says what to get and where to put it."""
    try:
        return catalog.source(name, split)
    except ImportError as e:
        raise archives.Missing(f"{e}, then: python -m snnfuse.data prepare {name}") from e
    except archives.Missing as e:
        folder = catalog.data_dir() / "downloads" / "manual" / name
        files = "; ".join(f"{archive.file} from {archive.url}" for archive in catalog.data_set(name).ARCHIVES)
        raise archives.Missing(f"{e}. It needs, in {folder}: {files}") from e
    except ValueError as e:  # your own data may have other splits
        raise archives.Missing(f"training needs the splits train and test: {e}") from e
