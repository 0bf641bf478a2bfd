"""What a neuron is, and the letters used for its shapes.

T   time steps, always the first axis of a sequence
*B  any number of batch (and space) axes
N   neurons or channels, always the last axis
M   the number of lanes: the product of *B and N. A lane is one neuron of one sample.
"""

from dataclasses import dataclass
from typing import Any, Protocol

PyTree = Any


class Neuron(Protocol):
    """A pure step. Any hashable object with these two methods is a neuron; a frozen dataclass is the usual choice.

        state[t], out[t] = step(params, state[t-1], x[t])

    `step` must treat every lane alike: it may not reduce, reorder or index over *B or N, and may not depend on a shape.
    The leaves that it gets are float32 whatever the dtype of the sequences (float64 if the inputs are float64).

    Neurons that are equal must do the same: what JAX has traced for one is used for the other.

    `step` returns the state first because it is the body of a `lax.scan`; `unroll` and the modules return the outputs
    first because that is what their callers want.
    """

    def init_state(self, shape: tuple[int, ...]) -> PyTree:
        """The state before the first step; every leaf is float32 of `shape` = [*B, N]."""

    def step(self, params: PyTree, state: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """One time step. `params` leaves broadcast against [*B, N]; `state`, `x` and the outputs are [*B, N]."""


@dataclass(frozen=True)
class WithState:
    """The same neuron with its state as a second output, for traces and plots: out[t] = (inner out[t], state[t])."""

    inner: Neuron

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        state, out = self.inner.step(params, state, x)
        return state, (out, state)
