"""Batch normalisation as an affine map, which runs in one kernel with the residual and the neuron after it."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from snnfuse.core.compose import Affine, AffineParams, Connect, Gated, GatedParams, Twice
from snnfuse.core.neuron import PyTree
from snnfuse.core.neurons import LI
from snnfuse.nn import rows
from snnfuse.nn.padded import Padded, check_same, join, real_steps, split, until_end
from snnfuse.nn.spikes import Spikes, differentiable, values
from snnfuse.nn.spiking import Spiking
from snnfuse.nn.temporal import Temporal, Timeless
from snnfuse.ops.explain import Explanation, explain
from snnfuse.ops.packing import Packed, packed_for


class BatchNorm(Timeless, nnx.BatchNorm):
    """Batch normalisation of [T, B, ..., N] over all axes except the last: `nnx.BatchNorm` for sequences.

        y = gain scale (x - mean) / sqrt(var + epsilon) + bias

    Args:
      gain: a constant factor, 1.0 by default. gain = threshold of the next neuron, times 1 / sqrt(2) if a residual is added,
        is tdBN: Zheng et al. 2021, https://arxiv.org/abs/2011.05280.
      per_step: False by default. True: every time step has its own statistics over [B, ...], and the running statistics are
        their average. This is not fused: the neuron gets the normalised current in the dtype of xs.
      momentum: 0.9 by default. `epsilon`, `use_running_average`, `axis_name`: as in `nnx.BatchNorm`.

    Variables, `train()` and `eval()` are those of `nnx.BatchNorm`. Statistics are float32, and keep their digits where the
    mean is thousands of times the deviation. The running statistics start at mean 0 and variance 1. The running variance
    averages the unbiased variance, as in PyTorch. Gradients are reverse mode.
    """

    def __init__(
        self,
        num_features: int,
        *,
        gain: float = 1.0,
        per_step: bool = False,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        use_running_average: bool = False,
        axis_name: str | tuple[str, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1]; got {momentum}")
        options = dict(momentum=momentum, epsilon=epsilon, use_running_average=use_running_average, axis_name=axis_name)
        super().__init__(num_features, **options, rngs=rngs)
        self.gain, self.per_step = gain, per_step

    @property
    def fused(self) -> bool:
        """Whether it runs in the kernel of `NormSpiking`, which takes one scale for all steps."""
        return not self.per_step

    mixes_steps = True

    def affine(self, xs: Array, lengths: Array | None = None) -> tuple[Array, Array]:
        """(scale, shift) of y = scale x + shift, float32 [N] ([T, 1, ..., N] if per_step); updates the running averages.

        With `lengths` [B] the statistics are those of the steps before the end of each sequence.
        """
        if xs.ndim < 3 or xs.shape[-1] != self.num_features:
            raise ValueError(f"xs must be [T, B, ..., {self.num_features}]; got {xs.shape}")
        if xs.size == 0:
            raise ValueError(f"xs must have no empty axis; got {xs.shape}")
        if not jnp.issubdtype(xs.dtype, jnp.floating):
            raise TypeError(f"xs must be floating; got {xs.dtype}")
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._statistics(xs, real_steps(lengths, xs.shape))
        like = lambda variable: variable[...].reshape(*(1,) * (mean.ndim - 1), -1)
        scale = lax.rsqrt(var + self.epsilon) * self.gain * like(self.scale)
        return scale, like(self.bias) - mean * scale

    def _statistics(self, xs, real):
        if real is not None and self.per_step:
            raise NotImplementedError("a BatchNorm with per_step=True takes no sequences of other lengths, nn.Padded")
        mean, var, n = _moments(xs, self.per_step, self.axis_name, real)
        unbiased = n / max(1, n - 1) if real is None else n / jnp.maximum(1, n - 1)
        for average, now in ((self.mean, mean), (self.var, var * unbiased)):
            now = lax.stop_gradient(now.reshape(-1, self.num_features).mean(0))
            now = self.momentum * average[...] + (1 - self.momentum) * now
            average[...] = now if real is None else jnp.where(n > 0, now, average[...])  # a piece may have no real step
        return mean, var

    def __call__(self, xs: Array | Spikes | Padded) -> Array | Padded:
        xs, lengths = split(xs)
        xs = values(xs)
        scale, shift = (jnp.broadcast_to(a, xs.shape) for a in self.affine(xs, lengths))
        return join((xs.astype(jnp.float32) * scale + shift).astype(xs.dtype), lengths)


def _moments(xs, per_step, axis_name, real):
    """(mean, variance, the number of values), float32, of xs [T, B, ..., N] over all axes but the last (and the first if `per_step`),
    and `axis_name`. `real` [T, B, ...] leaves out the steps where it is False; None takes all.

        mean = c + E[x - c];   variance = E[(x - c)^2] - E[x - c]^2

    xs is read once. With c = 0 the difference of squares would lose the digits of a variance that is small beside mean^2. So
    c is a value of the channel itself, the one in the middle: it is k deviations from the mean in less than 1 / k^2 of all
    choices (Chebyshev), and the relative error of the variance is about k^2 6e-8. Devices have their own c; their means and
    variances are joined by mean = E[m] and variance = E[v + (m - mean)^2], weighted by the number of values of each.

    Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115.
    """
    mean, var = _own_moments(xs, real, tuple(range(1 if per_step else 0, xs.ndim - 1)))
    n = _count(xs, real, mean)
    if axis_name is not None:  # each device writes into its own place, so that one sum sends all means and variances
        place, count = lax.axis_index(axis_name), lax.axis_size(axis_name)
        both = jnp.stack([mean, var])
        means, variances = lax.psum(jnp.zeros((count, *both.shape)).at[place].set(both), axis_name).swapaxes(0, 1)
        if real is None:
            average, n = (lambda x: x.mean(0)), n * count
        else:
            each = lax.psum(jnp.zeros(count).at[place].set(n), axis_name)
            n = each.sum()
            average = lambda x: (x * (each / jnp.maximum(n, 1)).reshape(-1, *(1,) * (x.ndim - 1))).sum(0)
        mean = average(means)
        var = average(variances + (means - mean) ** 2)
    return (mean, var, n) if per_step else (mean.reshape(-1), var.reshape(-1), n)


def _count(xs, real, mean):
    """The number of values that each mean is of."""
    all_values = xs.size / mean.size
    return all_values if real is None else real.sum(dtype=jnp.float32) * (all_values / real.size)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _own_moments(xs, real, axes):
    middle = [slice(n // 2, n // 2 + 1) if i in axes else slice(None) for i, n in enumerate(xs.shape)]
    if real is not None:
        middle[:2] = slice(1), slice(None)
    middle = tuple(middle)
    x = xs.astype(jnp.float32)
    # a sharded axis cannot be sliced where a mesh has explicit axes; there, the mean is taken first, which reads xs twice
    if jax.typeof(xs).sharding.mesh.explicit_axes:
        c = (x if real is None else jnp.where(real, x, 0)).mean(axes, keepdims=True)
    else:
        c = xs[middle].astype(jnp.float32)
        if real is not None:  # the first step of a sequence that has one
            c = lax.dynamic_slice_in_dim(c, jnp.argmax(real[0].ravel()), 1, axis=1)
    away = x - c if real is None else jnp.where(real, x - c, 0)
    part = 1 if real is None else jnp.maximum(real.sum(dtype=jnp.float32), 1) / real.size  # of the values that count
    first, square = (a.mean(axes, keepdims=True) / part for a in (away, away * away))
    return c + first, jnp.maximum(square - first * first, 0)


def _own_moments_forward(xs, real, axes):
    mean, var = _own_moments(xs, real, axes)
    return (mean, var), (xs, real, mean)


def _own_moments_backward(axes, kept, cotangents):
    """d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / n. JAX's own would also keep x - c, as large as xs."""
    (xs, real, mean), (d_mean, d_var) = kept, cotangents
    d_xs = (d_mean + 2 * d_var * (xs.astype(jnp.float32) - mean)) / (
        _count(xs, real, mean) if real is None else jnp.maximum(_count(xs, real, mean), 1)
    )
    return (d_xs if real is None else jnp.where(real, d_xs, 0)).astype(xs.dtype), None


