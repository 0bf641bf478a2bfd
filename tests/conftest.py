import jax
import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped, with the reason, on a machine without one")


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU; JAX runs on {jax.default_backend()}"))


@pytest.fixture
def strict():
    """JAX refuses rank and dtype promotion. core, ops and nn must work without either."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
