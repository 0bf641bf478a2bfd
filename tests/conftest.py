import gc
import os
from importlib.metadata import version

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
    # Writing and finding compiled programs takes as long as compiling these small ones.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "false"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads wait in a loop

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


def pytest_sessionfinish():
    """Pytest then searches for garbage five times. We search once, and what is alive then is not searched again."""
    gc.collect()
    gc.freeze()
