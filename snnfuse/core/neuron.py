"""What a neuron is, and the words used for its shapes.

T   time steps, always the first axis of a sequence
*B  any number of batch (and space) axes
N   neurons or channels, always the last axis
M   lanes: the product of *B and N, once a kernel has flattened them
"""

from dataclasses import dataclass
from typing import Any, Protocol

PyTree = Any


class Neuron(Protocol):
    """A pure step. Any hashable object with these two methods is a neuron; a frozen dataclass is the natural one.

        state[t], out[t] = step(params, state[t-1], x[t])

    `step` must treat every element alike: it may not reduce, reorder or index over *B or N, nor look at a shape.
    All its leaves are float32 (float64 if the inputs are), whatever the dtype of the sequences.
    """

    def init_state(self, shape: tuple[int, ...]) -> PyTree:
        """The state before the first step; every leaf is float32 of `shape` = [*B, N]."""

    def step(self, params: PyTree, state: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """One time step. `params` leaves broadcast against [*B, N]; `state`, `x` and the outputs are [*B, N]."""


@dataclass(frozen=True)
class WithState:
    """The same neuron, with its state as a second output: out[t] = (inner out[t], state[t]). For traces and plots."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        state, out = self.inner.step(params, state, x)
        return state, (out, state)
