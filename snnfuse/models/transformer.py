"""Spikformer and QKFormer: vision transformers. Queries, keys and values are spikes, so attention needs no softmax."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from snnfuse import nn
from snnfuse.core.neuron import PyTree
from snnfuse.core.reset import HardReset
from snnfuse.core.surrogate import Sigmoid
from snnfuse.models.build import Build, check_option, rising, torch_uniform
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
        shape = nn.spikes.values(xs, "SelfAttention").shape
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


class TokenAttention(nn.Temporal):
    """Q-K token attention: queries decide which tokens pass. Queries and keys [T, B, *tokens, 2 D] -> spikes [T, B, *tokens, D].

        a = neuron(sum of q over the features of a head);   y = a k     a is one spike for each token and head

    The cost is linear in the number of tokens. Sums of spikes are exact: they are float32. Called on `Spikes`, the layer stores
    their bits for the backward pass.
    """

    def __init__(self, heads: int, neuron: nn.Spiking):
        self.heads, self.neuron = heads, neuron

    def init_state(self, xs: PyTree) -> PyTree:
        return self.neuron.init_state(jax.eval_shape(self._counts, nn.spikes.values(xs, "TokenAttention")))

    def __call__(self, xs: Array | nn.Spikes, state: PyTree | None = None) -> tuple[Array, PyTree]:
        attends, state = self.neuron(self._counts(nn.spikes.values(xs, "TokenAttention")), state)
        if isinstance(xs, nn.Spikes):
            return jax.checkpoint(lambda a, xs: self._masked(a, xs.from_bits().values))(attends, xs), state
        return self._masked(attends, xs), state

    def _counts(self, xs):
        if len(xs.shape) < 4 or xs.shape[-1] % (2 * self.heads):
            raise ValueError(f"xs must be [T, B, *tokens, 2 D], D a multiple of {self.heads} heads; got {xs.shape}")
        return self._halves(xs)[..., 0, :, :].sum(-1, dtype=jnp.float32)

    def _masked(self, attends, xs):
        keys = self._halves(xs)[..., 1, :, :]
        return (attends[..., None].astype(xs.dtype) * keys).reshape(*xs.shape[:-1], -1)

    def _halves(self, xs):
        """[..., 2, heads, features of a head]"""
        return xs.reshape(*xs.shape[:-1], 2, self.heads, -1)


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
    build = _Build(neuron, policy, memory, implementation, rngs, kernel_init=nnx.initializers.normal(0.02))
    layers, features, pools = [], in_features, patch.bit_length() - 1
    for i, out in enumerate((width // 8, width // 4, width // 2, width)):
        pool = i >= 4 - pools
        stage = build.layer(features, out, 3, pack=not pool)
        layers += [build.block(nn.Sequential(*stage, *([nn.max_pool] if pool else []))), *build.packed()]
        features = out
    layers.append(build.block(build.add(width, build.conv(width, width, 3))))
    layers += [build.block(build.encoder(width, heads, expand, rate)) for rate in rising(drop_path, depth)]
    return nn.Sequential(*layers, nn.mean_pool, build.head(width, classes))


def qkformer(
    in_features: int,
    classes: int,
    *,
    depth: int = 4,
    width: int = 384,
    heads: int = 8,
    expand: int = 4,
    drop_path: float = 0.0,
    neuron: Callable[..., nn.Spiking] = spikformer_lif,
    policy: nn.PrecisionPolicy | str = "float32",
    memory: str = "packed",
    implementation: str | None = None,
    rngs: nnx.Rngs,
) -> nn.Sequential:
    """QKFormer, by default HST-4-384, as on CIFAR: [T, B, H, W, in_features] -> [T, B, classes] in float32; classify by the mean over T.

        stage    tokens      features     encoder blocks
        1        H x W       width / 4    1, with `TokenAttention`
        2        H/2 x W/2   width / 2    1, with `TokenAttention`
        3        H/4 x W/4   width        depth - 2, with `SelfAttention`

    An encoder block is that of `spikformer`. Before each stage, tokens are made by two 3 x 3 convolutions beside a 1 x 1
    convolution, each with normalisation and neuron, and the two outputs are added. Before stages 2 and 3 a 3 x 3 max-pool of
    stride 2 follows the second of the two normalisations.

    Args:
      depth, width, heads: the number of encoder blocks, of features of a token in the last stage, and of attention heads.
      expand: the hidden features of an MLP are `expand` times those of a token.
      drop_path, neuron: see `spikformer`.

    The other options are those of `snnfuse.models.build.Build`. The authors' layers before a normalisation have biases, which the
    normalisation cancels; these have none. Weights are drawn as PyTorch draws them. Zhou et al. 2024,
    https://arxiv.org/abs/2403.16552.
    """
    if depth < 3:
        raise ValueError(f"depth must be at least 3, one encoder block for each stage; got {depth}")
    if width % 8 or width // 4 % heads:
        raise ValueError(f"width must be a multiple of 8, and width / 4 one of heads = {heads}; got {width}")
    build = _Build(neuron, policy, memory, implementation, rngs, kernel_init=torch_uniform)

    def down(features):
        """The next stage's tokens: half as many along each side, of twice as many features."""
        wide = 2 * features
        pooled = [build.conv(wide, wide, 3), build.norm(wide), nn.max_pool, build.neuron()]
        main = nn.Sequential(*build.layer(features, wide, 3), *pooled)
        return build.add(wide, build.conv(features, wide, 1, stride=2), beside=main)

    first, second, third = width // 4, width // 2, width
    beside = nn.Sequential(*build.layer(width // 8, first, 1, pack=False))
    tokens = build.add(first, build.conv(width // 8, first, 3), beside=beside)
    rates = iter(rising(drop_path, depth))
    encode = lambda features, **options: build.encoder(features, heads, expand, next(rates), **options)
    blocks = [nn.Sequential(*build.layer(in_features, width // 8, 3), tokens), encode(first, tokens_alone=True)]
    blocks += [down(first), encode(second, tokens_alone=True)]
    blocks += [down(second), *(encode(third) for _ in range(depth - 2))]
    return nn.Sequential(*map(build.block, blocks), nn.mean_pool, build.head(width, classes))


class _Build(Build):
    """`Build` with the blocks of transformers."""

    def __init__(self, *options, kernel_init):
        super().__init__(*options)
        self.conv = partial(self.conv, kernel_init=kernel_init)
        self.linear = partial(self.linear, kernel_init=kernel_init)

    def layer(self, features, width, size, *, pack=True):
        return self.conv(features, width, size), self.spiking(width, pack=pack)

    def add(self, width, *main, beside=None, drop_path=0.0):
        """x + neuron(norm(main(x))), or beside(x) in place of x"""
        join = self.spiking(width, connect="add", pack=False, drop_path=drop_path)
        return Residual(nn.Sequential(*main), join, beside)

    def encoder(self, width, heads, expand, drop_path, *, tokens_alone=False):
        """Attention, then an MLP, each beside a shortcut."""
        fire = self.neuron(threshold=0.5)
        if tokens_alone:
            parts, attend = 2, [TokenAttention(heads, fire)]
        else:
            parts, attend = 3, [SelfAttention(heads, policy=self.policy), fire]
        queries = [self.linear(width, parts * width), self.spiking(parts * width)]
        pack = self.packed(2 if tokens_alone else 1)  # token attention multiplies two spikes
        attention = [*queries, *attend, *pack, self.linear(width, width)]
        mlp = [self.linear(width, expand * width), self.spiking(expand * width), self.linear(expand * width, width)]
        return nn.Sequential(*(self.add(width, *main, drop_path=drop_path) for main in (attention, mlp)))
