"""Weights and inputs of the golden Spiking-ResNet-18, from numpy alone: PyTorch (make_spiking_resnet.py) and JAX take the same.

Every array has a generator of its own, seeded by the CRC-32 of its name.
"""

import zlib

import numpy as np

T, B, SIZE, RATE = 4, 2, 32, 0.5
SEED = 1002  # the first with every membrane 1e-5 or more from a threshold: see make_spiking_resnet.py
WIDTHS = (64, 128, 256, 512)


def shapes(cin=3, classes=10, layers=(2, 2, 2, 2)):
    """Shapes of the parameters by torchvision's names, convolutions as OIHW."""
    convs = {"conv1": (WIDTHS[0], cin, 7, 7)}
    n = WIDTHS[0]
    for i, (m, blocks) in enumerate(zip(WIDTHS, layers, strict=True), start=1):
        for j in range(blocks):
            convs[f"layer{i}.{j}.conv1"] = (m, n, 3, 3)
            convs[f"layer{i}.{j}.conv2"] = (m, m, 3, 3)
            if n != m:
                convs[f"layer{i}.{j}.downsample.0"] = (m, n, 1, 1)
            n = m
    out = {"fc.weight": (classes, n), "fc.bias": (classes,)}
    for name, shape in convs.items():
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        out[f"{name}.weight"] = shape
        out |= {f"{norm}.{leaf}": shape[:1] for leaf in ("weight", "bias", "running_mean", "running_var")}
    return dict(sorted(out.items()))


def state_dict(cin=3, classes=10, layers=(2, 2, 2, 2)):
    """float32 arrays by torchvision's names: all of its state_dict but num_batches_tracked."""
    return {name: _leaf(name, shape) for name, shape in shapes(cin, classes, layers).items()}


def _leaf(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_mean"):
        a = rng.standard_normal(shape) * 0.1
    elif name.endswith("running_var"):
        a = rng.uniform(0.1, 0.3, shape)
    elif name.startswith("fc"):
        a = rng.uniform(-1, 1, shape) / np.sqrt(WIDTHS[-1])
    elif len(shape) == 4:
        fan_out = shape[0] * shape[2] * shape[3]
        a = rng.standard_normal(shape) * np.sqrt(2 / fan_out)
    elif name.endswith("weight"):
        a = rng.uniform(0.5, 1.5, shape)
    else:
        a = rng.standard_normal(shape) * 0.1 - 0.3
    return a.astype(np.float32)


def inputs(seed=SEED):
    """Spikes as uint8 [T, B, 3, SIZE, SIZE], and a cotangent of the logits [B, 10]."""
    rng = np.random.default_rng(seed)
    x = rng.random((T, B, 3, SIZE, SIZE)) < RATE
    return x.astype(np.uint8), rng.standard_normal((B, 10)).astype(np.float32)


def probe(name, gradient):
    """A random projection of a gradient, laid out as PyTorch has it."""
    rng = np.random.default_rng(zlib.crc32(f"probe{name}".encode()))
    return rng.standard_normal(gradient.size) @ np.asarray(gradient, np.float64).ravel()
