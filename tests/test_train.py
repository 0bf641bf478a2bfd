"""The experiment: its configuration, its split, exact resume, how it stops, and what it leaves behind."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compare import assert_fires
from flax import nnx
from jax import monitoring

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import config as configuration
import runs
import steps
import train
from inputs import DATASETS, Images
from inputs.images import STATISTICS
from models import MODELS, READOUTS, ConvNet

from snnfuse import LIF, PiecewiseQuadratic, SoftReset, nn, training
from snnfuse.data import catalog, image_augment
from snnfuse.models.vgg import STAGES
from snnfuse.nn.monitor import record

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # Orbax has its own


pytest.importorskip("tensorflow_datasets", reason="the experiments need the extra `data`")


@dataclasses.dataclass(frozen=True)
class Few(Images):
    """MNIST-5k with fewer samples to evaluate: 125, no multiple of an evaluation's batch. It is read once, not in every run."""

    @functools.cache  # noqa: B019
    def sources(self):
        train, test = super().sources()
        return train, test[::8]


MNIST5K = DATASETS["mnist5k"]
TINY = train.Config(
    model=ConvNet(T=3, channels=(4,), hidden=16),
    data=Few("mnist5k", shift=2),
    steps=40,
    batch=32,
    learning_rate=0.02,
    eval_every=20,
    name="mnist5k",
)


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """The data set is prepared once, and not in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "tfds"))
        yield


def without_pictures(patch):
    for name in ("draw", "draw_mistakes"):
        patch.setattr(train.report, name, lambda *_: "no picture")


@pytest.fixture(autouse=True)
def undrawn(whole, monkeypatch):
    """Only the first run draws its pictures: that takes longer than training."""
    without_pictures(monkeypatch)


def whole_test(data) -> dict:
    return next(iter(train.in_order(dataclasses.replace(TINY, data=data), data.sources()[1], 125)))


def rows(path: Path) -> list[dict]:
    """The metrics of a run without its timings: what must repeat bit for bit."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "samples_per_s"} for row in found]


def checkpoint(path: Path, step: int) -> dict:
    with ocp.CheckpointManager((path / "checkpoints").absolute()) as manager:
        return manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))["arrays"]


def assert_same_run(path, whole):
    assert rows(path) == rows(whole)
    a, b = checkpoint(path, TINY.steps), checkpoint(whole, TINY.steps)
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


COMPILED = []  # the name of each program
monitoring.register_event_duration_secs_listener(
    lambda event, *_, fun_name="", **__: event.endswith("backend_compile_duration") and COMPILED.append(fun_name)
)


