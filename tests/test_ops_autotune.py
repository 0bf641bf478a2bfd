"""Autotuning stores the fastest block sizes in its file, later calls use them, and no result changes."""

import json

import cases
import numpy as np
import pytest

import snnfuse as sf
from snnfuse.ops import pallas_triton, tuning
from snnfuse.ops.blocks import Blocks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.read.cache_clear()
    yield tmp_path / "snnfuse" / "blocks.json"
    tuning.read.cache_clear()


def test_finds_keeps_and_uses_the_fastest(cache, monkeypatch):
    candidates = [Blocks(64, 2, 3), Blocks(32, 1, 6, True)]
    monkeypatch.setattr(pallas_triton.INTERPRET, "candidates", lambda problem: candidates)
    neuron, params, state, xs, _ = cases.make("cuba", T=12, lanes=(3, 50))
    before = sf.explain(neuron, params, state, xs, implementation="interpret").blocks
    want, _ = sf.unroll(neuron, params, state, xs, implementation="interpret")
    timed = sf.autotune(neuron, params, state, xs, implementation="interpret")
    assert {b for _, b in timed} == {before, *candidates} and timed == sorted(timed)
    assert list(json.loads(cache.read_text()).values()) == [list(timed[0][1])]

    other = next(b for _, b in timed if b != before)
    tuning.write(
        next(iter(tuning.read())), other
    )  # replace the fastest, whichever it was, by sizes that the heuristic does not choose
    assert sf.explain(neuron, params, state, xs, implementation="interpret").blocks == other
    got, _ = sf.unroll(neuron, params, state, xs, implementation="interpret")
    np.testing.assert_array_equal(got, want)
    assert sf.explain(neuron, params, state, xs[:8], implementation="interpret").blocks != other


def test_a_spoilt_file_is_named(cache):
    cache.parent.mkdir()
    cache.write_text("{")
    neuron, *args, _ = cases.make("lif")
    with pytest.raises(ValueError, match=r"blocks.json, the block sizes kept by snnfuse.autotune, is not JSON"):
        sf.unroll(neuron, *args, implementation="interpret")
    assert cache.read_text() == "{"


def test_scan_has_nothing_to_tune():
    neuron, *args, _ = cases.make("lif")
    with pytest.raises(NotImplementedError, match="no block sizes"):
        sf.autotune(neuron, *args, implementation="scan")
