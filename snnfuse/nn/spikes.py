"""Spikes with their bits: a layer that must store them for its backward pass stores one bit per spike."""

from dataclasses import dataclass

import jax
from jax import Array

from snnfuse.ops.packing import pack, unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spikes:
    """Packed spikes: `values` [T, B, ...] of 0 and 1, and the same as `bits` [ceil(T / 8), B, ...] in uint8 (`snnfuse.pack`).

    A layer called on `Spikes` stores only the bits for its backward pass, so the memory of the values can be freed.
    """

    values: Array
    bits: Array

    @staticmethod
    def of(values: Array) -> "Spikes":
        """`values`, each 0 or 1, together with their bits."""
        return Spikes(values, pack(values, 8))

    def from_bits(self) -> "Spikes":
        """The same spikes with values unpacked from the bits, so that the old values can be freed; those still get the gradient."""
        return Spikes(_unpacked(self.values, self.bits), self.bits)


def values(x: Array | Spikes | None) -> Array | None:
    """The values of `Spikes`; anything else is returned as it is."""
    return x.values if isinstance(x, Spikes) else x


@jax.custom_jvp  # not custom_vjp: a remat stores all arguments of a custom_vjp, used or not
def _unpacked(values, bits):
    return unpack(bits, values.shape[0], values.dtype)


@_unpacked.defjvp
def _unpacked_jvp(primals, tangents):
    values, bits = primals
    return unpack(bits, values.shape[0], values.dtype), tangents[0]
