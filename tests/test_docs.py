"""The documentation agrees with the code: its code blocks run, its tables are complete, and it has every public name."""

import base64
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import snnfuse

PAGES = Path(__file__).parents[1] / "notebooks" / "docs" / "pages"
RUN = sorted(path for path in PAGES.rglob("*.md") if "```python" in path.read_text())
PARTS = (
    "snnfuse",
    "snnfuse.nn",
    "snnfuse.models",
    "snnfuse.interop.nir",
    "snnfuse.online",
    "snnfuse.parallel",
    "snnfuse.training",
)


def run(path):
    """The page's code, from top to bottom in one namespace."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(block, path.name, "exec"), names)
    return names


def test_the_picture_of_the_first_page_is_that_of_the_notebook():
    outputs = [
        o
        for c in json.loads((PAGES.parents[1] / "quickstart.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
    ]
    pictures = [base64.b64decode("".join(o["data"]["image/png"])) for o in outputs if "image/png" in o.get("data", {})]
    assert (PAGES / "assets" / "quickstart.png").read_bytes() in pictures


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(path):
    assert run(path)


def test_the_names_for_those_of_others_are_ours():
    path = PAGES / "how_to" / "from_others.md"
    xs = jax.random.bernoulli(jax.random.key(0), 0.5, (4, 2, 3)).astype(jnp.float32)
    names = run(path)
    nn, nnx, viz = names["nn"], names["nnx"], pytest.importorskip("snnfuse.viz")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    model = nn.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0))
    names |= dict(xs=xs, images=xs[0], model=model, spikes=xs, outs=xs, labels=jnp.zeros(2), viz=viz)
    rows = re.findall(r"^\| .* \| (.*) \|$", path.read_text(), re.M)
    codes = [code for row in rows for code in re.findall(r"`(.*?)`", row)]
    for code in codes:
        eval(code, names)
    assert len(codes) > 50
    plt.close("all")


@pytest.mark.parametrize("part", PARTS)
def test_the_reference_has_every_public_name(part):
    module = importlib.import_module(part)
    page = (PAGES / "reference" / f"{part.split('.')[-1]}.md").read_text()
    missing = [name for name in module.__all__ if not re.search(rf"(::: {part}[\w.]*\.|`){name}\b", page)]
    assert missing == []
    for name in re.findall(r"^::: (\S+)", page, re.M):
        try:
            importlib.import_module(name)
        except ImportError:
            owner, _, short = name.rpartition(".")
            assert hasattr(importlib.import_module(owner), short), name


def test_the_table_of_fields_is_that_of_the_code():
    page = (PAGES / "reference" / "snnfuse.md").read_text()
    for name in snnfuse.__all__:
        if fields := getattr(getattr(snnfuse, name), "_fields", None):
            defaults = getattr(snnfuse, name)._field_defaults
            said = ", ".join(f"`{f}`" + (f" = {defaults[f]:g}" if f in defaults else "") for f in fields)
            assert f"| `{name}` | {said} |" in page
