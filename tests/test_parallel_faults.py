"""Training that is killed, whose checkpoints are damaged, or whose disk is full: what it says and how it goes on."""

import dataclasses
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import TINY, rows, train, without_pictures  # the smallest experiment, and the path to it

# isort: split
from checkpoints import Checkpoints, NotSaved

pytestmark = pytest.mark.filterwarnings("default")  # Orbax and Grain have their own
CONFIG = dataclasses.replace(TINY, name="killed", steps=30, eval_every=5)
RUN = """
import sys
sys.path[:0] = [{tests!r}, {experiments!r}]
import faster, dataclasses, train
from test_parallel_faults import CONFIG
train.train(dataclasses.replace(CONFIG, out=sys.argv[1], resume=sys.argv[2] == "true"))
"""
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Orbax's remains of a damaged checkpoint warn when they are collected. Collect them here, where warnings are allowed."""
    gc.freeze()  # what was there before is not searched
    yield
    gc.collect()
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def no_picture():
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train.train(dataclasses.replace(CONFIG, out=str(out)))
    return out / CONFIG.name


def start(out, resume=False):
    code = RUN.format(tests=str(HERE), experiments=str(HERE.parent / "experiments"))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out), str(resume).lower()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_until(condition, process, every):
    while not condition():
        assert process.poll() is None, f"it ended before it could be killed: {process.stderr.read()[-2000:]}"
        time.sleep(every)


def kill_when(process, condition, every=0.02):
    wait_until(condition, process, every)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


def test_killed_at_a_random_step_and_while_saving_it_repeats_the_same_losses(whole, tmp_path):
    path, at = tmp_path / CONFIG.name, random.randint(7, 20)
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    kill_when(start(tmp_path), lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= at)
    saved = [int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()]
    # then go on, and kill it in the middle of its next save
    being_saved = lambda: any(
        "tmp" in p.name and int(p.name.split(".")[0]) > max(saved, default=0) for p in checkpoints.iterdir()
    )
    for p in checkpoints.glob("*tmp*"):
        shutil.rmtree(p)
    second, rows_before = start(tmp_path, resume=True), metrics.stat().st_mtime_ns
    wait_until(lambda: metrics.stat().st_mtime_ns != rows_before, second, every=0.02)  # it trains
    kill_when(second, being_saved, every=0.0005)
    train.train(dataclasses.replace(CONFIG, out=str(tmp_path), resume=True))
    assert rows(path) == rows(whole), f"killed after {at} rows"


def damaged(path, step, how):
    """Truncate, or flip one byte of, the largest file of a checkpoint: the one with the arrays."""
    files = [p for p in (path / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 255
    largest.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(whole, tmp_path, capfd, how):
    path = tmp_path / CONFIG.name
    shutil.copytree(whole, path)
    damaged(path, 30, how)
    train.train(dataclasses.replace(CONFIG, out=str(tmp_path), resume=True))
    assert "checkpoint of step 30 is damaged" in (err := capfd.readouterr().err) and "using the one before it" in err
    assert rows(path) == rows(whole)
    assert (path / "damaged-checkpoint-30").is_dir()
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["25", "30"]


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {f"layer {i}": jnp.asarray(rng.standard_normal(20_000), jnp.float32) for i in range(3)}


def test_every_damage_is_found(tmp_path):
    """A flipped byte anywhere in the arrays either is an error or does not change them."""
    with_both = Checkpoints(tmp_path / "a")
    for step in (1, 2):
        with_both.save(step, arrays(step))
    with_both.close()
    files = [
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a" / "2").rglob("*") if p.is_file() and p.stat().st_size
    ]
    assert len(files) > 5
    found = 0
    for i, file in enumerate(files):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(tmp_path / "a", copy)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 3] ^= 255
        (copy / file).write_bytes(content)
        checkpoints = Checkpoints(copy)
        step, restored = checkpoints.restore(arrays(0))
        checkpoints.close()
        found += step == 1
        for name, x in arrays(step).items():
            np.testing.assert_array_equal(restored[name], x, err_msg=f"{file}: step {step}, {name}")
    assert found >= 2


def test_no_whole_checkpoint_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, arrays(7))
    assert checkpoints.last() == 7
    for p in (tmp_path / "7").rglob("*"):
        if p.is_file():
            p.write_bytes(bytes(b ^ 255 for b in p.read_bytes()))
    with pytest.raises(NotSaved, match=r"none of the checkpoints in .* is whole, and all are left there: step 7: "):
        checkpoints.restore(arrays(0))
    assert (tmp_path / "7").is_dir()
    checkpoints.close()


FULL = """
import resource, signal, sys
sys.path[:0] = [{tests!r}, {experiments!r}]
import faster
from test_parallel_faults import Checkpoints, NotSaved, Path, arrays
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
c = Checkpoints(Path(sys.argv[1]))
c.save(1, arrays(1)); c.save(2, arrays(2)); c.last()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    c.save(3, arrays(3)); c.last()
except NotSaved as e:
    print(e)
"""


def test_a_disk_that_fills_up_loses_no_older_checkpoint(tmp_path):
    """No file may grow beyond 20 kB, which the system reports to a writer as a full disk is."""
    code = FULL.format(tests=str(HERE), experiments=str(HERE.parent / "experiments"))
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "cannot write a checkpoint" in result.stdout, result.stderr[-3000:]
    assert "File too large" in result.stdout and "is of step 2" in result.stdout
    checkpoints = Checkpoints(tmp_path)
    step, restored = checkpoints.restore(arrays(0))
    checkpoints.close()
    assert step == 2 and sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()) == [1, 2]
    np.testing.assert_array_equal(restored["layer 1"], arrays(2)["layer 1"])


def test_a_place_that_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(train.Stopped, match="cannot write to .*Not a directory"):
        train.train(dataclasses.replace(CONFIG, out=str(tmp_path / "file")))
    full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(train.Stopped, match="its disk has 1 MiB free"):
        train.train(dataclasses.replace(CONFIG, out=str(tmp_path)))


if os.geteuid() != 0:  # root may write anywhere

    def test_a_directory_without_permission_is_an_error_before_training(tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(train.Stopped, match="cannot write to .*Permission denied"):
            train.train(dataclasses.replace(CONFIG, out=str(tmp_path / "runs")))
