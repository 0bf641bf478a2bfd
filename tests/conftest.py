import gc
import itertools
import os
from functools import lru_cache
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

import jax
import pytest
from jax._src.interpreters import mlir

# Tracing makes many small objects that live long. Python would search them for garbage every 700 objects: a quarter of the time.
gc.set_threshold(500_000)

# JAX makes a new MLIR context for each program. That takes a quarter of the time of a small program, so 100 programs share one.
# A program that is lowered while another one is being lowered gets its own.
make_context, programs = mlir.make_ir_context, itertools.count()
shared_context = lru_cache(1)(lambda hundred: make_context())
mlir.make_ir_context = lambda: make_context() if mlir.ir.Context.current else shared_context(next(programs) // 100)


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
