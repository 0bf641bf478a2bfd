"""The experiment: its configuration, its split, exact resume, how it stops, and what it leaves behind."""

import dataclasses
import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compare import assert_fires
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import config as configuration
import runs
import train
from inputs import DATASETS, Mnist5k
from models import READOUTS, ConvNet

from snnfuse.nn.monitor import record

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # Orbax has its own


@dataclasses.dataclass(frozen=True)
class Few(Mnist5k):
    """The same images, fewer to evaluate: 125, no multiple of an evaluation's batch."""

    def load(self):
        arrays = super().load()
        return arrays._replace(test_images=arrays.test_images[::8], test_labels=arrays.test_labels[::8])


DATASETS["few"] = Few  # all that adding a data set takes
TINY = train.Config(
    model=ConvNet(T=3, channels=(4,), hidden=16), data=Few(), steps=40, batch=32, learning_rate=0.02, eval_every=20
)


def rows(path: Path) -> list[dict]:
    """The metrics of a run without its timings: what must repeat bit for bit."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "samples_per_s"} for row in found]


def checkpoint(path: Path, step: int) -> dict:
    with ocp.CheckpointManager((path / "checkpoints").absolute()) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore())


def assert_same_run(path, whole):
    assert rows(path) == rows(whole)
    a, b = checkpoint(path, TINY.steps), checkpoint(whole, TINY.steps)
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out / TINY.name, train.train(dataclasses.replace(TINY, out=str(out)))


def test_a_run_learns_and_leaves_everything_behind(whole):
    path, summary = whole
    assert 0.5 < summary["held_out_accuracy"] <= summary["best_held_out_accuracy"] <= 1
    assert json.loads((path / "summary.json").read_text()) == summary
    assert [r["step"] for r in rows(path) if "loss" in r] == list(range(1, 41))
    assert [r["step"] for r in rows(path) if "eval_loss" in r] == [20, 40]
    assert sorted(int(p.name) for p in (path / "checkpoints").iterdir()) == [20, 40]
    assert list((path / "tensorboard").glob("events*"))[0].stat().st_size > 1000
    assert json.loads((path / "config.json").read_text())["model.channels"] == [4]


def test_the_trained_network_fires(whole):
    path, _ = whole
    data = TINY.data.load()
    graphdef, state = train.create(TINY, (28, 28, 1), 10)
    model, _ = nnx.merge(graphdef, runs.from_flat(state, checkpoint(path, 40)))
    model.eval()
    xs = TINY.data.encode(jax.random.key(0), jnp.asarray(data.test_images), 3, train=False)
    for spikes in record(model, xs)[1].values():
        assert_fires(spikes)


def test_the_picture_is_drawn(whole):
    """Every panel has ink, in more than one colour."""
    picture = matplotlib.image.imread(whole[0] / "report.png")[..., :3]
    height, width, _ = picture.shape
    assert height > 600 and width > 1000
    for top in (0, height // 2):
        for left in (0, width // 3, 2 * width // 3):
            panel = picture[top : top + height // 2, left : left + width // 3].reshape(-1, 3)
            assert 0.005 < (panel.min(1) < 0.9).mean() < 0.6, f"panel at {top}, {left}"
            assert len(np.unique(panel.round(1), axis=0)) > 8, f"panel at {top}, {left}"


def test_resume_is_exact(whole, tmp_path):
    part = dataclasses.replace(TINY, out=str(tmp_path), stop_at=27)  # in the middle of everything
    with pytest.raises(train.Stopped, match=r"stopped after step 27.*--resume true \(checkpoint of step 27\)"):
        train.train(part)
    assert rows(tmp_path / TINY.name)[-1]["step"] == 27
    train.train(dataclasses.replace(part, stop_at=None, resume=True))
    assert_same_run(tmp_path / TINY.name, whole[0])


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path):
    """Rows after the checkpoint are dropped, with the one that the kill cut in half."""
    path = tmp_path / TINY.name
    shutil.copytree(whole[0], path)
    shutil.rmtree(path / "checkpoints" / "40")
    with open(path / "metrics.jsonl", "a") as f:
        f.write('{"step": 41, "lo')
    train.train(dataclasses.replace(TINY, out=str(tmp_path), resume=True))
    assert_same_run(path, whole[0])


def test_an_interrupt_stops_between_steps_with_a_checkpoint(whole, tmp_path, monkeypatch):
    step_of = train.train_step

    def interrupted(*args):
        if args[-1] == 3:
            signal.raise_signal(signal.SIGINT)
        return step_of(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(train.Stopped, match="stopped after step 3"):
        train.train(dataclasses.replace(TINY, out=str(tmp_path)))
    assert rows(tmp_path / TINY.name) == rows(whole[0])[:3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_with_another_configuration_names_the_key(whole):
    other = dataclasses.replace(
        TINY, out=str(whole[0].parent), resume=True, model=dataclasses.replace(TINY.model, hidden=32)
    )
    with pytest.raises(train.Stopped, match=r"was made with model.hidden=16; got model.hidden=32"):
        train.train(other)
    with pytest.raises(train.Stopped, match="there is no run in"):
        train.train(dataclasses.replace(other, name="another"))


def test_a_taken_name_is_numbered(whole, monkeypatch):
    config = dataclasses.replace(TINY, out=str(whole[0].parent), batch=5000)
    before = (whole[0] / "config.json").read_text()
    with pytest.raises(train.Stopped, match="--batch must be at most the 4000 training images; got 5000"):
        train.train(config)
    assert (whole[0].parent / "mnist5k-2" / "config.json").exists()
    assert (whole[0] / "config.json").read_text() == before


def test_nan_stops_and_is_not_saved(tmp_path):
    config = dataclasses.replace(TINY, out=str(tmp_path), learning_rate=1e38, warmup=0.0, eval_every=1, log_every=1)
    with pytest.raises(train.Stopped, match=r"(loss|grad_norm) is (nan|inf).* at step (\d+): stopped.*learning_rate"):
        train.train(config)
    saved = ocp.CheckpointManager((tmp_path / TINY.name / "checkpoints").absolute()).latest_step()
    assert saved == max(row["step"] for row in rows(tmp_path / TINY.name))
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / TINY.name) if "loss" in row)


def test_a_directory_that_cannot_be_written_stops_before_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(["--out", str(tmp_path / "file")]) == 1
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err
    full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(train.Stopped, match=r"needs \d+ MiB for checkpoints; its disk has 1 MiB free"):
        train.train(dataclasses.replace(TINY, out=str(tmp_path)))
    assert not (tmp_path / TINY.name / "metrics.jsonl").exists()


def test_random_keys_are_checkpointed(tmp_path):
    """A model with dropout has typed random keys in its state."""
    make = lambda seed: nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(seed)))[1]
    run = runs.Run(configuration.flatten(dataclasses.replace(TINY, out=str(tmp_path)), train.CHOICES))
    run.start(make(0))
    run.save(1, make(0))
    assert run.saved() == 1
    run.close()
    run = runs.Run(configuration.flatten(dataclasses.replace(TINY, out=str(tmp_path), resume=True), train.CHOICES))
    step, state = run.start(make(1))
    run.close()
    assert step == 1
    got, want, other = (jax.random.key_data(jax.tree.leaves(s)[1]) for s in (state, make(0), make(1)))
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, other)


def test_the_split_is_stratified_fixed_and_disjoint():
    arrays = Mnist5k().load()
    assert arrays.train_images.shape == (4000, 28, 28, 1) and arrays.test_images.shape == (1000, 28, 28, 1)
    assert Counter(arrays.test_labels.tolist()) == dict.fromkeys(range(10), 100)
    assert Counter(arrays.train_labels.tolist()) == dict.fromkeys(range(10), 400)
    assert arrays.test_images.astype(np.int64).sum() == 25_825_445
    seen = {image.tobytes() for image in arrays.train_images}
    assert not any(image.tobytes() in seen for image in arrays.test_images)


def test_batches_depend_on_the_step_alone():
    arrays = Mnist5k().load()._replace(train_images=np.arange(10), train_labels=np.arange(10))
    take = lambda seed, start, n: [
        x.tolist() for (x, _), _ in zip(arrays.batches(4, seed, start), range(n), strict=False)
    ]
    assert take(0, 3, 4) == take(0, 0, 7)[3:]
    assert take(0, 0, 4) != take(1, 0, 4)
    first, second = take(0, 0, 2), take(0, 2, 2)
    assert len({*sum(first, [])}) == 8 and first != second  # an epoch repeats no image, and two are in another order


def test_encoding():
    images = Mnist5k().load().test_images[:50]
    key = jax.random.key(0)
    spikes = Mnist5k().encode(key, jnp.asarray(images), 200, train=False)
    assert_fires(spikes)
    np.testing.assert_allclose(spikes.mean(0), images / 255, atol=0.2)
    assert not jnp.array_equal(spikes, Mnist5k().encode(jax.random.key(1), jnp.asarray(images), 200, train=False))
    moved = Mnist5k(encoding="direct", shift=2).encode(key, jnp.asarray(images), 2, train=True)
    assert jnp.array_equal(moved[0], moved[1])
    for image, got in zip(images / np.float32(255), np.asarray(moved[0]), strict=True):
        shifts = [np.pad(image, ((2, 2), (2, 2), (0, 0)))[i : i + 28, j : j + 28] for i in range(5) for j in range(5)]
        assert any(np.allclose(got, shifted, atol=1e-6) for shifted in shifts)


def test_evaluation_counts_every_image_once():
    data = TINY.data.load()
    config = dataclasses.replace(TINY, data=Few(encoding="direct"))
    graphdef, state = train.create(config, (28, 28, 1), 10)
    got = train.evaluate(config, graphdef, state, data.test_images, data.test_labels, batch=50)
    model, _ = nnx.merge(graphdef, state)
    model.eval()
    xs = config.data.encode(jax.random.key(0), jnp.asarray(data.test_images), 3, train=False)
    logits = np.asarray(READOUTS["mean"](model(xs)[0]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert got["accuracy"] == pytest.approx((logits.argmax(-1) == data.test_labels).mean())
    assert got["loss"] == pytest.approx(-logp[np.arange(125), data.test_labels].mean(), rel=1e-5)


def parse(*arguments):
    return configuration.parse(list(arguments), train.Config(), train.CHOICES)


def test_overrides():
    config = parse(
        "--steps", "7", "--model.T=8", "--model.channels", "8,16,32", "--resume", "true", "--stop_at", "none"
    )
    assert (config.steps, config.model.T, config.model.channels, config.resume) == (7, 8, (8, 16, 32), True)
    assert parse("--data.shift", "1", "--data", "few").data == Few(shift=1)
    assert parse() == train.Config()
    flat = configuration.flatten(parse("--data", "few"), train.CHOICES)
    assert flat["data"] == "few" and flat["model"] == "conv" and flat == json.loads(json.dumps(flat))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--modle.T", "3"),
            r"unknown key --modle.T \(did you mean --model.T\?\); known keys: model, model.T, .*stop_at",
        ),
        (("--model.t", "3"), r"unknown key --model.t \(did you mean --model.T\?\)"),
        (("--steps.x", "3"), "unknown key --steps.x"),
        (("--steps",), "--steps needs a value"),
        (("--steps", "--batch", "3"), "--steps needs a value"),
        (("steps=3",), "expected --key value; got 'steps=3'"),
        (("--steps", "ten"), "--steps must be int; got 'ten'"),
        (("--steps", "0"), "--steps must be at least 1; got 0"),
        (("--resume", "maybe"), "--resume must be bool; got 'maybe'"),
        (("--model", "mlp"), "--model must be one of conv, resnet; got 'mlp'"),
        (("--model.channels", "8,x"), "--model.channels must be tuple"),
        (("--model.readout", "sum"), "--model.readout must be one of rate, mean, max, last; got 'sum'"),
        (("--model.implementation", "cuda"), "--model.implementation must be none or one of .*scan.*got 'cuda'"),
        (("--data.encoding", "morse"), "--data.encoding must be direct or bernoulli; got 'morse'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse(*arguments)
    assert train.main(list(arguments)) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_lists_every_key(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{key} " in text for key in configuration.flatten(train.Config(), train.CHOICES))
