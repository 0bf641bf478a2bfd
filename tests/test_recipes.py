"""The recipes of CONTRIBUTING.md work: each block runs as if it were appended to the file that its first line names."""

import importlib
import pathlib
import re
import sys
import types

import pytest
import test_core
import test_nn_inspect
from test_ops_contract import CASES, check

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.M))


@pytest.fixture
def follow(monkeypatch):
    """Runs the blocks of a recipe, and returns the module of each file. The names that they define go away afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])

    def run(recipe):
        modules = {}
        for file, block in re.findall(r"```python\n# (\S+)\n(.*?)```", RECIPES[recipe], re.DOTALL):
            module = modules[file] = _module(file, monkeypatch)
            before = dict(vars(module))
            names = {name: dict(v) if type(v) is dict and name != "__builtins__" else v for name, v in before.items()}
            exec(compile(block, file, "exec"), names)
            for name, value in names.items():
                if value is not before.get(name):  # defined by the block, or a table that it may have added to
                    monkeypatch.setattr(module, name, value, raising=False)
        return modules

    return run


def _module(file, monkeypatch):
    parts = pathlib.Path(file).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__") if parts[0] == "snnfuse" else parts[-1]
    if (ROOT / file).exists():
        return importlib.import_module(name)
    module = types.ModuleType(name)  # a file that the recipe creates
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_neuron(follow):
    follow("A neuron")
    check("qif", "interpret", **CASES["plain"])
    test_core.test_help_shows_the_equation_the_arguments_the_defaults_and_the_source("QIF")
    test_nn_inspect.test_help_shows_equation_arguments_and_defaults("QIF")


@pytest.mark.parametrize(("name", "case"), [("lif", "plain"), ("affine", "bfloat16")])
def test_a_fused_implementation(follow, name, case):
    follow("A fused implementation")
    check(name, "unrolled", **CASES[case])


def test_a_layer_along_time(follow):
    modules = follow("A layer along time with its own loop")
    modules["tests/test_nn.py"].test_a_trace_is_the_weighted_sum_of_its_past()


def test_a_data_set(follow, tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="preparing a data set needs the extra `data`")
    pytest.importorskip("tonic", reason="tests/test_data_builders.py needs tonic")
    modules = follow("A data set")
    modules["tests/test_data_builders.py"].test_stripes_run_along_the_rows_or_the_columns(tmp_path)


def test_a_benchmark_case(follow, capsys):
    follow("A benchmark case")
    import runner

    (row,) = runner.main("", "dense", argv=["--tiny"], here=True)
    assert row["status"] == "ok" and row["ms"] > 0 and row["case"] == "dense"


def test_every_file_and_make_target_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    created = set(re.findall(r"^# (\S+\.py)$", text, re.M)) | {"benchmarks/results/dense.jsonl"}
    for file in re.findall(r"`((?:snnfuse|tests|benchmarks|notebooks|experiments)/[\w./-]+\.\w+)`", text):
        assert file in created or (ROOT / file).exists(), file
    (targets,) = re.findall(r"^.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^ {4,}|`)make ([\w-]+)", text, re.M)) <= set(targets.split())