@pytest.fixture(scope="module")
def finished():
    """What the end of the run `whole` did: the programs that it compiled, and the logits and labels that it drew."""
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, finished):
    out, finish, draw_mistakes = tmp_path_factory.mktemp("whole"), train._finish, train.report.draw_mistakes

    def counted(*args):
        before = len(COMPILED)
        assert before > 3, "nothing was counted at all"
        summary = finish(*args)
        finished["programs"] = len(COMPILED) - before
        return summary

    def noted(*args):
        finished["answers"] = args[-2:]
        return draw_mistakes(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_finish", counted)
        patch.setattr(train.report, "draw_mistakes", noted)
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
    model, optimizer = train.create(TINY, (28, 28, 1), 10)
    training.from_arrays(checkpoint(path, 40), model, optimizer)
    model.eval()
    xs = TINY.data.encode(jax.random.key(0), whole_test(TINY.data), 3)
    for spikes in record(model, xs)[1].values():
        assert_fires(spikes)


@pytest.mark.parametrize("name", ["report", "mistakes"])
def test_the_pictures_are_drawn(whole, name):
    """Every panel has ink, in more than one colour."""
    picture = matplotlib.image.imread(whole[0] / f"{name}.png")[..., :3]
    height, width, _ = picture.shape
    assert height > 600 and width > 1000
    for top in (0, height // 2):
        for left in (0, width // 3, 2 * width // 3):
            panel = picture[top : top + height // 2, left : left + width // 3].reshape(-1, 3)
            assert 0.005 < (panel.min(1) < 0.9).mean() < 0.6, f"panel at {top}, {left}"
            colours = (panel * 10).round().astype(int) @ [1, 100, 10_000]
            assert len(np.unique(colours)) > 8, f"panel at {top}, {left}"


def test_the_pictures_compile_three_programs(whole, finished):
    """One records a sample over many steps, one encodes a sample, one counts operations: compiling is what a user waits for."""
    assert finished["programs"] == 3


def test_the_pictures_show_the_answers_of_the_last_evaluation(whole, finished, tmp_path, monkeypatch):
    """A run that resumes after its last step has no evaluation, and makes one for the pictures."""
    logits, labels = finished["answers"]
    assert logits.shape == (125, 10)
    assert whole[1]["held_out_accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
    shutil.copytree(whole[0], tmp_path / TINY.name)
    again = []
    monkeypatch.setattr(train.report, "draw_mistakes", lambda *args: again.extend(args[-2:]) or "no picture")
    train.train(dataclasses.replace(TINY, out=str(tmp_path), resume=True))
    np.testing.assert_array_equal(again[0], logits)
    np.testing.assert_array_equal(again[1], labels)


def test_resume_is_exact(whole, tmp_path):
    part = dataclasses.replace(TINY, out=str(tmp_path), stop_at=27)  # in the middle of everything
    with pytest.raises(train.Stopped, match=r"stopped after step 27.*--resume \(checkpoint of step 27\)"):
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


def test_an_interrupt_stops_between_calls_with_a_checkpoint(whole, tmp_path, monkeypatch):
    add = train.Meter.add

    def interrupted(self, step, metrics, batch):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        add(self, step, metrics, batch)

    monkeypatch.setattr(train.Meter, "add", interrupted)
    before = signal.getsignal(signal.SIGINT)  # a shell starts programs in the background with SIGINT ignored
    with pytest.raises(train.Stopped, match="stopped after step 3"):
        train.train(dataclasses.replace(TINY, out=str(tmp_path)))
    assert rows(tmp_path / TINY.name) == rows(whole[0])[:3]
    assert signal.getsignal(signal.SIGINT) is before


def test_samples_from_the_host_and_several_steps_a_call(tmp_path, capsys):
    dense = dataclasses.replace(TINY.model, channels=())  # on a CPU convolutions in a loop are slow
    config = dataclasses.replace(TINY, model=dense, out=str(tmp_path), steps=20, eval_every=10)
    losses = lambda name: [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    train.train(dataclasses.replace(config, name="host", on_device=0))
    assert "samples come from the host; steps in a call: 1" in capsys.readouterr().out
    assert len(losses("host")) == 20 and losses("host")[-1] < losses("host")[0]
    with pytest.raises(train.Stopped, match="--steps_per_call above 1 needs .* --on_device"):
        train.train(dataclasses.replace(config, on_device=0, steps_per_call=10))
    part = dataclasses.replace(config, name="five", steps_per_call=5)
    with pytest.raises(train.Stopped, match="stopped after step 10"):
        train.train(dataclasses.replace(part, stop_at=7))
    train.train(dataclasses.replace(part, resume=True))
    train.train(dataclasses.replace(config, name="one"))
    assert "samples come from the device; steps in a call: 5" in capsys.readouterr().out
    np.testing.assert_allclose(losses("five"), losses("one"), rtol=1e-4)


@pytest.mark.parametrize("on_device", [0, 1])
def test_the_first_steps_may_have_fewer_time_steps(on_device, tmp_path):
    """The first ten steps are those of a network of one time step, the others are not; a resumed run knows where it is."""
    dense = dataclasses.replace(TINY.model, channels=())
    config = dataclasses.replace(TINY, model=dense, out=str(tmp_path), steps=20, eval_every=10, on_device=on_device)
    losses = lambda name: [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    train.train(dataclasses.replace(config, name="one", model=dataclasses.replace(dense, T=1)))
    both = dataclasses.replace(config, name="both", first_T=1, first_steps=10)
    with pytest.raises(train.Stopped, match="stopped after step 10"):
        train.train(dataclasses.replace(both, stop_at=10))
    train.train(dataclasses.replace(both, resume=True))
    np.testing.assert_allclose(losses("both")[:10], losses("one")[:10], rtol=1e-5)
    assert len(losses("both")) == 20 and abs(losses("both")[10] / losses("one")[10] - 1) > 1e-3


def test_a_run_that_stops_waits_for_no_program_that_it_does_not_need(tmp_path, monkeypatch):
    """The programs of the evaluations take minutes here: the first one is never awaited, and the second one never begun."""
    go_on, released = threading.Event(), []
    slow = lambda *_: SimpleNamespace(compile=lambda: released.append(go_on.wait(60)))
    monkeypatch.setattr(train, "lower_eval", slow)
    dense = dataclasses.replace(TINY.model, channels=())
    config = dataclasses.replace(TINY, model=dense, first_T=1, first_steps=10, stop_at=3, out=str(tmp_path))
    try:
        with pytest.raises(train.Stopped, match="stopped after step 3"):
            train.train(config)
    finally:
        go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)
    assert released in ([], [True])  # False if its minute was over before the run stopped


@pytest.mark.parametrize("on_device", [0, 1])
def test_the_later_steps_may_have_smaller_batches(on_device, tmp_path, monkeypatch):
    """They take as many samples as they say, and a resumed run takes the same ones, wherever it stopped."""
    taken, update = [], steps._update
    spy = lambda config, objects, key, batch: taken.append(len(batch["label"])) or update(config, objects, key, batch)
    monkeypatch.setattr(steps, "_update", spy)
    dense = dataclasses.replace(TINY.model, channels=())
    config = dataclasses.replace(
        TINY, model=dense, out=str(tmp_path), steps=20, eval_every=10, on_device=on_device, seed=7
    )
    losses = lambda name: [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    both = dataclasses.replace(config, name="both", first_T=1, first_steps=10, second_batch=4)
    compiled = COMPILED.count("jit(train_step)")
    for stop in (5, 15):
        with pytest.raises(train.Stopped, match=f"stopped after step {stop}"):
            train.train(dataclasses.replace(both, stop_at=stop, resume=stop > 5))
    train.train(dataclasses.replace(both, resume=True))
    assert taken == [TINY.batch, 4]  # each is traced once
    assert COMPILED.count("jit(train_step)") - compiled == 2  # the first one before there were weights
    summary = train.train(dataclasses.replace(both, name="whole"))
    assert losses("both") == losses("whole") and len(losses("whole")) == 20
    assert summary["epochs"] == 10 * (TINY.batch + 4) / len(config.data.sources()[0])


def test_the_first_steps_may_train_a_quantised_relu_network(tmp_path, monkeypatch):
    """They are those of a run of that network alone, the spiking network goes on from its weights, and a resumed run too."""
    monkeypatch.setitem(STAGES, 11, ((4,),))  # compiles in a second
    vgg = dataclasses.replace(MODELS["vgg"], T=2, hidden=8, memory="fast", tau=float("inf"), reset="soft")
    data = dataclasses.replace(DATASETS["random"], like="cifar10")
    options = dict(data=data, out=str(tmp_path), batch=4, steps=6, log_every=2, eval_every=2, average=0.9, warmup=0.0)
    config = dataclasses.replace(TINY, model=vgg, **options)
    losses = lambda name: [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    relu = dataclasses.replace(vgg, T=1, levels=2, tau=None, reset="hard")
    train.train(dataclasses.replace(config, name="relu", model=relu, steps=4))
    both = dataclasses.replace(config, name="both", first_T=1, first_levels=2, first_steps=4, second_rate=0.5)
    with pytest.raises(train.Stopped, match="stopped after step 2"):
        train.train(dataclasses.replace(both, stop_at=2))
    train.train(dataclasses.replace(both, resume=True))
    train.train(dataclasses.replace(both, name="whole"))
    np.testing.assert_allclose(losses("both")[:4], losses("relu"), rtol=1e-5)
    np.testing.assert_allclose(losses("both"), losses("whole"), rtol=1e-5)
    held_out = {row["step"]: name for row in rows(tmp_path / "both") for name in row if name.endswith("_accuracy")}
    assert len(losses("both")) == 6 and held_out == {2: "first_accuracy", 4: "first_accuracy", 6: "eval_accuracy"}


def test_options_of_a_network_reach_its_neurons_and_normalisations():
    options = dict(tau=2.0, reset="soft", surrogate="triangle", v_rest=0.5, memory="lean", scale=0.4)
    for name, detach in (("spikformer", True), ("qkformer", False)):
        config = dataclasses.replace(
            MODELS[name], **options, detach=detach, depth=3, width=16, heads=2, policy="float32"
        )
        modules = [module for _, module in nnx.iter_modules(config.build((8, 8, 3), 10, nnx.Rngs(0)))]
        neurons = {module.neuron for module in modules if isinstance(module, nn.Spiking)}
        scales = [module.scale[...] for module in modules if isinstance(module, nn.BatchNorm)]
        assert neurons == {LIF(reset=SoftReset(detach=detach), surrogate=PiecewiseQuadratic(), v_rest=0.5)}
        assert len(scales) > 5 and all((scale == np.float32(0.4)).all() for scale in scales)


def test_a_checkpoint_of_other_settings_is_refused(whole, tmp_path):
    """A run whose config.json agrees, but whose code builds another network."""
    path = tmp_path / TINY.name
    shutil.copytree(whole[0], path)
    run = runs.Run(configuration.flatten(dataclasses.replace(TINY, out=str(tmp_path), resume=True)))
    model, optimizer = train.create(TINY, (28, 28, 1), 10)
    spiking = next(m for _, m in nnx.iter_modules(model) if hasattr(m, "threshold"))
    spiking.threshold = 1.5
    with pytest.raises(train.Stopped, match=r"threshold was 1 and is 1.5"):
        run.start(model, optimizer)
    run.close()


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
    with pytest.raises(train.Stopped, match="--batch must be at most the 4000 training samples; got 5000"):
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


def test_metrics_are_written_while_later_steps_run_and_a_bad_one_loses_none_before_it(tmp_path):
    run = runs.Run(dict(out=str(tmp_path), name="meter", resume=False))
    run.start(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    meter = runs.Meter(run)
    metrics = lambda *losses: dict(loss=jnp.asarray(losses), accuracy=jnp.zeros(len(losses)))
    assert meter.write(running=2) == {}
    for first, losses in [(1, (1.0, 3.0)), (3, (5.0, 7.0)), (5, (9.0, np.nan))]:
        meter.add(first, metrics(*losses), 2)
    assert meter.write(running=2)["loss"] == "2.000"
    assert [row["step"] for row in run.rows()] == [1, 2]
    with pytest.raises(runs.Stopped, match="loss is nan at step 6"):
        meter.write()
    assert [(row["step"], row["loss"]) for row in run.rows()] == [(1, 1), (2, 3), (3, 5), (4, 7), (5, 9)]
    run.close()


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
    make = lambda seed: nnx.Dropout(0.5, rngs=nnx.Rngs(seed))
    run = runs.Run(configuration.flatten(dataclasses.replace(TINY, out=str(tmp_path))))
    run.start(make(0))
    run.save(1, make(0))
    assert run.saved() == 1
    run.close()
    run = runs.Run(configuration.flatten(dataclasses.replace(TINY, out=str(tmp_path), resume=True)))
    restored = make(1)
    assert run.start(restored) == 1
    run.close()
    got, want, other = (jax.random.key_data(m.rngs.key[...]) for m in (restored, make(0), make(1)))
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, other)


def test_the_split_is_the_data_sets():
    """Stratified, fixed, disjoint, and the one that every other user of the data set sees."""
    train_source, test_source = MNIST5K.sources()
    count = lambda source: Counter(int(sample["label"]) for sample in source)
    assert count(train_source) == dict.fromkeys(range(10), 400) and count(test_source) == dict.fromkeys(range(10), 100)
    ours = [sample["image"].tobytes() for sample in test_source]
    assert ours == [sample["image"].tobytes() for sample in catalog.source("mnist5k", "test")]
    assert not {*ours} & {sample["image"].tobytes() for sample in train_source}


def test_encoding():
    batch = {name: values[:10] for name, values in whole_test(MNIST5K).items()}
    images, key = batch["image"], jax.random.key(0)
    spikes = MNIST5K.encode(key, batch, 200)
    assert_fires(spikes)
    np.testing.assert_allclose(spikes.mean(0), images / 255, atol=0.2)
    assert not jnp.array_equal(spikes, MNIST5K.encode(jax.random.key(1), batch, 200))
    same = Images("mnist5k", encoding="direct").encode(key, batch, 2)
    assert jnp.array_equal(same[0], same[1]) and jnp.allclose(same[0], images / 255)


def test_only_training_images_move():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1)).astype(np.uint8)
    batch = {"image": np.stack([image] * 300)}
    data = dataclasses.replace(MNIST5K, encoding="direct")
    assert np.array_equal(data.encode(jax.random.key(0), batch, 1)[0], batch["image"] / np.float32(255))
    moved, _ = data.augment(jax.random.key(1), batch, jnp.zeros((300, 10)))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    shifted = {padded[i : i + 28, j : j + 28].tobytes(): (i, j) for i in range(5) for j in range(5)}
    xs = np.asarray(data.encode(jax.random.key(1), moved, 1)[0] * 255).round().astype(np.uint8)
    assert len({shifted[x.tobytes()] for x in xs}) == 25


def test_normalised_channels_have_mean_0_and_deviation_1():
    mean, deviation = map(np.array, STATISTICS["cifar10"])
    images = np.stack([mean + sign * deviation for sign in (-1, 1)])[:, None, None]
    batch = {"image": np.round(np.broadcast_to(images, (2, 4, 4, 3)) * 255).astype(np.uint8)}
    xs = Images("cifar10", encoding="direct", normalise=True).encode(jax.random.key(0), batch, 2)
    np.testing.assert_allclose(xs[1], np.broadcast_to([[[[-1]]], [[[1]]]], (2, 4, 4, 3)), atol=0.02)
    own = Images("mnist5k", encoding="direct", normalise=True, mean=(0.2,), deviation=(0.5,))
    np.testing.assert_allclose(own.encode(jax.random.key(0), {"image": np.full((1, 2, 2, 1), 0.7, "f")}, 1), 1.0)
    with pytest.raises(ValueError, match="--data.mean must have a number for each of 3 channels; got"):
        own.encode(jax.random.key(0), batch, 1)


def test_each_random_change_of_images_has_a_key_of_its_own(monkeypatch):
    keys = []
    for name in ("crop", "flip", "move", "rand_augment", "cutout", "mixup", "cutmix"):

        def note(key, images, *args, name=name, **options):
            keys.append(tuple(jax.random.key_data(key).tolist()))
            return (images, args[0]) if name in ("mixup", "cutmix") else images

        monkeypatch.setattr(image_augment, name, note)
    every = dict(shift=1, flip=True, scale=0.1, rand_augment=1, cutout=2, mixup=0.2, cutmix=1.0)
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8)}
    Images("mnist5k", **every).augment(jax.random.key(0), batch, jnp.eye(10)[:2])
    assert len(keys) == len(set(keys)) == 7


def test_the_report_shows_images_as_they_are_also_if_they_are_normalised():
    data = dataclasses.replace(TINY.data, encoding="direct", normalise=True, mean=(0.5,), deviation=(0.1,))
    source, figure = data.sources()[1][:1], matplotlib.pyplot.figure()
    train.report._worst(figure, dataclasses.replace(TINY, data=data), source, np.eye(10)[:1], np.array([3]))
    image = source[0]["image"][..., 0]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), image / image.max())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mean=(0.1,), deviation=(0.0,)), "number for each channel, deviations above 0; got .0.1,. and .0.0,."),
        (dict(mean=(0.1, 0.2), deviation=(1.0,)), "a finite number for each channel, deviations above 0"),
        (dict(mean=(), deviation=()), "a finite number for each channel"),
        (dict(mean=(0.1,), deviation=(np.inf,)), "a finite number for each channel"),
        (dict(mean=(np.nan,), deviation=(1.0,)), "a finite number for each channel"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Images(**dict(name="mnist5k", encoding="direct", normalise=True) | options)


def test_a_run_keeps_the_statistics_of_its_training_images_and_resumes_with_no_others(tmp_path, monkeypatch, capsys):
    direct = dataclasses.replace(TINY.data, encoding="direct", normalise=True)
    config = dataclasses.replace(TINY, data=direct, out=str(tmp_path), steps=2, stop_at=1)
    with pytest.raises(train.Stopped, match="stopped after step 1"):
        train.train(config)
    images = np.stack([sample["image"] for sample in direct.sources()[0]]) / 255
    saved = json.loads((tmp_path / "mnist5k" / "config.json").read_text())
    np.testing.assert_allclose(
        [saved["data.mean"][0], saved["data.deviation"][0]], [images.mean(), images.std()], atol=1e-5
    )
    train_samples, test_samples = direct.sources()
    resumed = dataclasses.replace(config, stop_at=None, resume=True)
    for change, message in (
        (lambda image: image // 2, f"was made with data.deviation={re.escape(str(saved['data.deviation']))}; got"),
        (lambda image: 0 * image, "channel 0 of the training images of mnist5k has the same value everywhere"),
    ):
        others = [sample | {"image": change(sample["image"])} for sample in train_samples]
        with monkeypatch.context() as patch, pytest.raises((train.Stopped, OSError), match=message):
            patch.setattr(Few, "sources", lambda self, others=others: (others, test_samples))
            train.train(resumed)
    train.train(resumed)


def test_the_pieces_of_the_image_recipe_train_together_and_the_average_is_what_is_evaluated(tmp_path):
    every = dict(flip=True, rand_augment=1, cutout=8, mixup=0.2, cutmix=1.0, encoding="direct")
    recipe = dict(optimizer="sgd", loss="tet", label_smoothing=0.1, average=0.9, neuron_rate=0.5)
    config = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, **every), out=str(tmp_path), **recipe)
    train.train(dataclasses.replace(config, steps=6, eval_every=6))
    path, fixed = tmp_path / TINY.name, dataclasses.replace(config, out="runs", steps=6, eval_every=6)
    objects = train.create(fixed, (28, 28, 1), 10)
    training.from_arrays(checkpoint(path, 6), *objects)
    (row,) = [row for row in rows(path) if "eval_loss" in row]
    weights, average = (train.evaluate(fixed, objects[i], config.data.sources()[1])[0] for i in (0, 2))
    assert row["eval_loss"] == pytest.approx(average["loss"], rel=1e-5)
    assert average["loss"] != pytest.approx(weights["loss"], rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_library_can_be_built(name):
    small = dict(conv=dict(channels=(4,)), vgg=dict(hidden=8), spikformer=dict(depth=1, width=16, heads=2))
    small = (small | dict(qkformer=dict(depth=3, width=32, heads=2))).get(name, {})
    chosen = dataclasses.replace(MODELS[name], T=2, **small)
    model = nnx.eval_shape(lambda: chosen.build((32, 32, 3), 7, nnx.Rngs(0)))
    outs = nnx.eval_shape(lambda model, xs: model(xs)[0], model, jnp.zeros((2, 3, 32, 32, 3)))
    assert outs.shape == (2, 3, 7)


def test_evaluation_counts_every_sample_once():
    config = dataclasses.replace(TINY, data=Few("mnist5k", encoding="direct"))
    model, _ = train.create(config, (28, 28, 1), 10)
    batch = whole_test(config.data)
    got, answers = train.evaluate(config, model, config.data.sources()[1], batch=50)
    model.eval()
    logits = np.asarray(READOUTS["mean"](model(config.data.encode(jax.random.key(0), batch, 3))[0]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert got["accuracy"] == pytest.approx((logits.argmax(-1) == batch["label"]).mean())
    assert got["loss"] == pytest.approx(-logp[np.arange(125), batch["label"]].mean(), rel=1e-5)
    found, labels = train.joined(answers)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    np.testing.assert_array_equal(labels, batch["label"])


def parse(*arguments):
    return configuration.parse(list(arguments), train.Config(), train.CHOICES)


def test_overrides():
    config = parse("--steps", "7", "--steps=8", "--model.T=8", "--model.channels", "8", "16", "--resume")
    assert (config.steps, config.model.T, config.model.channels, config.resume) == (8, 8, (8, 16), True)
    assert (config.stop_at, parse("--stop_at=None", "--clip", "None").clip) == (None, None)
    assert parse("--data.repeat", "1", "--data", "mnist").data == Images("mnist")
    assert parse("--model=resnet", "--model.T=2").model == dataclasses.replace(MODELS["resnet"], T=2)
    assert parse() == train.Config()
    flat = configuration.flatten(parse("--data", "digits"))
    assert flat["data"] == "digits" and flat["model"] == "conv" and flat == json.loads(json.dumps(flat))
    assert {"data.encoding", "model.T", "steps"} <= flat.keys() and "data.name" not in flat


@pytest.mark.parametrize("name", DATASETS)
def test_every_listed_data_set_can_be_trained_on(name):
    config = parse("--data", name)
    assert configuration.flatten(config)["data"] == name and config.data.classes >= 3


def test_an_update_after_every_k1_time_steps():
    """With k1 = T it is a usual step; with k1 = 2, k2 = 4 the weights change twice a batch, and the schedule has as many steps."""
    rng, found = np.random.default_rng(0), {}
    batch = dict(image=rng.integers(0, 256, (8, 28, 28, 1), np.uint8), label=np.arange(8, dtype=np.int32))
    small = dataclasses.replace(TINY, model=ConvNet(T=4, channels=(2,), hidden=4), batch=8, loss="tet", warmup=0.0)
    for k1, k2 in ((None, None), (4, None), (2, 4)):
        config = dataclasses.replace(small, update_every=k1, reach=k2)
        model, optimizer = train.create(config, (28, 28, 1), 10)
        metrics = train.train_step_from_host(config, tuple(batch))(model, optimizer, batch, np.int32(1))
        found[k1] = nnx.to_pure_dict(nnx.state(model, nnx.Param)), metrics, int(optimizer.step[...])
    for a, b in zip(*(jax.tree.leaves(found[k1][:2]) for k1 in (None, 4)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [found[k1][2] for k1 in (None, 4, 2)] == [1, 1, 2] and config.updates == 2
    assert all(jnp.isfinite(value) for value in found[2][1].values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--modle.T", "3"), "--modle.T.*Perhaps you meant: --model.T"),
        (("--model.chanels", "3"), "--model.chanels.*Perhaps you meant: --model.channels"),
        (("--step", "3"), "--step.*Perhaps you meant: .*--steps INT"),
        (("--steps.x", "3"), "--steps.x"),
        (("--steps",), "Missing value for argument '--steps'"),
        (("steps=3",), "steps=3"),
        (("--steps", "ten"), "--steps.*'ten'"),
        (("--steps", "0"), "--steps must be at least 1; got 0"),
        (("--steps_per_call", "4"), "--steps_per_call must divide --log_every and --eval_every; got 4"),
        (("--truncate",), "--truncate needs --piece, or it has no effect; got --piece None"),
        (("--piece", "0"), "--piece must be at least 1; got 0"),
        (("--update_every", "3"), "--update_every must divide --model.T, 4; got 3"),
        (("--update_every", "2", "--reach", "3"), "--reach must be a multiple of --update_every, 2; got 3"),
        (("--update_every", "2", "--piece", "2"), "--update_every goes without --piece; got 2"),
        (("--first_T", "1", "--first_steps", "400"), "--first_steps must be from 0 to less than --steps, 400; got 400"),
        (("--first_T", "1", "--first_steps", "15"), "--first_steps a multiple of --log_every; got 1 and 15"),
        (("--first_T", "99", "--first_steps", "10"), "--first_T must be from 1 to --model.T, .*; got 99 and 10"),
        (("--second_batch", "0", "--first_T", "1", "--first_steps", "10"), "--second_batch must be at least 1; got 0"),
        (("--second_rate", "2"), "--second_rate must be above 0 and at most 1; got 2"),
        (("--model", "vgg", "--model.levels", "4"), "--model.levels must be at least 1, and needs --model.memory fast"),
        (("--model", "vgg", "--model.tau", "2", "--model.v_rest", "1"), "--model.v_rest must be less than .*; got 1"),
        (("--model", "vgg", "--model.scale", "0"), "--model.scale must be a finite number above 0; got 0"),
        (("--rate_weight", "nan"), "--rate_weight at least 0; got 'neuron' and nan"),
        (("--model", "vgg", "--model.depth", "13"), "--model.depth must be one of 11, 16; got 13"),
        (("--workers", "-1"), "--workers must be at least 0; got -1"),
        (("--learning_rate", "-1"), "--learning_rate must be a finite number, at least 0 .*; got -1"),
        (("--weight_decay", "nan"), "--weight_decay must be a finite number.*; got nan"),
        (("--data", "spoken_digits", "--data.noise", "nan"), "--data.noise must be at least 0 and finite; got nan"),
        (("--model", "mlp"), "--model must be one of conv, .*spikformer, .*; got 'mlp'"),
        (("--data", "dvsgesture"), r"--data must be one of mnist5k,.*did you mean dvs128_gesture"),
        (("--model.channels", "8,x"), "--model.channels"),
        (("--model.readout", "sum"), "--model.readout must be one of rate, mean, max, last; got 'sum'"),
        (("--model.implementation", "cuda"), "--model.implementation must be None or one of .*scan.*got 'cuda'"),
        (("--data.encoding", "morse"), "--data.encoding must be direct or bernoulli; got 'morse'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    try:
        status = train.main(list(arguments))
    except SystemExit as stopped:  # tyro's own messages
        status = stopped.code
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status == 2 and re.search(message, said), said


def test_help_shows_the_chosen_model_and_data(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", "resnet", "--data", "random", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--model.hidden" not in text and "synthetic_saccades" in text
    chosen = parse("--model", "resnet", "--data", "random")
    assert all(f"--{key}" in text for key in configuration.flatten(chosen))


def test_an_interrupt_before_the_first_step_is_a_line(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Images, "sources", interrupted)
    assert train.main([]) == 130
    assert capsys.readouterr().err == f"{train.interrupt.MESSAGE}\n"


@pytest.mark.parametrize("script", ["train.py", "paper.py"])
def test_an_interrupt_while_packages_are_imported_is_a_line(script, tmp_path):
    """A tyro that sends SIGINT in the middle of its import."""
    (tmp_path / "tyro.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    path = Path(train.__file__).parent / script
    run = subprocess.run(
        [sys.executable, path], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr.strip()) == (130, "", train.interrupt.MESSAGE)


def test_compiled_programs_are_kept_in_the_users_cache_but_not_those_of_tests(tmp_path, monkeypatch):
    assert not jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        train.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "snnfuse" / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_own_data_without_a_test_split_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    from snnfuse.data import catalog

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "shapes" / "train" / "ball").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "shapes" / "train" / "ball" / "0.png")
    catalog.prepare("shapes", manual=tmp_path)
    with pytest.raises(catalog.archives.Missing, match="needs the splits train and test: shapes has splits train"):
        Images("shapes").sources()
