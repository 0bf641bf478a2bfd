"""Spiking residual networks. Normalisation, residual and neuron of a block run in one kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from snnfuse import nn
from snnfuse.core.neuron import PyTree
from snnfuse.core.reset import HardReset
from snnfuse.core.surrogate import Rectangle
from snnfuse.models.build import Build, check_option, rising

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
        fusion paper (https://arxiv.org/abs/2408.00280). "add", "and" or "iand": see `sew_resnet`.
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
    build = _Build(neuron, policy, memory, implementation, rngs, connect=connect)
    counts = DEPTHS[depth]
    widths = WIDTHS[-len(counts) :]
    width = widths[0]
    if stem == "imagenet":
        first = nn.Sequential(*build.layer(in_features, width, 7, stride=2, pack=False), nn.max_pool)
    else:
        first = nn.Sequential(*build.layer(in_features, width, 3, pack=False))
    blocks, rates = [first], iter(rising(drop_path, sum(counts)))
    for stage, (count, middle) in enumerate(zip(counts, widths, strict=True)):
        for i in range(count):
            stride = 2 if stage and i == 0 else 1
            block = build.bottleneck if depth >= 50 else build.basic
            blocks.append(block(width, middle, stride, next(rates)))
            width = middle * (4 if depth >= 50 else 1)
    first, *others = map(build.block, blocks)
    hidden = []
    if depth == 19:
        width, features = width // 2, width
        hidden = [build.linear(features, width), build.spiking(width)]
    return nn.Sequential(first, *build.packed(), *others, nn.mean_pool, *hidden, build.head(width, classes))


def sew_resnet(depth: int, in_features: int, classes: int, *, connect: str = "add", **options: Any) -> nn.Sequential:
    """SEW-ResNet-18, -19, -34 or -50: `connect` "add", "and" or "iand" combines the shortcut with the spikes of a block.

    The neurons are integrate-and-fire with a detached reset, unless `neuron` is given. The options are those of
    `spiking_resnet`. Fang et al. 2021, https://arxiv.org/abs/2102.04159.
    """
    if connect == "sum":
        raise ValueError("connect must be add, and or iand; got 'sum', for which use spiking_resnet")
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
        main = [*self.layer(features, width, 3, stride=stride), self.conv(width, width, 3)]
        return self._block(main, features, width, stride, drop_path)

    def bottleneck(self, features, middle, stride, drop_path):
        main = [*self.layer(features, middle, 1), *self.layer(middle, middle, 3, stride=stride)]
        return self._block([*main, self.conv(middle, 4 * middle, 1)], features, 4 * middle, stride, drop_path)

    def _block(self, main, features, width, stride, drop_path):
        beside = shortcut_norm = None
        if stride != 1 or features != width:
            if self.connect == "sum":
                beside = nn.Sequential(self.conv(features, width, 1, stride=stride))
                shortcut_norm = self.norm(width)
            else:
                beside = nn.Sequential(*self.layer(features, width, 1, stride=stride, pack=False))
        # "add" makes sums, which are not bits
        options = dict(shortcut_norm=shortcut_norm, connect=self.connect, drop_path=drop_path)
        join = self.spiking(width, pack=self.connect != "add", **options)
        return Residual(nn.Sequential(*main), join, beside)
