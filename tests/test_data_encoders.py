"""Encoders: shapes, statistics, equations, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snnfuse.data import encoders

KEY = jax.random.key(0)
RAMP = jnp.linspace(0, 1, 11)
MANY, STEPS = jnp.tile(RAMP, (100, 1)), 400  # one shape for all that draw bits: compiling is most of their time
ENCODERS = {
    "direct": encoders.direct,
    "bernoulli": lambda images, T, **kw: encoders.bernoulli(KEY, images, T, **kw),
    "poisson": lambda images, T, **kw: encoders.poisson(KEY, images, T, **kw),
    "latency": encoders.latency,
    "phase": encoders.phase,
}


@pytest.mark.parametrize(
    "name, T, dtype",
    [(name, 7, jnp.bool_) for name in ENCODERS] + [(name, 1, jnp.bfloat16) for name in ("direct", "latency", "phase")],
)
def test_time_first_in_the_dtype_asked(name, T, dtype):
    images = jax.random.uniform(KEY, (2, 3, 5))
    spikes = ENCODERS[name](images, T, dtype=dtype)
    assert spikes.shape == (T, 2, 3, 5) and spikes.dtype == dtype


@pytest.mark.parametrize("name", ENCODERS)
def test_refuses_integer_images_and_no_steps(name):
    with pytest.raises(TypeError, match="images must be floating"):
        ENCODERS[name](jnp.arange(4), 3)
    with pytest.raises(ValueError, match="T must be at least 1"):
        ENCODERS[name](RAMP, 0)


def test_bernoulli_rate_is_the_intensity_and_steps_are_independent():
    T, n = STEPS, len(MANY)
    spikes = np.asarray(encoders.bernoulli(KEY, MANY, T))
    assert set(np.unique(spikes)) == {0, 1}
    p = np.asarray(RAMP)
    sd = np.sqrt(p * (1 - p) / (T * n))
    assert np.all(np.abs(spikes.mean((0, 1)) - p) <= 5 * sd)  # 0 and 1 exactly
    middle = spikes[:, :, 5] - 0.5
    assert abs((middle[1:] * middle[:-1]).mean()) < 5 * 0.25 / np.sqrt((T - 1) * n)  # in time
    assert abs((middle[:, 1:] * middle[:, :-1]).mean()) < 5 * 0.25 / np.sqrt(T * (n - 1))  # in space


def test_bernoulli_is_the_papers_protocol_with_our_generator():
    images, rand = MANY, jax.random.uniform(KEY, (STEPS, *MANY.shape))
    assert jnp.array_equal(encoders.bernoulli(KEY, images, STEPS), encoders.paper(images, rand))
    assert jnp.array_equal(encoders.paper(images, rand), np.asarray(images) > np.asarray(rand))
    assert not encoders.paper(jnp.full(3, 0.5), jnp.full((1, 3), 0.5)).any()  # equal is no spike
    with pytest.raises(ValueError, match="rand must be"):
        encoders.paper(images, rand[:, :3])


def test_keys_decide_everything():
    a, b, c = (encoders.bernoulli(jax.random.key(k), MANY, STEPS) for k in (0, 0, 1))
    assert jnp.array_equal(a, b) and not jnp.array_equal(a, c)


def test_poisson_mean_and_variance():
    counts = np.asarray(encoders.poisson(KEY, jnp.full(20_000, 0.6), 10, rate=2.5))
    assert abs(counts.mean() - 1.5) < 5 * np.sqrt(1.5 / counts.size)
    assert abs(counts.var() - 1.5) < 0.05
    assert counts.max() > 1


def test_direct_repeats():
    assert jnp.array_equal(encoders.direct(RAMP, 3), jnp.stack([RAMP] * 3))


def test_latency_spikes_once_brighter_earlier():
    spikes = encoders.latency(RAMP, 11)
    assert jnp.array_equal(spikes.sum(0), (RAMP > 0).astype(jnp.float32))
    assert jnp.array_equal(spikes[:, 1:].argmax(0), jnp.arange(9, -1, -1))
    assert encoders.latency(RAMP, 11, silent_to=-1.0)[10, 0] == 1


@pytest.mark.parametrize("T", [5, 30, 500])
def test_latency_log_is_its_equation_in_float64(T):
    images = np.linspace(0, 1, 37)
    spikes = np.asarray(encoders.latency(jnp.asarray(images, jnp.float32), T, curve="log", silent_to=-1.0))
    wanted = (T - 1) - np.log1p(np.expm1(T - 1.0) * images)
    assert np.all(spikes.sum(0) == 1)
    assert np.all(np.abs(spikes.argmax(0) - wanted) <= 0.501)
    with pytest.raises(ValueError, match="curve"):
        encoders.latency(RAMP, T, curve="cubic")


def test_delta_marks_changes():
    xs = jnp.array([[0.0], [0.5], [0.5], [0.1], [0.05], [0.9]])
    spikes = encoders.delta(xs, 0.3)
    assert spikes.shape == (6, 1, 2)
    assert spikes[:, 0, 0].tolist() == [0, 1, 0, 0, 0, 1]
    assert spikes[:, 0, 1].tolist() == [0, 0, 0, 1, 0, 0]
    assert jnp.array_equal(encoders.delta(xs, 0.3, two_sided=False), spikes[..., 0])
    with pytest.raises(ValueError, match="threshold"):
        encoders.delta(xs, 0.0)


def test_population_nearest_field_answers_first():
    K = 10
    spikes = encoders.population(jnp.array([0.0, 0.3, 1.0]), 20, K)
    assert spikes.shape == (20, 3, K) and spikes.sum(0).max() == 1
    first = jnp.where(spikes.any(0), spikes.argmax(0), 99).argmin(-1)
    centres = (np.arange(K) - 0.5) / (K - 2)
    assert [abs(centres[k] - x) <= 0.5 / (K - 2) + 1e-6 for k, x in zip(first, (0.0, 0.3, 1.0), strict=True)] == [
        True
    ] * 3
    with pytest.raises(ValueError, match="neurons"):
        encoders.population(RAMP, 20, 2)


@pytest.mark.parametrize("bits", [1, 4, 8, 24])
def test_phase_weighs_back_to_the_image(bits):
    images = jax.random.uniform(KEY, (100,))
    spikes = encoders.phase(images, 2 * bits, bits)
    assert jnp.array_equal(spikes[:bits], spikes[bits:])
    back = (spikes[:bits] * encoders.phase_weights(bits, bits)[:, None]).sum(0)
    assert jnp.array_equal(back, jnp.floor(images * 2**bits) / 2**bits)
    assert encoders.phase(jnp.ones(1), bits, bits).all()


SPIKING = {name: f for name, f in ENCODERS.items() if name != "direct"} | {
    "population": encoders.population,
    "paper": lambda images, T, **kw: encoders.paper(images, jnp.full((T, *images.shape), 0.5), **kw),
}


@pytest.mark.parametrize("name", SPIKING)
@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan, np.inf])
def test_images_outside_the_range_are_an_error(name, value):
    images = np.full((2, 3), 0.5, np.float32)
    images[1, 2] = value
    with pytest.raises(ValueError, match=rf"images must be in \[0, 1\]; got {value:g} at \(1, 2\)"):
        SPIKING[name](images, 4)


@pytest.mark.parametrize("name", SPIKING)
def test_inside_jit_images_are_clipped_and_nan_is_0(name):
    images = jnp.array([-3.0, jnp.nan, -jnp.inf, 0.25, 1.0, 1.5, jnp.inf])
    clipped = jnp.array([0.0, 0.0, 0.0, 0.25, 1.0, 1.0, 1.0])
    got = jax.jit(lambda images: SPIKING[name](images, 50))(images)
    assert jnp.array_equal(got, SPIKING[name](clipped, 50)) and got.any() and got.min() == 0


def test_direct_and_delta_take_any_finite_value():
    standardised = jnp.array([-1.7, 0.0, 2.3])
    assert jnp.array_equal(encoders.direct(standardised, 2)[1], standardised)
    assert encoders.delta(jnp.array([-5.0, 5.0, 5.0]), 1.0)[:, 0].tolist() == [0, 1, 0]
    for encode in (lambda xs: encoders.direct(xs, 2), lambda xs: encoders.delta(xs, 1.0)):
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match=rf"must be finite; got {value:g} at \(1,\)"):
                encode(jnp.array([0.0, value]))


@pytest.mark.parametrize("rate", [-1.0, np.nan, np.inf, 2.0**21])
def test_poisson_refuses_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1.04858e\+06\]; got"):
        encoders.poisson(KEY, RAMP, 3, rate=rate)
    inside = jax.jit(lambda rate: encoders.poisson(KEY, RAMP, 3, rate=rate, dtype=jnp.int32))(rate)
    assert inside.min() == 0 and bool(inside.any()) == bool(rate > 0)


def test_poisson_counts_do_not_wrap():
    image = jnp.ones(3)
    assert (encoders.poisson(KEY, image, 2, rate=1000.0, dtype=jnp.uint8) == 255).all()
    assert (encoders.poisson(KEY, image, 2, rate=1000.0, dtype=jnp.int8) == 127).all()
    assert not encoders.poisson(KEY, 0 * image, 2, rate=1000.0, dtype=jnp.bool_).any()
