"""Spikes with their bits: a layer that must store them for its backward pass stores one bit per spike."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.core.neuron import PyTree
from snnfuse.nn.padded import Padded
from snnfuse.ops.packing import Packed, Words, pack, unpack

_BINARY = Packed(8)


@partial(jax.tree_util.register_dataclass, data_fields=("values", "bits"), meta_fields=("lowest",))
@dataclass(frozen=True)
class Spikes:
    """Packed spikes: `values` [T, B, ...] of 0 and 1, and the same as `bits` [ceil(T / 8), B, ...] in uint8 (`snnfuse.pack`).

    A layer called on `Spikes` stores only the bits for its backward pass, so the memory of the values can be freed. The bits of graded
    spikes are a tuple of such arrays, and `lowest` is their lowest value.
    """

    values: Array
    bits: Words
    lowest: int = 0

    @staticmethod
    def of(values: Array, packed: Packed = _BINARY) -> "Spikes":
        """`values`, each 0 or 1, or whole numbers from `packed.lowest` to `packed.highest`, together with their bits.

        Another value raises ValueError. Inside of `jit` there is no value to look at: there, the gradient of the next layer's
        weights counts every value that is not 0 as 1, or with graded spikes as the lowest one.
        """
        low, high = packed.lowest, packed.highest
        known = jnp.array([*range(low, high + 1)] if packed.graded else [0, 1], jnp.float32)
        if not isinstance(values, jax.core.Tracer) and not jnp.isin(values.astype(jnp.float32), known).all():
            wanted = f"whole numbers from {low} to {high}" if packed.graded else "0 or 1"
            raise ValueError(f"values must be {wanted} to be packed as bits; got {values.min()} to {values.max()}")
        return Spikes(values, pack(values, packed), low)

    def from_bits(self) -> "Spikes":
        """The same spikes with values unpacked from the bits, so that the old values can be freed; those still get the gradient."""
        return Spikes(_unpacked(self.lowest, self.values, self.bits), self.bits, self.lowest)


def values(x: Array | Spikes | None, who: str = "this layer or function") -> Array | None:
    """The values of `Spikes`; anything else is returned as it is. Layers that take `Padded` split it before; `who` does not."""
    if isinstance(x, Padded):
        raise NotImplementedError(f"{who} takes no sequences of other lengths, nn.Padded")
    return x.values if isinstance(x, Spikes) else x


@partial(
    jax.custom_jvp, nondiff_argnums=(0,)
)  # not custom_vjp: a remat stores all arguments of a custom_vjp, used or not
def _unpacked(lowest, values, bits):
    return unpack(bits, values.shape[0], values.dtype, lowest=lowest)


@_unpacked.defjvp
def _unpacked_jvp(lowest, primals, tangents):
    values, bits = primals  # not by _unpacked itself, of which a remat would store the values
    return unpack(bits, values.shape[0], values.dtype, lowest=lowest), tangents[0]


def differentiable(out_dtype: Any, inputs: PyTree) -> PyTree:
    """`inputs` of a layer, as they are. They refuse a gradient if no output has a float dtype, because it would be zero."""
    dtypes = jax.tree.leaves(out_dtype)
    if not dtypes or any(not isinstance(d, Packed) and jnp.issubdtype(d, jnp.floating) for d in dtypes):
        return inputs
    got = ", ".join(str(d if isinstance(d, Packed) else jnp.dtype(d)) for d in dtypes)
    leaves, tree = jax.tree.flatten(inputs)
    arrays = [isinstance(leaf, jax.Array) for leaf in leaves]  # a number stays a number, compiled into the kernel
    checked = iter(refuse_gradient(_WHY.format(got), [a for a, array in zip(leaves, arrays, strict=True) if array]))
    return tree.unflatten([next(checked) if array else leaf for leaf, array in zip(leaves, arrays, strict=True)])


_WHY = (
    "out_dtype must be a float dtype where a gradient passes the layer; got {}, whose gradient is zero for all "
    "layers before. nn.PackSpikes after the layer stores bits and keeps the gradient. For the gradient of the state "
    "alone, call snnfuse.unroll. Where no gradient is meant, apply jax.lax.stop_gradient to what the layer takes"
)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_gradient(why: str, arrays: PyTree) -> PyTree:
    """`arrays` as they are. Raises TypeError(why) when a function of them is differentiated."""
    return arrays


@refuse_gradient.defjvp
def _refuse(why, primals, tangents):
    raise TypeError(why)
