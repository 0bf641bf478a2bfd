"""For every cell that `core.py choice` measured: the implementation that `None` picks, and the fastest one."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
from neurons import NEURONS
from runner import rows

from snnfuse.ops import implementations


class Cell(NamedTuple):
    """`ms`: milliseconds by implementation. `chosen`: what None picks. `over`: its time over that of the fastest."""

    case: str
    dtype: str
    T: int
    M: int
    ms: dict[str, float]
    chosen: str
    over: float

    @property
    def fastest(self):
        return min(self.ms, key=self.ms.get)


def cells() -> list[Cell]:
    """The cells in which None's choice was measured, of the GPU of the last row."""
    found, every = {}, [row for row in rows("choice") if row["status"] == "ok"]
    for row in every:
        if row["device"] == every[-1]["device"]:
            key = row["case"], row["dtype"], row["T"], row["M"]
            found.setdefault(key, {})[row["implementation"]] = row["ms"]
    made = []
    for (case, dtype, T, M), ms in sorted(found.items()):
        arrays = [leaf for leaf in jax.tree.leaves(NEURONS[case][1]) if isinstance(leaf, jax.Array)]
        problem = SimpleNamespace(T=T, M=M, param_shapes=[leaf.shape for leaf in arrays])
        chosen = implementations.preference(problem)[0]
        if chosen in ms and len(ms) > 1:
            made.append(Cell(case, dtype, T, M, ms, chosen, ms[chosen] / min(ms.values())))
    return made
