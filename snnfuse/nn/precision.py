"""In what precision a model computes, as one setting."""

from enum import StrEnum

import jax.numpy as jnp
from jax import lax


class PrecisionPolicy(StrEnum):
    """What activations are stored in and how products are formed. One word sets it for a model: `policy="bfloat16"`.

        "bfloat16"   activations, convolutions and dense layers in bfloat16
        "tf32"       activations in float32, products with ten bits of mantissa where the hardware has them (a GPU)
        "float32"    all in float32

    In each, parameters, neuron states, statistics of normalisation and every reduction are float32.
    """

    BFLOAT16 = "bfloat16"
    TF32 = "tf32"
    FLOAT32 = "float32"

    @classmethod
    def _missing_(cls, value):
        raise ValueError(f"policy must be one of {', '.join(cls)}; got {value!r}")

    @property
    def dtype(self):
        """Of activations, and of the operands of products."""
        return jnp.dtype(jnp.bfloat16 if self is PrecisionPolicy.BFLOAT16 else jnp.float32)

    @property
    def lax(self):
        """The `precision` that products are given."""
        return {"bfloat16": None, "tf32": lax.Precision.DEFAULT, "float32": lax.Precision.HIGHEST}[self]
