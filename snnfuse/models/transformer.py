"""Spikformer: a vision transformer. Its queries, keys and values are spikes, so attention needs no softmax."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from snnfuse import nn
from snnfuse.core.reset import HardReset
from snnfuse.core.surrogate import Sigmoid
from snnfuse.models.build import Build, check_option, rising
from snnfuse.models.resnet import Residual

PATCHES = (1, 2, 4, 8, 16)

# The neuron of Spikformer, SpikingJelly's LIFNode(tau=2.0, detach_reset=True): u = (v + x) / 2, a spike at u >= 1.
spikformer_lif = partial(nn.LIF, tau=2.0, decay_input=True, reset=HardReset(detach=True), surrogate=Sigmoid())


class SelfAttention(nn.Timeless):
    """Attention of spikes, without softmax: queries, keys and values [T, B, *tokens, 3 D] -> currents [T, B, *tokens, D].

        y = scale (q k^T) v = scale q (k^T v),   for each head, over all N tokens of a step

    The two orders cost N^2 D and N D^2 / heads; the layer takes the cheaper one. With inputs of 0 and 1 both are sums of
    integers, which are exact in float32; bfloat16 rounds those above 256. Called on `Spikes`, it stores their bits for the
    backward pass.
    """

    def __init__(self, heads: int, *, scale: float = 0.125, policy: nn.PrecisionPolicy | str = "float32"):
        self.heads, self.scale, self.policy = heads, scale, nn.PrecisionPolicy(policy)

    def __call__(self, xs: Array | nn.Spikes) -> Array:
        shape = nn.spikes.values(xs).shape
        if len(shape) < 4 or shape[-1] % (3 * self.heads):
            raise ValueError(f"xs must be [T, B, *tokens, 3 D], D a multiple of {self.heads} heads; got {shape}")
        if isinstance(xs, nn.Spikes):
            return jax.checkpoint(lambda xs: self._product(xs.from_bits().values))(xs)
        return self._product(xs)

    def _product(self, xs):
        T, B, *tokens, features = xs.shape
        dim = features // (3 * self.heads)
        q, k, v = jnp.moveaxis(xs.reshape(T, B, -1, 3, self.heads, dim).astype(self.policy.dtype), 3, 0)
        product = partial(jnp.einsum, precision=self.policy.lax)
        if q.shape[2] < dim:
            y = product("...nmh,...mhd->...nhd", product("...nhd,...mhd->...nmh", q, k), v)
        else:
            y = product("...nhc,...hcd->...nhd", q, product("...mhc,...mhd->...hcd", k, v))
        return (y * self.scale).reshape(T, B, *tokens, features // 3)


def spikformer(
    in_features: int,
    classes: int,
    *,
    depth: int = 4,
    width: int = 256,
    heads: int = 8,
    expand: int = 4,
    patch: int = 4,
    drop_path: float = 0.0,
    neuron: Callable[..., nn.Spiking] = spikformer_lif,
    policy: nn.PrecisionPolicy | str = "float32",
    memory: str = "packed",
    implementation: str | None = None,
    rngs: nnx.Rngs,
) -> nn.Sequential:
    """Spikformer, by default Spikformer-4-256: [T, B, H, W, in_features] -> [T, B, classes] in float32; classify by the mean over T.

        x = patches(image);   x = x + neuron(norm(conv(x)))
        x = x + neuron(norm(linear(neuron(attention(q, k, v)))));   q, k, v = neuron(norm(linear(x)))
        x = x + neuron(norm(linear(neuron(norm(linear(x))))))                                           `depth` times
        logits = linear(mean of x over tokens)

    Args:
      depth, width, heads: the number of encoder blocks, of features of a token, and of attention heads.
      expand: the hidden features of the MLP are expand * width.
      patch: the side of a token in pixels: 1, 2, 4, 8 or 16. Four 3 x 3 convolutions, of width / 8 to width, make the tokens;
        a 3 x 3 max-pool of stride 2 follows each of the last log2(patch) of them.
      drop_path: the rate of `nn.NormSpiking`'s drop_path in the last encoder block; it rises from 0 in the first one.
      neuron: makes a neuron, `neuron(implementation=...)`; attention uses `neuron(threshold=0.5, implementation=...)`.

    The other options are those of `snnfuse.models.build.Build`. x is a sum of spikes, so it holds small integers and is stored
    as numbers. Weights are drawn from a normal distribution of variance 4e-4, except those of the head. SpikingJelly's Spikformer
    is built alike, but pools before the neuron, not after it. Zhou et al. 2022, https://arxiv.org/abs/2209.15425.
    """
    check_option("patch", patch, PATCHES)
    if width % 8 or width % heads:
        raise ValueError(f"width must be a multiple of 8 and of heads = {heads}; got {width}")
    build = Build(neuron, policy, memory, implementation, rngs)
    normal = nnx.initializers.normal(0.02)
    conv = partial(build.conv, kernel_init=normal)
    linear = partial(build.linear, kernel_init=normal)

    def add(*main, drop_path=0.0):
        """x + neuron(norm(main(x)))"""
        return Residual(nn.Sequential(*main), build.spiking(width, connect="add", pack=False, drop_path=drop_path))

    def encoder(drop_path):
        attend = SelfAttention(heads, policy=policy)
        qkv = [linear(width, 3 * width), build.spiking(3 * width)]
        fire = build.neuron(threshold=0.5)
        attention = add(*qkv, attend, fire, *build.packed(), linear(width, width), drop_path=drop_path)
        mlp = [linear(width, expand * width), build.spiking(expand * width), linear(expand * width, width)]
        mlp = add(*mlp, drop_path=drop_path)
        return nn.Sequential(attention, mlp)

    layers, features, pools = [], in_features, patch.bit_length() - 1
    for i, out in enumerate((width // 8, width // 4, width // 2, width)):
        pool = i >= 4 - pools
        stage = nn.Sequential(
            conv(features, out, 3), build.spiking(out, pack=not pool), *([nn.max_pool] if pool else [])
        )
        layers += [build.block(stage), *build.packed()]
        features = out
    layers.append(build.block(add(conv(width, width, 3))))
    layers += [build.block(encoder(rate)) for rate in rising(drop_path, depth)]
    return nn.Sequential(*layers, nn.mean_pool, build.head(width, classes))
