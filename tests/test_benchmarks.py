"""Every benchmark runs on tiny shapes and a CPU, its rows are complete, and the committed tables show the committed rows."""

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from snnfuse.models import resnet as models

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last: it has a compare.py, as the tests have
SCRIPTS = "accuracy conversion core delays loader long_sequences multi_gpu online recurrent step_calls"
for script in SCRIPTS.split():
    importlib.import_module(script)  # they register their questions
conversion, core, figures, peers, runner = map(
    importlib.import_module, ("conversion", "core", "figures", "peers", "runner")
)
spec = importlib.util.spec_from_file_location(
    "benchmarks_report", BENCHMARKS / "report.py"
)  # experiments has a report, too
spec.loader.exec_module(report := importlib.util.module_from_spec(spec))
QUESTIONS = set(runner.QUESTIONS)  # before other tests add some
COMMANDS = sorted(path.name for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.fixture
def small(monkeypatch, request):
    """A ResNet of one block or of none, and as few repetitions as possible."""
    monkeypatch.setattr(models, "WIDTHS", (8, 8, 8, 8))
    monkeypatch.setitem(models.DEPTHS, 18, (1 if "resnet" in request.node.name else 0, 0, 0, 0))
    monkeypatch.setattr(runner.time_ms, "__kwdefaults__", dict(repeats=1, seconds=0, agree=int))


SMOKE = {  # question: the options that keep it short
    "core": ["--only", "compile.*scan|copy|own neuron"],
    "choice": [],
    "flips": ["--only", "continuous"],
    "tune": ["--only", "own neuron"],
    "resnet": ["--only", "relu bfloat16"],
    "peers": ["--libraries", "snnfuse", "--only", "(T500|n512|shd).*pallas"],
    "on_cpu": ["--libraries", "snnfuse"],
    "largest_T": [],
    "multi_gpu": ["--devices", "1", "--only", "lif-stack.* 8 "],
    "loader": [],
    "recurrent": ["--only", "^LIF scan"],
    "contract": [],
    "long_sequences": ["--only", "dense"],
    "online": ["--only", "dense sltt", "--seeds", "1"],
    "delays": ["--only", "^neither"],
    "conversion": ["--only", "99 scan"],
    "few_bits": ["--only", "4 bits.*straight"],
    "delay_layers": ["--only", "float32"],
    "streaming": ["--only", "nn.Stream 10 "],
    "step_calls": ["--only", "host (comp|flat)|mnist.*(Device|32)"],
}


@pytest.mark.parametrize("name", SMOKE)
def test_it_runs(name, small, capsys):
    rows = runner.main("", name, argv=["--tiny", *SMOKE[name]], here=True)
    assert rows and [row["status"] for row in rows] == ["ok"] * len(rows)
    assert all({"case", "device", "python", "date", "commit", "dirty"} <= row.keys() for row in rows)
    assert all(0.02 < row["firing_rate"] < 0.4 for row in rows if "firing_rate" in row)
    assert capsys.readouterr().out.count('{"case"') == len(rows)


def test_few_bits_trains_each_network_once_and_rounds_a_copy_of_it(monkeypatch):
    conversion.train.cache_clear()
    trained, with_adam = [], conversion.with_adam
    monkeypatch.setattr(conversion, "with_adam", lambda *args: trained.append(args) or with_adam(*args))
    rows = {bits: [] for bits in (32, 2)}
    for bits in (2, 32, 2):
        rows[bits].append(conversion.measure_bits(bits, 32, T=2, updates=3, seeds=2))
    assert len(trained) == 2  # a network for each seed
    assert rows[2][0] == rows[2][1]
    conversion.train.cache_clear()
    assert rows[32] == [conversion.measure_bits(32, 32, T=2, updates=3, seeds=2)]  # weights that nobody rounded
    assert rows[32][0] != rows[2][0]


ZEROS, SOME = jnp.zeros((3, 4)), jnp.arange(12.0).reshape(3, 4) + 1


@pytest.mark.parametrize(
    "got, want, error",
    [
        (ZEROS, ZEROS, 0),  # 0 / 0: nothing to compare
        (SOME, SOME, 0),
        (SOME + 0.12, SOME, 0.01),
        (ZEROS, SOME, 1),
        (SOME, ZEROS, np.inf),
        (ZEROS.at[1, 2].set(np.nan), ZEROS, np.nan),
        (ZEROS, ZEROS.at[1, 2].set(np.nan), np.nan),
        (ZEROS.at[1, 2].set(np.nan), ZEROS.at[1, 2].set(np.nan), np.nan),
        (SOME.at[1, 2].set(np.inf), SOME, np.inf),
    ],
)
def test_the_error_of_a_gradient_is_wrong_where_it_is_not_a_number(got, want, error):
    lanes = np.ones(4, bool)
    for pair in (([SOME], got), ([SOME], want)), (([got], SOME), ([want], SOME)):
        np.testing.assert_allclose(core.gradient_error(*pair, lanes), error, rtol=1e-5)


def test_the_gradient_of_inputs_is_compared_in_lanes_of_equal_spikes_alone():
    other = SOME.at[:, 1].add(5.0)
    error = lambda lanes: core.gradient_error(([], other), ([], SOME), np.array(lanes))
    assert error([True, False, True, True]) == 0 and error([True] * 4) > 0.1
    assert np.isnan(error([False] * 4))  # no lane is left to compare


FAR = {  # the cells of 50 us and more where None's choice takes over 5 % longer than the fastest: (neuron, dtype, T, lanes)
    ("adaptive lif", "bfloat16", 32, 2**18),
    ("adaptive lif", "bfloat16", 32, 2**22),
    ("lif learned", "float32", 1, 2**25),
    ("lif learned", "float32", 2, 2**22),
}


def test_none_picks_an_implementation_within_5_percent_of_the_fastest_but_for_cells_with_a_name():
    cells = [cell for cell in report.cells() if min(cell.ms.values()) >= report.LAUNCHED]
    assert len(cells) > 100 and {"scan", "pallas", "triton"} == {cell.chosen for cell in cells}
    assert {(cell.case, cell.dtype, cell.T, cell.M) for cell in cells if cell.over > 1.05} == FAR
    assert max(cell.over for cell in cells) < 1.15


def test_every_question_is_tried_and_every_results_file_has_a_writer():
    assert set(SMOKE) | {"accuracy"} == QUESTIONS  # test_paper.py runs "accuracy"
    assert {path.stem for path in runner.RESULTS.glob("*.jsonl")} == QUESTIONS
    pictures = {path.name for path in runner.RESULTS.glob("*.png")}
    assert pictures == set(figures.FIGURES)


def test_every_command_has_help():
    for script in COMMANDS:
        text = ast.get_docstring(ast.parse((BENCHMARKS / script).read_text()))
        assert f"python benchmarks/{script}" in text.split("\n\n", 1)[0 if script == "figures.py" else 1]
    help_of = lambda script: subprocess.run(
        [sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True
    )
    assert "--tolerance" in help_of("compare.py").stdout and "--budget" in help_of("core.py").stdout


def fails(*args):
    raise ValueError("a planted failure")


def ends(*args):
    sys.stdout.flush()
    __import__("os")._exit(3)


def test_a_failure_is_a_row_also_of_a_process_that_died(tmp_path, capsys):
    reference = runner.Case(dict(case="reference"), fails)
    cases = [runner.Case(dict(case="a"), fails), runner.Case(dict(case="b"), dict, needs=reference)]
    run = runner.Runner()
    assert [run.row(case)["status"] for case in cases] == [
        "ValueError: a planted failure",
        "no reference: ValueError: a planted failure",
    ]
    assert "the process died" in run.row(runner.Case(dict(case="c"), ends, process="fresh"))["status"]


@pytest.mark.parametrize("fault", [None, "compile", "time"])
def test_a_case_compiles_first_and_is_timed_later(fault):
    done = []

    def measure(M):
        for part in ("compile", "time"):
            if part == fault:
                raise ValueError(f"planted in {part}")
            done.append(part)
            yield dict(M=M)

    halves = runner.in_halves(measure, (4,))
    next(halves)
    assert done == ([] if fault == "compile" else ["compile"])
    row = next(halves)
    assert row["status"] == (f"ValueError: planted in {fault}" if fault else "ok") and "device" in row
    assert row.get("M") == (None if fault else 4)


def test_a_question_without_a_gpu_needs_tiny(capsys, monkeypatch):
    monkeypatch.setattr(runner.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        runner.main("", "core", argv=[])
    assert "this machine has no GPU" in capsys.readouterr().err


def test_the_last_of_equal_rows_counts_and_keep_skips_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    row = dict(case="continuous", implementation="interpret", device="cpu", status="ok", differ=1)
    lines = [row, row | dict(differ=2), row | dict(case="grid of 0.1", status="ValueError")]
    (tmp_path / "flips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [r.get("differ") for r in runner.rows("flips")] == [2, 1]
    runner.main("", "flips", argv=["--tiny", "--list", "--keep"])
    assert capsys.readouterr().out.splitlines() == ["grid of 0.1 interpret"]


def test_wrong_spikes_gradients_and_losses_are_found():
    task = peers.Task("lif", (4, 1024))
    spikes = (np.arange(4096).reshape(4, 1024) % 3 == 0).astype(np.float32)
    gradient = np.ones((4, 1024), np.float32)
    want = dict(spikes=np.packbits(spikes != 0), gradient=gradient)
    compare = lambda spikes, gradient: peers.compare(task, "float32", dict(spikes=spikes, gradient=gradient), want)
    assert "status" not in compare(spikes, gradient)
    assert compare(1 - spikes, gradient)["status"].startswith("wrong: 4096 of 4096")
    assert "gradient" in compare(spikes, 1.1 * gradient)["status"]
    shd, want = peers.Task("shd", (4, 1024)), dict(spikes=want["spikes"], loss=1.0)
    assert "loss" in peers.compare(shd, "float32", dict(spikes=spikes, loss=1.1), want)["status"]


def test_a_wrong_step_on_a_cpu_gets_no_time(monkeypatch):
    task = peers.Task("shd", (2, 3, 784, 16, 10))
    assert peers.in_turn(task, ("snnfuse",), 1, "snnfuse")["ms"] > 0
    peers.steps_in_turn.cache_clear()
    monkeypatch.setattr(peers, "compare", lambda *args: dict(status="wrong: planted"))
    assert peers.in_turn(task, ("snnfuse",), 1, "snnfuse").keys() == {"version", "status"}


@pytest.mark.parametrize("name", ["core", "resnet", "multi_gpu", "peers"])
def test_no_two_rows_of_a_commit_have_the_same_name(name):
    lines = [json.loads(line) for line in (runner.RESULTS / f"{name}.jsonl").read_text().splitlines()]
    names = [(runner.identity(row), row["commit"]) for row in lines]
    assert len(set(names)) == len(names)


def test_the_tables_and_the_figures_are_those_of_the_rows():
    report.main(["--check"])
    figures.main(["--check"])


def test_an_unexpected_failure_and_an_idle_expectation_are_refused(tmp_path, monkeypatch):
    row = dict(case="lif", implementation="pallas", status="ValueError: planted", device="a GPU", commit="c")
    (tmp_path / "core.jsonl").write_text(json.dumps(row))
    for module in (runner, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "EXPECTED", [("core", dict(case="other"), "why")])
    with pytest.raises(SystemExit, match="core.jsonl: a row has failed: lif, ValueError: planted\n.*EXPECTED lists"):
        report.main(["--check"])
    monkeypatch.setattr(report, "EXPECTED", [("core", dict(case="lif"), "why")])
    assert list(report.unexpected()) == []
    assert "| lif | why |" in report.table("core", [row], "neuron={case}; ms={ms:.2f}").splitlines()


def test_a_missing_marker_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("no marker")
    with pytest.raises(SystemExit, match="must contain .* gains: made by benchmarks/report.py"):
        report.with_tables(tmp_path / "README.md", dict(gains=report.gains))


@pytest.mark.parametrize("ms, says", [(3.0, "3x (Norse)"), (0.5, "**0.5x (Norse) is faster than ours**")])
def test_the_table_says_where_another_library_wins(ms, says):
    assert report.verdict(dict(ms=1.0), dict(Norse=dict(ms=ms), Spyx=dict(ms=4.0))) == says
    assert report.peer_cell(dict(ms=0.3, call_ms=1.0)) == "0.300 / 1.00"
    assert report.peer_cell(dict(ms=0.3, call_ms=289.0, graph="why")) == "no graph / 289"


def test_two_checkouts_are_compared():
    root = BENCHMARKS.parent
    command = [sys.executable, BENCHMARKS / "compare.py", root, root, "--tiny", "--rounds", "1", "--only", "T=500"]
    done = subprocess.run([*command, "--tolerance", "9"], capture_output=True, text=True, check=True)
    assert "no case is slower" in done.stdout and done.stdout.splitlines()[1].startswith("lif T=500")
