"""The benchmarks run: small, without a GPU, of our own library alone; and what is made of their rows."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
compare = runpy.run_path(str(BENCHMARKS / "compare.py"))  # by path: the tests have a module of that name
report = runpy.run_path(str(BENCHMARKS / "report.py"))


def peers(tmp_path, *options):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, BENCHMARKS / "peers.py", "--tiny", "--out", out, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_our_rows_are_checked_and_timed(tmp_path):
    rows = peers(tmp_path, "--libraries", "snnfuse", "--only", "T500|n512|shd", "--ways", "scan|mosaic")
    by_case = {(r["case"], r["how"]): r for r in rows}
    for case in ("lif_T500_N8192", "open_neuromorphic_n512", "shd"):
        row = by_case[case, "scan"]
        assert row["status"] == "ok" and row["flips"] == 0 and row["ms"] > 0
        assert 0.02 < row["firing_rate"] < 0.4
    assert "needs a GPU" in by_case["lif_T500_N8192", "mosaic"]["status"]  # a failure is a row
    assert by_case["lif_T500_N8192", "mosaic"]["ms"] is None


def test_what_was_not_run_is_a_row(tmp_path):
    rows = peers(tmp_path, "--libraries", "snnfuse", "--only", "lif_T32", "--budget", "0")
    assert rows and all(r["status"].startswith("not run: the budget") for r in rows)


def test_wrong_spikes_have_no_time():
    sys.path.insert(0, str(BENCHMARKS))
    import numpy as np
    from adapters import cases

    case = cases.Case("a", "lif", (4, 1024))
    spikes = np.arange(4096).reshape(4, 1024) % 3 == 0
    gradient = np.ones((4, 1024), np.float32)
    reference = dict(spikes=np.packbits(spikes), gradient=gradient)
    assert "status" not in cases.compare(case, "float32", spikes, gradient, reference)
    assert cases.compare(case, "float32", ~spikes, gradient, reference)["status"].startswith("wrong: 4096 of 4096")
    assert "gradient" in cases.compare(case, "float32", spikes, 1.1 * gradient, reference)["status"]


def row(case, ms, library="snnfuse", how="pallas", status="ok"):
    return dict(case=case, library=library, how=how, dtype="float32", ms=ms, status=status, device="a GPU")


def test_a_slower_row_and_a_lost_one_are_regressions():
    text = lambda *rows: compare["rows"]("\n".join(map(json.dumps, rows)))
    before = text(row("same", 1.0), row("slower", 1.0), row("faster", 1.0), row("lost", 1.0), row("never", None))
    after = text(row("same", 1.04), row("slower", 1.2), row("faster", 0.5), row("lost", None, status="failed"))
    lines, regressed = compare["compare"](before, after, 0.05)
    assert regressed and [line.split()[:2] for line in lines] == [
        ["SLOWER", "slower"],
        ["faster", "faster"],
        ["GONE", "lost"],
    ]
    assert compare["compare"](before, before, 0.05) == ([], False)


@pytest.mark.parametrize("name", ["core", "resnet", "norm", "peers"])
def test_no_two_rows_of_a_commit_are_known_by_the_same(name):
    lines = (BENCHMARKS / "results" / f"{name}.jsonl").read_text().splitlines()
    for commit in {json.loads(line)["commit"] for line in lines}:
        of_it = [line for line in lines if json.loads(line)["commit"] == commit]
        assert len(compare["rows"]("\n".join(of_it))) == len(of_it)


def test_a_cell_says_how_a_time_came_about():
    ok = row("a", 0.3, status="ok") | dict(call_ms=1.0)
    assert report["cell"]([row("a", None, status="failed: why"), ok]) == "0.300 / 1.00"
    assert report["cell"]([ok | dict(graph="why", call_ms=289.0)]) == "no graph / 289"
    assert report["cell"]([row("a", None, status="failed: why"), row("a", None, status="not run: why")]) == "failed"


@pytest.mark.parametrize("peer, says", [(3.0, "3x (Norse)"), (0.5, "**0.5x (Norse) is faster than ours**")])
def test_the_table_says_where_a_peer_wins(peer, says):
    assert report["verdict"]({"ours": 1.0, "Norse": peer, "Spyx": 4.0, "sparx": None}) == says


def test_a_table_of_compile_times_where_there_are_any():
    row = dict(case="compile", implementation="pallas", status="ok", device="a GPU", jax="1", date="now", commit="c")
    rows = [row | dict(T=16, M=4096, compile_s=1.5, first_s=3.0), row | dict(T=500, M=8192, status="it cannot")]
    assert "| `pallas` | 1.50 | it cannot | 3.00 |" in report["compile_table"](rows)
    assert report["compile_table"]([]) == ""
