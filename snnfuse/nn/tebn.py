"""Temporal effective batch normalisation: one statistic for all steps, and a learned weight for each."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from snnfuse.nn.norm import BatchNorm
from snnfuse.nn.temporal import whole_steps


class TEBN(BatchNorm):
    """Temporal effective batch normalisation of [T, B, ..., N], for sequences of exactly T steps.

        y[t] = step_scale[t] (gain scale (x[t] - mean) / sqrt(var + epsilon) + bias)

    Mean and variance are over all axes but the last, so over time too. `step_scale` [T] starts at 1 and is trained.

    Args:
      T: the number of steps.
      num_features, gain, momentum, epsilon, use_running_average, axis_name: as in `BatchNorm`.

    The weights of the steps differ, so it does not run in the kernel of `NormSpiking`, but before it.
    Duan et al. 2022, https://openreview.net/forum?id=fLIgyyQiJqz.
    """

    def __init__(self, T: int, num_features: int, *, rngs: nnx.Rngs, **options):
        T = whole_steps("T", T)
        if "per_step" in options:
            raise ValueError("per_step is not an option of TEBN, whose statistics are those of all steps")
        super().__init__(num_features, rngs=rngs, **options)
        self.step_scale = nnx.Param(jnp.ones(T, jnp.float32))

    @property
    def fused(self) -> bool:
        return False

    def affine(self, xs: Array, lengths: Array | None = None) -> tuple[Array, Array]:
        """(scale, shift) of y = scale x + shift, float32 [T, 1, ..., N]; updates the running averages."""
        if len(xs) != len(self.step_scale[...]):
            raise ValueError(f"xs must have T = {len(self.step_scale[...])} steps; got {len(xs)}")
        scale, shift = (a.reshape(*(1,) * (xs.ndim - 1), -1) for a in super().affine(xs, lengths))
        weight = self.step_scale[...].reshape(-1, *(1,) * (xs.ndim - 1))
        return weight * scale, weight * shift
