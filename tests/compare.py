"""Compare results: spikes must be equal, and the largest error of a number must be small beside the largest reference value."""

import jax
import numpy as np


def assert_close(got, want, rtol):
    """Every leaf: max |got - want| <= rtol max |want|, naming the leaf and the worst index."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{jax.tree_util.keystr(path)}: {a.dtype}{a.shape}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, scale = np.abs(a - b), np.abs(b).max()
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        assert error[worst] <= rtol * scale, (
            f"{jax.tree_util.keystr(path)} at {tuple(map(int, worst))}: got {a[worst]}, want {b[worst]}, "
            f"error {error[worst]:.3g} of scale {scale:.3g}, allowed {rtol * scale:.3g}"
        )


def assert_same_spikes(got, want):
    differ = np.flatnonzero(np.asarray(got, np.float32) != np.asarray(want, np.float32))
    assert differ.size == 0, f"{differ.size} of {np.size(want)} spikes differ, the first at flat index {differ[0]}"


def assert_fires(spikes, low=0.02, high=0.4):
    rate = float(np.asarray(spikes, np.float32).mean())
    assert low < rate < high, f"the reference fires at {rate:.3f}: a silent or saturated neuron tests nothing"
