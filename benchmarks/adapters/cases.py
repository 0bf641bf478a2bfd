"""The cases, their tensors by numpy, and the neurons of ours that they are compared with."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Case:
    """`shape` is [T, N] of a LIF layer alone, [T, B, n] of a linear layer and LIF, [T, B, in, hidden, out] of `shd`."""

    name: str
    kind: str
    shape: tuple[int, ...]


CASES = {
    case.name: case
    for case in (
        Case("lif_T32_N1048576", "lif", (32, 2**20)),
        Case("lif_T256_N131072", "lif", (256, 2**17)),
        Case("lif_T500_N8192", "lif", (500, 2**13)),
        Case("open_neuromorphic_n512", "linear", (500, 16, 512)),
        Case("open_neuromorphic_n4096", "linear", (500, 16, 4096)),
        Case("open_neuromorphic_n16384", "linear", (500, 16, 16384)),
        Case("shd", "shd", (256, 256, 700, 128, 20)),
        Case("resnet18_28", "resnet", (32, 100, 28)),
    )
}
TINY = {"lif": (6, 256), "linear": (5, 2, 32), "shd": (6, 4, 700, 16, 20), "resnet": (2, 2, 16)}

# Of the spikes, how many may differ: none but by the rounding of a decay; with products in TF32, a few near the threshold.
FLIPS = {"lif": 1e-5, "linear": 1e-2, "shd": 1e-2}
LOSS_ERROR = 1e-2
GRADIENT_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}


def find(name, tiny=False):
    case = CASES[name]
    return replace(case, shape=TINY[case.kind]) if tiny else case


@cache
def _draws(seed):
    return np.random.default_rng(seed).standard_normal(4_194_301, np.float32)


def normal(seed, *shape):
    """Normal numbers of period 4,194,301, a prime: 2^28 of them in tenths of a second."""
    return np.resize(_draws(seed), shape)


def lif_tensors(case):
    """x and the cotangent of the spikes."""
    return normal(0, *case.shape) + np.float32(0.3), normal(1, *case.shape)


def linear_tensors(case):
    """x, the weight and the cotangent of the spikes."""
    T, B, n = case.shape
    return normal(0, T, B, n), normal(2, n, n) * np.float32(n**-0.5), normal(1, T, B, n)


def shd_tensors(case):
    """Random input of rate 0.03, labels, and the two weights: currents of about one."""
    T, B, features, hidden, classes = case.shape
    rng = np.random.default_rng(0)
    xs = (rng.random((T, B, features), np.float32) < 0.03).astype(np.float32)
    labels = rng.integers(0, classes, B)
    return xs, labels, normal(2, features, hidden) * np.float32(0.2), normal(3, hidden, classes) * np.float32(0.1)


def compare(case, dtype, spikes, gradient, reference, loss=None):
    """What a row says of the spikes and of the gradient or the loss, where given; `status` if they are not the reference's."""
    want = np.unpackbits(reference["spikes"], count=spikes.size).reshape(spikes.shape).astype(bool)
    differ = spikes != want
    row = dict(flips=int(differ.sum()), slots=spikes.size, firing_rate=float(want.mean()))
    if row["flips"] > FLIPS[case.kind] * spikes.size:
        return row | dict(status=f"wrong: {row['flips']} of {spikes.size} spikes differ")
    if case.kind == "lif":
        same = ~differ.any(0)[:: stride(case)]
        got, wanted = gradient[:, :: stride(case)][:, same], reference["gradient"][:, same]
        row["gradient_error"] = error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        if not error < GRADIENT_ERROR[dtype]:
            return row | dict(status=f"wrong: gradient error {error:.2g}")
    if loss is not None:
        row["loss"] = float(loss)
        if not abs(row["loss"] / reference["loss"] - 1) < LOSS_ERROR:
            return row | dict(status=f"wrong: a loss of {row['loss']:.4g}, not {reference['loss']:.4g}")
    return row


def stride(case):
    """Gradients are compared in one lane in so many."""
    return max(1, case.shape[-1] // 2**16)
