"""Spiking residual networks. Normalisation, residual and neuron of a block run in one kernel."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from flax import nnx

from snnfuse import nn
from snnfuse.core.compose import CONNECTIONS
from snnfuse.core.neuron import PyTree
from snnfuse.core.reset import HardReset
from snnfuse.core.surrogate import Rectangle
from snnfuse.models.build import Build, check_option, rising
from snnfuse.nn.padded import join, split

DEPTHS = {18: (2, 2, 2, 2), 19: (3, 3, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)  # ResNet-19 has the last three
STEMS = ("imagenet", "cifar")

# The neuron of the temporal fusion paper: u = 0.2 v + x, a spike at u >= 0.3, then v = 0; rectangular surrogate of width 1.
paper_lif = partial(nn.LIF, decay=0.2, threshold=0.3, surrogate=Rectangle())


class Residual(nn.Temporal):
    """`join(main(xs), shortcut(xs))`; without a shortcut layer, xs itself is the shortcut."""

    def __init__(self, main: nn.Sequential, join: nn.NormSpiking, shortcut: nn.Sequential | None = None):
        self.main, self.join, self.shortcut = main, join, shortcut

    def init_state(self, xs: PyTree) -> tuple:
        shortcut = None if self.shortcut is None else self.shortcut.init_state(xs)
        inner, _ = nnx.eval_shape(lambda main, xs: main(xs), self.main, xs)
        return self.main.init_state(xs), shortcut, self.join.init_state(inner)

    def __call__(self, xs: PyTree, state: tuple | None = None) -> tuple[PyTree, tuple]:
        main, shortcut, join = (None,) * 3 if state is None else state
        inner, main = self.main(xs, main)
        beside, shortcut = (xs, shortcut) if self.shortcut is None else self.shortcut(xs, shortcut)
        outs, join = self.join(inner, join, beside)
        return outs, (main, shortcut, join)


class MembraneResidual(nn.Temporal):
    """`main(s) + shortcut(s)` with s = first(xs), the spikes that the currents xs cause; without a shortcut layer `main(s) + xs`."""

    def __init__(self, first: nn.NormSpiking, main: nn.Sequential, shortcut: nn.Conv | None = None):
        self.first, self.main, self.shortcut = first, main, shortcut

    def init_state(self, xs: PyTree) -> tuple:
        spikes, _ = nnx.eval_shape(lambda first, xs: first(xs), self.first, xs)
        return self.first.init_state(xs), self.main.init_state(spikes)

    def __call__(self, xs: PyTree, state: tuple | None = None) -> tuple[PyTree, tuple]:
        first, main = (None,) * 2 if state is None else state
        spikes, first = self.first(xs, first)
        inner, main = self.main(spikes, main)
        (inner, lengths), (spikes, _), (xs, _) = map(split, (inner, spikes, xs))
        return join(inner + (xs if self.shortcut is None else self.shortcut(spikes)), lengths), (first, main)


def spiking_resnet(
    depth: int,
    in_features: int,
    classes: int,
    *,
    connect: str = "sum",
    neuron: Callable[..., nn.Spiking] = paper_lif,
    stem: str = "imagenet",
    drop_path: float = 0.0,
    policy: nn.PrecisionPolicy | str = "float32",
    memory: str = "packed",
    implementation: str | None = None,
    rngs: nnx.Rngs,
) -> nn.Sequential:
    """Spiking-ResNet-18, -19, -34 or -50: [T, B, H, W, in_features] -> [T, B, classes] in float32.

    The paper classifies by the mean of the outputs over T, `nn.membrane_mean`.

    Args:
      connect: "sum" adds the shortcut to the input current of the block's last neuron: Spiking-ResNet, as in the temporal
        fusion paper (https://arxiv.org/abs/2408.00280). "membrane" adds the input currents of neurons, which pass from block to block
        with nothing done to them: a block is neuron, convolution, neuron, convolution, each neuron behind its normalisation, and its
        last currents are added to its first ones. Hu et al. 2021, https://arxiv.org/abs/2112.08954, with normalisations where He et
        al. 2016, https://arxiv.org/abs/1603.05027, have them. "add", "and" or "iand": see `sew_resnet`.
      neuron: makes a neuron, `neuron(implementation=...)`.
      stem: "imagenet", 7 x 7 of stride 2 and a max-pool, or "cifar", 3 x 3.
      drop_path: the rate of `nn.NormSpiking`'s drop_path in the last block; it rises from 0 in the first one. With "add" only.
      policy, memory, implementation: see `snnfuse.models.build.Build`.

    ResNet-19 is the one of spiking networks on CIFAR: three stages of 128, 256 and 512 channels, and before the last layer a
    dense layer of 256 neurons. Zheng et al. 2021, https://arxiv.org/abs/2011.05280.

    Layers are initialised as in torchvision and SpikingJelly. The last maps are 1 x 1 if images are smaller than 32 x 32.
    """
    check_option("depth", depth, tuple(DEPTHS))
    check_option("stem", stem, STEMS)
    check_option("connect", connect, ("sum", "membrane", *CONNECTIONS))
    build = _Build(neuron, policy, memory, implementation, rngs, connect=connect)
    counts = DEPTHS[depth]
    widths = WIDTHS[-len(counts) :]
    width = widths[0]
    layers = (
        partial(build.layer, pack=False)
        if connect != "membrane"
        else lambda *args, **kwargs: [build.conv(*args, **kwargs)]
    )
    if stem == "imagenet":
        first = nn.Sequential(*layers(in_features, width, 7, stride=2), nn.max_pool)
    else:
        first = nn.Sequential(*layers(in_features, width, 3))
    blocks, rates = [first], iter(rising(drop_path, sum(counts)))
    for stage, (count, middle) in enumerate(zip(counts, widths, strict=True)):
        for i in range(count):
            stride = 2 if stage and i == 0 else 1
            block = build.bottleneck if depth >= 50 else build.basic
            blocks.append(block(width, middle, stride, next(rates)))
            width = middle * (4 if depth >= 50 else 1)
    first, *others = map(build.block, blocks)
    if connect == "membrane":
        others.append(build.spiking(width))
    else:
        others = build.packed() + others
    hidden = []
    if depth == 19:
        width, features = width // 2, width
        hidden = [build.linear(features, width), build.spiking(width)]
    return nn.Sequential(first, *others, nn.mean_pool, *hidden, build.head(width, classes))


def sew_resnet(depth: int, in_features: int, classes: int, *, connect: str = "add", **options: Any) -> nn.Sequential:
    """SEW-ResNet-18, -19, -34 or -50: `connect` "add", "and" or "iand" combines the shortcut with the spikes of a block.

    The neurons are integrate-and-fire with a detached reset, unless `neuron` is given. The options are those of
    `spiking_resnet`. Fang et al. 2021, https://arxiv.org/abs/2102.04159.
    """
    if connect in ("sum", "membrane"):
        raise ValueError(f"connect must be add, and or iand; got {connect!r}, for which use spiking_resnet")
    options = {"neuron": partial(nn.IF, reset=HardReset(detach=True))} | options
    return spiking_resnet(depth, in_features, classes, connect=connect, **options)


class _Build(Build):
    """`Build` with residual blocks."""

    def __init__(self, *options, connect):
        super().__init__(*options)
        self.connect = connect

    def layer(self, features, width, size, *, stride=1, pack=True):
        return self.conv(features, width, size, stride=stride), self.spiking(width, pack=pack)

    def basic(self, features, width, stride, drop_path):
        return self._block([(width, 3, stride), (width, 3, 1)], features, drop_path)

    def bottleneck(self, features, middle, stride, drop_path):
        return self._block([(middle, 1, 1), (middle, 3, stride), (4 * middle, 1, 1)], features, drop_path)

    def _block(self, convolutions, features, drop_path):
        """A block of (features, size, stride) of each convolution."""
        strides, width = prod(stride for *_, stride in convolutions), convolutions[-1][0]
        main, inputs = [], features
        for outs, size, stride in convolutions:
            main += [*([self.spiking(inputs)] if main else []), self.conv(inputs, outs, size, stride=stride)]
            inputs = outs
        main, changes = nn.Sequential(*main), strides != 1 or features != width
        if self.connect == "membrane":
            if drop_path:
                raise ValueError(f"drop_path goes with connect='add'; got connect={self.connect!r}")
            beside = self.conv(features, width, 1, stride=strides) if changes else None
            return MembraneResidual(self.spiking(features), main, beside)
        beside = shortcut_norm = None
        if changes and self.connect == "sum":
            beside = nn.Sequential(self.conv(features, width, 1, stride=strides))
            shortcut_norm = self.norm(width)
        elif changes:
            beside = nn.Sequential(*self.layer(features, width, 1, stride=strides, pack=False))
        # "add" makes sums, which are not bits
        options = dict(shortcut_norm=shortcut_norm, connect=self.connect, drop_path=drop_path)
        return Residual(main, self.spiking(width, pack=self.connect != "add", **options), beside)
