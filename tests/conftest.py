import os
from importlib.metadata import version
from pathlib import Path

# On a CPU, compiling takes most of the tests' time. XLA compiles twice as fast without its optimisations, and before JAX 0.11
# again twice as fast or more without the fusion emitters. The flags must be set before JAX starts; child processes inherit them.
if os.environ.get("JAX_PLATFORMS") == "cpu":
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if version("jaxlib") < "0.11":
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    # All workers and child processes share compiled programs, and so does the next run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import faster  # noqa: F401
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