_own_moments.defvjp(_own_moments_forward, _own_moments_backward)


Norm = BatchNorm | nnx.LayerNorm | nnx.RMSNorm


class NormSpiking(Temporal):
    """Normalisation, residual and neuron in one kernel forward and one backward.

        s = neuron(norm(xs))                    s = neuron(norm(xs) + shortcut)
        s = connect(neuron(norm(xs)), shortcut) s = neuron(norm(xs) + shortcut_norm(shortcut))

    Args:
      neuron: any `Spiking` module.
      norm: a `BatchNorm`, `TEBN`, `nnx.LayerNorm` or `nnx.RMSNorm` for xs. `shortcut_norm`: one for the shortcut; None (the default)
        adds the shortcut as it is.
      connect: "sum" (the default) adds the shortcut to the neuron's input; "add", "and" or "iand" combine it with the spikes
        (see `snnfuse.Connect`).
      pack: True returns packed `Spikes`, whose bits the same kernel writes. Only for neurons that spike, and not for "add".
        With "and" and "iand" the shortcut must be spikes, 0 or 1.
      drop_path: an `nnx.Dropout` that drops the spikes of whole samples, with one choice for all steps; the shortcut stays. With
        connect="add" only. Kept spikes become 1 / (1 - rate) while it trains. Huang et al. 2016,
        https://arxiv.org/abs/1603.09382.

    Bytes per element and step in training, 16 bits, no shortcut: 2 for the statistics (read x), 4 forward (read x, write s),
    6 backward (read x and ds, write du) and 6 for the gradient of the statistics (read x and du, write dx), in all 18. A separate
    normalisation before an equally fused neuron takes 32. The layer stores xs, which the normalisation needs anyway, and the
    shortcut.

    If xs and shortcut are both `nn.Padded`, their lengths must be equal. Inside of `jit`, where there is no value to look at, those of xs
    count.

    `LayerNorm` and `RMSNorm` have other statistics at each step and sample, which the kernel cannot take: the normalised xs is written
    once, 4 bytes more, and stored in place of xs; scale and bias are in the kernel. `TEBN` and `per_step` run before the kernel. `explain`
    says what does.
    """

    def __init__(
        self,
        neuron: Spiking,
        norm: Norm,
        *,
        shortcut_norm: Norm | None = None,
        connect: str = "sum",
        pack: bool = False,
        drop_path: nnx.Dropout | None = None,
    ):
        for name, given in (("norm", norm), ("shortcut_norm", shortcut_norm)):
            if not isinstance(given, Norm) and (given is not None or name == "norm"):
                raise TypeError(
                    f"{name} must be a snnfuse.nn.BatchNorm, nnx.LayerNorm or nnx.RMSNorm; got {type(given).__name__}"
                )
            if isinstance(given, nnx.LayerNorm | nnx.RMSNorm):
                rows.check(name, given)
        if not isinstance(neuron, Spiking):
            raise TypeError(f"neuron must be a snnfuse.nn.Spiking module; got {type(neuron).__name__}")
        if pack and (connect == "add" or isinstance(neuron.neuron, LI) or isinstance(neuron.out_dtype, Packed)):
            raise ValueError(
                f"pack must be False if outputs are not the numbers 0 and 1; got connect={connect!r}, "
                f"neuron {type(neuron).__name__}, out_dtype {neuron.out_dtype}"
            )
        if pack and connect != "sum" and packed_for(neuron.neuron).graded:
            raise ValueError(
                f"pack must be False if connect={connect!r} joins graded spikes of {type(neuron.neuron).__name__}"
            )
        if connect != "sum":
            Connect(neuron.neuron, connect)  # checks it
            if shortcut_norm is not None:
                raise ValueError(f"shortcut_norm goes with connect='sum'; got connect={connect!r}")
        if drop_path is not None and not isinstance(drop_path, nnx.Dropout):
            raise TypeError(f"drop_path must be an nnx.Dropout, or None; got {drop_path!r}")
        if drop_path is not None and drop_path.broadcast_dims:
            raise ValueError(
                f"drop_path must have no broadcast_dims, so that samples are dropped one by one: nnx.Dropout, not nn.Dropout; got "
                f"{drop_path.broadcast_dims}"
            )
        if drop_path is not None and connect != "add":
            raise ValueError(f"drop_path goes with connect='add'; got connect={connect!r}")
        self.neuron, self.norm, self.shortcut_norm, self.drop_path = neuron, norm, shortcut_norm, drop_path
        self.connect, self.pack = connect, pack

    def init_state(self, xs: PyTree) -> PyTree:
        return self.neuron.init_state(xs)

    def __call__(
        self, xs: Array | Spikes | Padded, state: PyTree | None = None, shortcut: Array | Spikes | Padded | None = None
    ):
        if isinstance(shortcut, Padded) and not isinstance(xs, Padded):
            raise ValueError("xs must be nn.Padded where shortcut is; got an array, whose sequences have no ends")
        (xs, lengths), (shortcut, also) = split(xs), split(shortcut)
        check_same("shortcut", also, lengths)
        neuron, params, inputs, out_dtype = self._assembled(values(xs), shortcut, lengths)
        if self.pack:
            neuron, out_dtype = Twice(neuron), (out_dtype, packed_for(self.neuron.neuron))
        options = dict(implementation=self.neuron.implementation, out_dtype=out_dtype, reuse_cotangents=True)
        params, state, inputs = differentiable(self.neuron.out_dtype, (params, state, inputs))
        outs, state = until_end(self.neuron.unroll, lengths)(neuron, params, state, inputs, **options)
        if self.pack:
            outs = Spikes(*outs, packed_for(self.neuron.neuron).lowest)
        return join(outs, lengths), state

    def explain(self, xs: Array, shortcut: Array | None = None) -> Explanation:
        """`snnfuse.explain` of a call; its `before` says what of the normalisations does not run in the kernel.

        `xs` and `shortcut` are arrays or their shapes. Nothing is computed.
        """
        found = []

        def call(layer, xs, shortcut):
            neuron, params, inputs, out_dtype = layer._assembled(xs, shortcut)
            options = dict(implementation=self.neuron.implementation, out_dtype=out_dtype)
            found.append(explain(neuron, params, None, inputs, **options))

        nnx.eval_shape(call, self, values(xs), values(shortcut))
        outside = []
        for name in ("norm", "shortcut_norm"):
            norm, kind = getattr(self, name), type(getattr(self, name)).__name__
            if isinstance(norm, nnx.LayerNorm | nnx.RMSNorm):
                outside.append(f"{name}: {kind} writes the normalised input; its scale and bias are in the kernel")
            elif norm is not None:
                outside.append(
                    f"{name}: {kind} " + ("reads statistics" if norm.fused else "writes the normalised input")
                )
        return replace(found[0], before=tuple(outside))

    def _assembled(self, xs, shortcut, lengths=None) -> tuple[Any, Any, Any, Any]:
        """(neuron, params, inputs, out_dtype) for the one call of `unroll` that computes the whole layer."""
        if shortcut is not None and values(shortcut).shape != xs.shape:
            raise ValueError(f"shortcut must have the shape of xs, {xs.shape}; got {values(shortcut).shape}")
        if shortcut is None and (self.shortcut_norm is not None or self.connect != "sum"):
            raise ValueError(
                "shortcut must be given, because this layer has a shortcut_norm or connect is not sum; got None"
            )
        inputs, scales, shifts = [], [], []
        for x, norm in ((xs, self.norm), (values(shortcut), self.shortcut_norm)):
            if x is None or (x is not xs and self.connect != "sum"):
                continue
            scale, shift = None, 0.0
            if isinstance(norm, nnx.LayerNorm | nnx.RMSNorm):
                x, scale, shift = rows.affine(norm, x)
            elif norm is not None and norm.fused:
                scale, shift = norm.affine(x, lengths)
            elif norm is not None:
                x = split(norm(join(x, lengths)))[0]
            inputs.append(x)
            scales.append(scale)
            shifts.append(shift)
        neuron = Affine(self.neuron.neuron)
        params = AffineParams(self.neuron.params, tuple(scales), sum(shifts))
        inputs = tuple(inputs)
        if self.drop_path is not None and not self.drop_path.deterministic:
            each = jnp.ones((xs.shape[1], *(1,) * (xs.ndim - 2)), jnp.float32)
            neuron, params = Gated(neuron), GatedParams(params, lax.stop_gradient(self.drop_path(each)))
        if self.connect != "sum":
            neuron, inputs = Connect(neuron, self.connect), (inputs, values(shortcut))
        return neuron, params, inputs, self.neuron.out_dtype or xs.dtype
