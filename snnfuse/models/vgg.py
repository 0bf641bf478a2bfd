"""Spiking VGG: a plain stack of convolutions. Normalisation and neuron after each one run in one kernel."""

from collections.abc import Callable
from functools import partial

from flax import nnx

from snnfuse import nn
from snnfuse.models.build import Build, check_option

# widths of the 3 x 3 convolutions of each stage
STAGES = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
}

vgg_lif = partial(nn.LIF, tau=2.0)
half = partial(nn.max_pool, window=2, stride=2, padding=0)


def spiking_vgg(
    depth: int,
    in_features: int,
    classes: int,
    *,
    hidden: int = 4096,
    neuron: Callable[..., nn.Spiking] = vgg_lif,
    policy: nn.PrecisionPolicy | str = "float32",
    memory: str = "packed",
    implementation: str | None = None,
    rngs: nnx.Rngs,
) -> nn.Sequential:
    """Spiking VGG-11 or -16 with normalisation: [T, B, H, W, in_features] -> [T, B, classes] in float32; H, W are 32 or more.

    Eight or thirteen 3 x 3 convolutions, each with BatchNorm and neuron; a 2 x 2 max-pool after each of five stages; the mean over space; two
    dense layers of `hidden` features, each with BatchNorm and neuron; a dense layer. The other options are those of
    `snnfuse.models.build.Build`.

    VGG-11 differs from `spiking_vgg11_bn` of SpikingJelly in three ways. It takes the mean over space; SpikingJelly's pools to 7 x 7
    places. Its dense layers have BatchNorm in place of dropout; SpikingJelly's (weights of variance 1e-4) stay silent on small
    images. Its layers before a BatchNorm have no bias. Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556.
    """
    check_option("depth", depth, tuple(STAGES))
    build = Build(neuron, policy, memory, implementation, rngs)
    layers, features = [], in_features
    for widths in STAGES[depth]:
        stage = []
        for i, width in enumerate(widths, 1):
            stage += [build.conv(features, width, 3), build.spiking(width, pack=i < len(widths))]
            features = width
        layers += [build.block(nn.Sequential(*stage, half)), *build.packed()]
    layers.append(nn.mean_pool)
    for _ in range(2):
        layers += [build.linear(features, hidden), build.spiking(hidden)]
        features = hidden
    return nn.Sequential(*layers, build.head(features, classes))
