"""Imports point inward only, the library needs only jax, flax and optax, and every public name is documented."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import snnfuse
import snnfuse.interop.nir
import snnfuse.nn
import snnfuse.online
import snnfuse.training

ROOT = Path(snnfuse.__file__).parents[1]
SEEN_BY = {  # the parts of snnfuse, each with those it may import; "" is snnfuse/__init__.py
    "core": {"core"},
    "ops": {"core", "ops"},
    "nn": {"core", "ops", "nn"},
    "models": {"core", "ops", "nn", "models"},
    "": {"core", "ops"},
}
INSIDE = set(SEEN_BY)
# they may import the inside; the inside may not import them
OUTSIDE = {"data", "online", "parallel", "training", "interop", "papers", "viz"}
SEEN_OUTSIDE = {"viz": {"data"}, "training": {"parallel"}}  # the other outside parts that each may import
LAZY = {"viz": "matplotlib", "interop": "nir"}  # imported in functions only
NEEDED = {
    "core": {"jax", "numpy"},
    "ops": {"jax", "numpy"},
    "": set(),
}  # at the top of a module; nn, models: also flax, optax
NOT_LIBRARY = {"experiments", "benchmarks", "tests", "notebooks"}


def imports(path, root=ROOT):
    """(module, line, whether at the top level) of all imports of a file, including calls of importlib with a name."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(root).parent.parts
    top = {id(node) for statement in tree.body for node in _at_top(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in top


def _at_top(node):
    """The nodes that run on import: not the bodies of functions."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _at_top(child)


def part_of(path, root=ROOT):
    parts = path.relative_to(root / "snnfuse").with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def violations(root):
    """Every import of snnfuse under `root` that does not point inward, as 'file:line imports module'."""
    for path in sorted((root / "snnfuse").rglob("*.py")):
        part = part_of(path, root)
        assert part in INSIDE | OUTSIDE, f"{path}: a part of snnfuse that the layout does not know, {part!r}"
        may_see = SEEN_BY.get(part, INSIDE - {""} | {part} | SEEN_OUTSIDE.get(part, set()))
        for module, line, at_top in imports(path, root):
            package, *rest = module.split(".")
            bad = package in NOT_LIBRARY
            if package == "snnfuse":
                target = rest[0] if rest and rest[0] in INSIDE | OUTSIDE else ""
                bad |= target not in may_see and not (target == "" and part in OUTSIDE)
            elif part in INSIDE and at_top and package not in sys.stdlib_module_names:
                bad |= package not in NEEDED.get(part, {"jax", "numpy", "flax", "optax"})
            bad |= at_top and package == LAZY.get(part)
            if bad:
                yield f"{path.relative_to(root)}:{line} imports {module}"


def test_imports_point_inward():
    assert list(violations(ROOT)) == []
    assert len(list(imports(ROOT / "snnfuse" / "__init__.py"))) > 10, "no imports found: nothing was tested"


PLANTED = {
    "core/a.py": "from snnfuse.ops.api import unroll",
    "core/b.py": "import flax",
    "core/c.py": "def f():\n    from snnfuse import unroll",
    "ops/d.py": "from snnfuse import nn",
    "ops/e.py": "try:\n    import jax_triton\nexcept ImportError:\n    pass",
    "nn/f.py": "from .. import data",
    "nn/g.py": "import snnfuse.parallel.mesh as mesh",
    "models/h.py": "import importlib\nimportlib.import_module('snnfuse.interop')",
    "data/i.py": "from snnfuse.parallel import mesh",
    "viz/j.py": "from experiments import report",
    "viz/o.py": "import matplotlib.pyplot",
    "interop/p.py": "import nir",
    "interop/q.py": "from snnfuse.data import events",
    "training/u.py": "from snnfuse.data import loader",
    "parallel/v.py": "from snnfuse import training",
    "nn/r.py": "from snnfuse.interop import nir",
    "__init__.py": "from snnfuse.nn import LIF",
}
ALLOWED = {
    "core/k.py": "import math\nfrom functools import partial\nfrom jax import numpy\nfrom snnfuse.core.neuron import Neuron",
    "ops/l.py": "from snnfuse.core import neuron\nfrom . import scan\ndef f():\n    import jax_triton",
    "nn/m.py": "from flax import nnx\nfrom ..ops.api import unroll",
    "viz/s.py": "from snnfuse.data.show import strip\ndef f():\n    import matplotlib",
    "interop/t.py": "from snnfuse import nn\ndef f():\n    import nir",
    "training/w.py": "from snnfuse import nn, parallel",
    "data/n.py": "import grain\nimport snnfuse\nfrom snnfuse.data import encoders\nfrom snnfuse import nn",
}


def test_planted_violations_are_found(tmp_path):
    for name, code in (PLANTED | ALLOWED).items():
        path = tmp_path / "snnfuse" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code + "\n")
    assert {v.split(":")[0].removeprefix("snnfuse/") for v in violations(tmp_path)} == set(PLANTED)


@pytest.mark.parametrize("folder", sorted(NOT_LIBRARY - {"tests"}))
def test_nobody_imports_what_uses_the_library(folder):
    """Experiments and notebooks may import the library and their own files, benchmarks also the experiments; tests all of them."""
    names = lambda where: (
        {path.stem for path in (ROOT / where).glob("*.py")}
        | {path.parent.name for path in (ROOT / where).glob("*/__init__.py")}
    )
    mine = {folder, "experiments"} if folder == "benchmarks" else {folder}
    files, own = (set().union(*map(names, some)) for some in (NOT_LIBRARY - mine, mine))
    bad = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module, line, _ in imports(path)
        if (name := module.split(".")[0]) in NOT_LIBRARY - {folder}
        or (name in files - own and name not in sys.stdlib_module_names)
    ]
    assert bad == []


WITHOUT = "orbax matplotlib tensorboardX tqdm mlxtend grain tensorflow_datasets tensorflow tonic torch jax_triton triton nir h5py"
REFUSING = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
try:
    import orbax
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the hook refuses nothing")
import jax.numpy as jnp
import snnfuse, snnfuse.nn, snnfuse.data, snnfuse.online, snnfuse.parallel, snnfuse.training, snnfuse.nn.monitor, snnfuse.viz, snnfuse.interop.nir
for call in (lambda: snnfuse.viz.raster([[1]]), lambda: snnfuse.interop.nir.from_nir("x.nir", snnfuse.interop.nir.NIR)):
    try:
        call()
    except ImportError as error:
        assert 'pip install "snnfuse[' in str(error), error
    else:
        raise AssertionError("ran without its package")
spikes, state = snnfuse.nn.LIF(tau=2.0)(jnp.full((4, 2, 3), 0.7))
assert 0 < spikes.mean() < 1, spikes
"""


def test_imports_and_runs_with_jax_flax_and_optax_alone():
    """A hook refuses every import of an optional package, as on a machine that has none of them."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}  # JAX's cache may import tensorflow
    command = [sys.executable, "-W", "error", "-c", REFUSING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


PUBLIC = {
    f"{m.__name__}.{name}": getattr(m, name)
    for m in (snnfuse, snnfuse.nn, snnfuse.online, snnfuse.training, snnfuse.interop.nir)
    for name in m.__all__
}


def test_public_names_are_documented():
    """Each has a docstring; a Params or State has none, but the docstring of its neuron names every field."""
    bad = []
    for name, thing in PUBLIC.items():
        doc, short = inspect.getdoc(thing) or "", name.split(".")[-1]
        fields = getattr(thing, "_fields", None)
        neuron = re.sub("(Params|State)$", "", short)
        if fields and neuron != short and hasattr(snnfuse, neuron):
            neuron_doc = inspect.getdoc(getattr(snnfuse, neuron))
            missing = [f for f in fields if not re.search(rf"\b{f}\b", neuron_doc)]
            bad += [f"{neuron} does not say what {short}.{f} is" for f in missing]
        elif not hasattr(thing, "__doc__") or len(doc) < 5 or doc.startswith(f"{short}("):
            bad.append(f"{name} has no docstring: {doc!r}")
    assert bad == []
    assert len(PUBLIC) > 50 and not any(isinstance(thing, ModuleType) for thing in PUBLIC.values())
