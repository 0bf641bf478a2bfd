"""Spikes that travel with their bits, so that whoever must remember them keeps one bit each."""

from dataclasses import dataclass

import jax
from jax import Array

from snnfuse.ops.packing import pack, unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spikes:
    """`values` [T, B, ...] of 0 and 1, and the same as `bits` [ceil(T / 8), B, ...] in uint8 (`snnfuse.pack`).

    A layer that consumes spikes, given these, keeps the bits for its backward pass and lets go of the values.
    """

    values: Array
    bits: Array

    @staticmethod
    def of(values: Array) -> "Spikes":
        """`values`, each 0 or 1, with their bits."""
        return Spikes(values, pack(values, 8))

    def from_bits(self) -> "Spikes":
        """The same, made of the bits: what is computed from it needs no values in memory. The gradient goes to those."""
        return Spikes(_unpacked(self.values, self.bits), self.bits)


def values(x: Array | Spikes | None) -> Array | None:
    """The values of `Spikes`; anything else is itself."""
    return x.values if isinstance(x, Spikes) else x


@jax.custom_jvp  # not custom_vjp: what a remat keeps for one of those are all its arguments, used or not
def _unpacked(values, bits):
    return unpack(bits, values.shape[0], values.dtype)


@_unpacked.defjvp
def _unpacked_jvp(primals, tangents):
    values, bits = primals
    return unpack(bits, values.shape[0], values.dtype), tangents[0]
