"""The runs of the temporal fusion paper: they build, say what they lack, train, resume, and are compared."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from compare import assert_fires
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # last: it has a report.py, as experiments has

import accuracy
import config as configuration
import paper
import runner
import steps
import train
from inputs import DATASETS, Random, Recordings

from snnfuse.data import events, loader
from snnfuse.models import resnet

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # Orbax has its own
RANDOM = ["--data=random", "--data.like=mnist", "--data.examples=8", "--batch=4", "--steps=3", "--eval_every=3"]
TINY = [*RANDOM, "--model.T=2", "--model.policy=float32", "--model.implementation=scan"]


def parse(arguments):
    return configuration.parse(arguments, train.Config(), train.CHOICES)


@pytest.mark.parametrize("model", paper.DEPTHS)
@pytest.mark.parametrize("data", paper.DATA)
def test_every_run_is_the_papers(data, model):
    config = parse(paper.arguments(data, model))
    assert (config.model.T, config.model.depth) == (32, paper.DEPTHS[model])
    assert config.batch == (10 if data == "dvs128_gesture" else 100)
    if data != "mnist5k":
        assert config.learning_rate == 1e-3
        assert (config.schedule, config.warmup, config.weight_decay, config.clip) == ("constant", 0, 0, None)
        count = {"mnist": 60_000, "cifar10": 50_000, "nmnist": 60_000, "dvs128_gesture": 1_176}[data]
        assert config.steps == 5 * config.eval_every == 5 * (count // config.batch)


@pytest.mark.parametrize("data, model", [("nmnist", "r18"), ("dvs128_gesture", "r50")])
def test_every_network_builds(data, model):
    config = parse(paper.arguments(data, model))

    def logits():
        frames = jnp.zeros((32, 2, *config.data.example().shape), jnp.uint8)
        xs = config.data.encode(jax.random.key(0), {"frames": frames}, config.model.T)
        assert xs.shape[:2] == (32, 2) and xs.shape[-1] == 3
        return config.model.build(xs.shape[2:], config.data.classes, nnx.Rngs(0))(xs)[0]

    assert nnx.eval_shape(logits).shape == (32, 2, 11 if data == "dvs128_gesture" else 10)


def test_sew_resnets_build():
    build = parse(["--model=resnet", "--model.connect=add", "--model.memory=packed"]).model.build
    assert nnx.eval_shape(lambda: build((8, 8, 3), 10, nnx.Rngs(0))(jnp.zeros((4, 2, 8, 8, 3)))[0]).shape == (4, 2, 10)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "nmnist", "dvs128_gesture"])
def test_missing_data_is_said_with_what_to_do(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    assert paper.main([name, "r18", "--out", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr().err
    assert re.search(f"python -m snnfuse.data prepare {name}", said)
    assert "snnfuse[data]" in said or re.search(rf"in {tmp_path}.*: \S+ from https://", said)
    assert not (tmp_path / "runs").exists()


def test_the_papers_optimizer_is_adam():
    ours, adam = steps.transform(parse(paper.arguments("mnist", "r18")), ((("w",), "weight"),)), optax.adam(1e-3)
    params = nnx.State({"w": jnp.array([3.0, -4.0])})
    mine, its = ours.init(params), adam.init(params)
    for scale in (1.0, 100.0):
        gradient = nnx.State({"w": jnp.array([0.3, -2.0]) * scale})
        (a, mine), (b, its) = ours.update(gradient, mine, params), adam.update(gradient, its, params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6)


def test_each_channel_has_its_own_noise():
    image = jnp.full((1, 28, 28, 1), 127, jnp.uint8)
    xs = DATASETS["mnist"].encode(jax.random.key(0), {"image": image}, 8)
    assert xs.shape == (8, 1, 28, 28, 3) and abs(float(xs.mean()) - 127 / 255) < 0.02
    assert abs(float((xs[..., 0] == xs[..., 1]).mean()) - 0.5) < 0.03


def test_recordings_become_frames_with_an_empty_channel():
    sensor = events.Sensor(34, 34)
    source = Random(like="nmnist", examples=6, events=900).sources()[0]
    data = Recordings("nmnist", bins=4, channels=3)
    batch = next(iter(loader.load(source, data.example(), batch=2, shuffle=False)))
    want = [events.to_frames(sample["events"], sensor, 4) for sample in source[:2]]
    xs = data.encode(jax.random.key(0), batch, 6)
    np.testing.assert_array_equal(xs[:4, ..., :2], np.stack(want, 1))
    assert xs.shape == (6, 2, 34, 34, 3) and not xs[4:].any() and not xs[..., 2].any()
    assert_fires(xs[:4] > 0)
    with pytest.raises(ValueError, match="--model.T must be at least --data.bins, 4; got 3"):
        data.encode(jax.random.key(0), batch, 3)
    with pytest.raises(ValueError, match="--data.channels must be at least 2; got 1"):
        Recordings("nmnist", channels=1)


@pytest.mark.parametrize("like", ["mnist", "cifar10", "nmnist", "shd"])
def test_random_input_has_the_shape_of_the_real(like):
    data = Random(like=like, examples=4)
    train_source, test_source = data.sources()
    assert data.note == "random input" and data.classes == DATASETS[like].classes
    assert (len(train_source), len(test_source)) == (4, 2)
    batch = next(iter(loader.load(train_source, data.example(), batch=4)))
    shape = {"mnist": (28, 28, 3), "cifar10": (32, 32, 3), "nmnist": (34, 34, 3), "shd": (1, 700, 1)}[like]
    assert data.encode(jax.random.key(0), batch, 32).shape == (32, 4, *shape)
    with pytest.raises(ValueError, match="--data.like must be one of mnist5k, digits, mnist,"):
        Random(like="imagenet")


def compare(out, implementations):
    options = ["--tiny", "--data=mnist", "--model=r18", f"--implementations={implementations}", f"--runs={out}"]
    options += [f"--out={out / 'accuracy.jsonl'}", f"--more={' '.join(TINY)}"]
    runner.main(accuracy.__doc__, "accuracy", argv=options, here=True)


def make_small(patch):
    patch.setattr(resnet, "WIDTHS", (8, 16, 32, 64))
    patch.setitem(resnet.DEPTHS, 18, (1, 1, 0, 0))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(path, what it said): a small run twice by the same implementation, the second time stopped and resumed."""
    out, said = tmp_path_factory.mktemp("runs"), io.StringIO()

    def run(script, arguments):
        assert script == "paper"
        if "--name=1-scan" in arguments:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("draw", "draw_mistakes"):  # the other run is drawn
                    patch.setattr(train.report, name, lambda path, *_: path)
                return paper.main(arguments)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            assert paper.main([*arguments, "--stop_at=2"]) == 1
            return paper.main([*arguments, "--resume"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "RESULTS", out)
        patch.setattr(accuracy, "run", run)  # in this process, for it to be compiled once
        make_small(patch)
        compare(out, "scan,scan")
    return out, said.getvalue()


def test_a_run_repeats_itself_and_is_a_row(compared):
    out, _ = compared
    rows = [json.loads(line) for line in (out / "accuracy.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["mnist r18"] * 2
    assert [row["status"] for row in rows] == ["ok"] * 2
    assert {"device", "jax", "date", "commit", "seconds", "T", "B", "seed"} <= rows[0].keys()
    assert rows[1]["largest_difference"] == 0 and rows[0]["input"] == "random input"
    assert 0 < rows[0]["final_loss"] < 20 and rows[0]["steps"] == 3


def test_a_run_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    make_small(monkeypatch)
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(accuracy, "run", lambda script, arguments: paper.main(arguments))
    compare(tmp_path, "mosaic")
    assert "needs a GPU" in capsys.readouterr().err
    assert json.loads((tmp_path / "accuracy.jsonl").read_text())["status"] == "exit 1"


def test_it_resumes_exactly(compared):
    out, said = compared
    before, after = said.split("stopped after step 2")
    assert before.count("random input") == 1 and after.count("random input") == 2  # at its start, and in its summary
    assert json.loads((out / "2-scan" / "summary.json").read_text())["note"] == "random input"
    picture = matplotlib.image.imread(out / "2-scan" / "report.png")[..., :3]
    assert picture.shape[0] > 600 and (picture.min(-1) < 0.9).mean() > 0.01
    rows = lambda name: [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    losses = lambda name: [(r["step"], r.get("loss"), r.get("eval_loss")) for r in rows(name)]
    assert losses("2-scan") == losses("1-scan") and len(losses("2-scan")) == 4


def test_the_report_shows_blocks_in_their_order():
    paths = [f"layers.{i}.{inside}" for i in range(2, 13) for inside in ("join.neuron", "main.layers.1.neuron")]
    layers, last = train.report._shown(sorted(["layers.0.layers.1.neuron", *paths]))
    assert last == "layers.12.join.neuron"
    assert [path.split(".")[1] for path in layers.values()] == ["0", "3", "6", "9", "12"]


def test_the_list_has_every_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    row = dict(status="ok", device="NVIDIA H100 80GB HBM3")
    step = dict(case="spiking-resnet-18", implementation="pallas", dtype="bfloat16", T=32, B=100, size=28, ms=3.4)
    step |= dict(memory="packed")
    accuracy = dict(case="mnist r18", implementation="pallas", held_out_accuracy=0.991, input="real data", steps=3000)
    others = [row | accuracy, row | accuracy | {"T": 32, "implementation": "scan", "held_out_accuracy": 0.5}]
    (tmp_path / "resnet.jsonl").write_text(json.dumps(row | step) + "\n" + json.dumps(row | step | {"B": 1, "ms": 1}))
    rows = [row | accuracy | {"T": 32}, *others]
    (tmp_path / "accuracy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert paper.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(paper.DATA) * len(paper.DEPTHS)
    assert re.fullmatch(r"python experiments/paper.py mnist +r18 +3000 +3.40 on H100 +99.10% on H100", lines[1])
    assert lines[2].count("not measured") == 2
    assert paper.main(["imagenet", "r18"]) == 2 and "expected DATA MODEL" in capsys.readouterr().err
