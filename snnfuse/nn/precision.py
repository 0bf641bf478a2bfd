"""The precision of a model: one setting for all its layers."""

from enum import StrEnum

import jax.numpy as jnp
from jax import lax


class PrecisionPolicy(StrEnum):
    """The dtype of a model's activations and the precision of its products. One word sets it: `policy="bfloat16"`.

        "bfloat16"   activations, convolutions and dense layers in bfloat16
        "tf32"       activations in float32, products with ten bits of mantissa on hardware that has them (a GPU)
        "float32"    everything in float32

    Parameters, neuron states, statistics of normalisation and reductions are float32 in all three. A layer of your own takes it
    as `nn.Conv(..., dtype=policy.dtype, precision=policy.lax)`.
    """

    BFLOAT16 = "bfloat16"
    TF32 = "tf32"
    FLOAT32 = "float32"

    @classmethod
    def _missing_(cls, value):
        raise ValueError(f"policy must be one of {', '.join(cls)}; got {value!r}")

    @property
    def dtype(self):
        """The dtype of activations and of the operands of products."""
        return jnp.dtype(jnp.bfloat16 if self is PrecisionPolicy.BFLOAT16 else jnp.float32)

    @property
    def lax(self):
        """The argument `precision` of products, a `lax.Precision` or None."""
        return {"bfloat16": None, "tf32": lax.Precision.DEFAULT, "float32": lax.Precision.HIGHEST}[self]
