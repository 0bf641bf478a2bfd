"""Augmentations of images: their statistics, and RandAugment's transforms beside Pillow's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

from snnfuse.data import draws
from snnfuse.data import image_augment as ia

KEY = jax.random.key(3)


def images(B=400, H=8, W=10, C=3, seed=0):
    return jax.random.uniform(jax.random.key(seed), (B, H, W, C))


def test_flip_mirrors_about_the_given_share_of_images():
    xs = images()
    out = ia.flip(KEY, xs, 0.3)
    same, mirrored = (out == xs).all((1, 2, 3)), (out == xs[:, :, ::-1]).all((1, 2, 3))
    assert bool((same ^ mirrored).all())
    assert abs(float(mirrored.mean()) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_takes_every_place_equally_often(mode):
    xs = images(B=900)
    out = np.asarray(ia.crop(KEY, xs, 1, mode))
    padded = np.pad(xs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode)
    counts = np.array(
        [[(out == padded[:, y : y + 8, x : x + 10]).all((1, 2, 3)).sum() for x in range(3)] for y in range(3)]
    )
    assert counts.sum() == 900
    assert abs(counts - 100).max() < 4 * 100**0.5


def test_images_are_scaled_and_turned_by_uniform_draws_around_their_middle():
    grid = np.mgrid[-16:17, -16:17]
    blob = np.exp(-((grid[0] + 6) ** 2 + grid[1] ** 2) / 8)  # 6 pixels above the middle
    xs = jnp.broadcast_to(jnp.stack([blob, 0.5 * blob], -1), (800, 33, 33, 2))
    out = np.asarray(jax.jit(lambda key: ia.move(key, xs, scale=0.5, turn=90))(KEY))
    np.testing.assert_allclose(out[..., 1], 0.5 * out[..., 0], atol=1e-6)
    y, x = np.einsum("bij,aij->ab", out[..., 0], grid) / out[..., 0].sum((1, 2))
    factor, angle = np.hypot(x, y) / 6, np.degrees(np.arctan2(x, -y))  # clockwise, as y points down
    assert scipy.stats.kstest(np.log(factor) / np.log(1.5), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(angle / 90, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(factor, angle)[0, 1]) < 0.12
    whole = ia.move(KEY, xs[:2], fill=0.7)  # nothing changes
    np.testing.assert_allclose(whole, xs[:2], atol=1e-6)
    assert ia.move(KEY, jnp.zeros((40, 8, 8, 1)), turn=45, fill=0.7).max() == pytest.approx(0.7)


def test_cutout_covers_a_square_with_its_centre_anywhere():
    out = np.asarray(ia.cutout(KEY, jnp.ones((2000, 8, 10, 2)), 4, jnp.array([0.25, 0.5])))
    hole = out[..., 0] == 0.25
    assert np.array_equal(hole, out[..., 1] == 0.5)
    assert set(np.unique(out[..., 0])) == {0.25, 1.0}
    # a row is covered by a square whose first row is in 4 of the 8 places, or fewer at the border
    want = [np.mean([c - 2 <= i < c + 2 for c in range(8)]) for i in range(8)]
    np.testing.assert_allclose(hole.any(2).mean(0), want, atol=0.05)
    assert hole.any(2).sum(1).max() == hole.any(1).sum(1).max() == 4
    assert np.array_equal(hole, hole.any(2)[:, :, None] & hole.any(1)[:, None, :])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0])
def test_shares_have_the_distribution_beta_and_need_no_loop(alpha):
    draw = jax.jit(lambda key: draws.beta_share(key, alpha, (20_000,)))
    shares = draw(KEY)
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).statistic < 0.014  # p = 0.001
    text, loops = (
        str(jax.make_jaxpr(draw)(KEY)),
        str(jax.make_jaxpr(lambda key: jax.random.beta(key, alpha, alpha))(KEY)),
    )
    assert "gamma" in loops and not any(word in text for word in ("gamma", "while", "scan"))


def test_mixup_mixes_images_and_targets_by_one_share():
    xs, targets = images(B=6), jax.nn.one_hot(jnp.arange(6), 6)
    shares, mixup = [], jax.jit(ia.mixup, static_argnums=3)
    for i in range(200):
        out, mixed = mixup(jax.random.key(i), xs, targets, 0.5)
        share = float(mixed[0, 0])
        np.testing.assert_allclose(out, share * xs + (1 - share) * xs[::-1], atol=1e-6)
        np.testing.assert_allclose(mixed, share * targets + (1 - share) * targets[::-1], atol=1e-6)
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 0.1  # Beta(1/2, 1/2) has mean 1/2 and variance 1/8
    assert abs(np.var(shares) - 1 / 8) < 0.03


def test_cutmix_mixes_the_targets_by_the_area_that_it_replaces():
    xs, targets = images(B=6), jax.nn.one_hot(jnp.arange(6), 6)
    areas, cutmix = [], jax.jit(ia.cutmix)
    for i in range(400):
        out, mixed = cutmix(jax.random.key(i), xs, targets)
        cut = np.asarray(out == xs[::-1]).all((0, 3))
        assert np.array_equal(np.where(cut[..., None], xs[::-1], xs), out)
        assert np.array_equal(cut, cut.any(1)[:, None] & cut.any(0)[None])  # a rectangle
        np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(mixed[0, 5], cut.mean(), atol=1e-6)
        areas.append(cut.mean())
    assert 0.2 < np.mean(areas) < 0.45  # 1/2, less what lies outside
    assert min(areas) < 0.02 and max(areas) > 0.85


compiled_transforms = jax.jit(ia._transformed)


def transformed(name, strength, x, fill=0.5):
    which = jnp.full(len(x), ia.RAND_AUGMENT.index(name))
    return np.asarray(compiled_transforms(x, which, jnp.full(len(x), strength), fill))


def pillow(f, x):
    return (
        np.stack(
            [np.asarray(f(Image.fromarray(np.asarray(np.round(np.asarray(image) * 255), np.uint8)))) for image in x]
        )
        / 255
    )


ENHANCE = dict(
    brightness=ImageEnhance.Brightness,
    color=ImageEnhance.Color,
    contrast=ImageEnhance.Contrast,
    sharpness=ImageEnhance.Sharpness,
)
WITH_PILLOW = {
    "identity": lambda s: lambda im: im,
    "posterize": lambda s: lambda im: ImageOps.posterize(im, 8 - round(4 * abs(s))),
    "solarize": lambda s: lambda im: ImageOps.solarize(im, 255 * (1 - abs(s))),
    "autocontrast": lambda s: ImageOps.autocontrast,
    "equalize": lambda s: ImageOps.equalize,
    **{name: lambda s, make=make: lambda im: make(im).enhance(1 + 0.9 * s) for name, make in ENHANCE.items()},
}  # fmt: skip


@pytest.mark.parametrize("strength", [0.5, -0.5])
@pytest.mark.parametrize("name", WITH_PILLOW)
def test_colours_change_as_in_pillow(name, strength):
    smooth = jnp.linspace(0.1, 0.7, 20 * 24).reshape(1, 20, 24, 1) * jnp.array([1.0, 0.8, 0.6])
    x = jnp.round(jnp.clip(jnp.concatenate([smooth, images(1, 20, 24)]), 0, 1) * 255) / 255
    np.testing.assert_allclose(transformed(name, strength, x), pillow(WITH_PILLOW[name](strength), x), atol=2.1 / 255)


@pytest.mark.parametrize("strength", [0.4, -0.4])
@pytest.mark.parametrize("name", ia.GEOMETRIC)
def test_images_move_as_in_pillow(name, strength):
    x = jnp.round(images(2, 21, 21) * 255) / 255
    shear, move, c = 0.3 * strength, 150 / 331 * 21 * strength, 10.0
    turn = np.deg2rad(30 * strength)
    cos, sin = np.cos(turn), np.sin(turn)
    rows = dict(  # (x, y) of the source by (x - c, y - c, 1) of the result
        shear_x=((1, shear, 0), (0, 1, 0)), shear_y=((1, 0, 0), (shear, 1, 0)),
        translate_x=((1, 0, move), (0, 1, 0)), translate_y=((1, 0, 0), (0, 1, move)),
        rotate=((cos, sin, 0), (-sin, cos, 0)),
    )[name]  # fmt: skip
    # Pillow looks at the centres of pixels, (x + 1/2, y + 1/2)
    coefficients = [v for a, b, d in rows for v in (a, b, d + c + 0.5 - (a + b) * (c + 0.5))]
    want = pillow(lambda im: im.transform(im.size, Image.Transform.AFFINE, coefficients, fillcolor=(51, 51, 51)), x)
    got = transformed(name, strength, x, 0.2)
    assert (
        np.mean(np.abs(got - want).max(-1) > 1e-6) < 0.01
    )  # a place half-way between two pixels may be rounded either way
    assert np.mean(np.abs(got - x).max(-1) > 1e-6) > 0.5


def test_rand_augment_draws_every_transform_equally_often():
    x = jnp.broadcast_to(images(1, 9, 9), (2800, 9, 9, 3))
    out = np.asarray(jax.jit(ia.rand_augment, static_argnums=(2, 3))(KEY, x, 1, 0.6))
    assert ((out >= 0) & (out <= 1)).all()
    found = 0
    for name in ia.RAND_AUGMENT:
        options = [transformed(name, s, x[:1]) for s in (0.6, -0.6)]
        count = np.any([(abs(out - one) < 1e-5).all((1, 2, 3)) for one in options], 0).sum()
        assert abs(count - 200) < 5 * 200**0.5, name
        found += count
    assert found == len(out)
    assert np.array_equal(ia.rand_augment(KEY, x[:2], 0), x[:2])


def test_equal_keys_give_equal_results_and_bfloat16_stays():
    x, targets = images(4).astype(jnp.bfloat16), jax.nn.one_hot(jnp.arange(4), 4)
    turned = partial(ia.move, turn=30)
    for f in map(jax.jit, (ia.flip, ia.crop, turned, ia.cutout, ia.rand_augment)):
        assert f(KEY, x).dtype == jnp.bfloat16 and f(KEY, x).shape == x.shape
        assert np.array_equal(f(KEY, x), f(KEY, x))
        assert not np.array_equal(f(KEY, x), f(jax.random.key(1), x))
    for f in (ia.mixup, ia.cutmix):
        assert f(KEY, x, targets)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: ia.flip(KEY, x[0]), ValueError, r"images must be \[B, H, W, C\]; got shape \(8, 10, 3\)"),
        (lambda x: ia.flip(KEY, x.astype(jnp.uint8)), TypeError, "images must be floating, in .0, 1.; got dtype uint8"),
        (lambda x: ia.flip(KEY, x, 1.5), ValueError, r"probability must be a number in \[0, 1\]; got 1.5"),
        (lambda x: ia.crop(KEY, x, -1), ValueError, "padding must be a whole number in 0..1024; got -1"),
        (lambda x: ia.crop(KEY, x, 1.5), ValueError, "padding must be a whole number in 0..1024; got 1.5"),
        (lambda x: ia.crop(KEY, x, 8, "reflect"), ValueError, r"padding must be below the size .* got 8"),
        (lambda x: ia.crop(KEY, x, 1, "edge"), ValueError, "mode must be 'constant' or 'reflect'; got 'edge'"),
        (lambda x: ia.move(KEY, x, scale=-1), ValueError, r"scale must be a number in \[0, 1000\]; got -1"),
        (lambda x: ia.move(KEY, x, turn=200), ValueError, r"turn must be a number in \[0, 180\]; got 200"),
        (lambda x: ia.cutout(KEY, x, None), ValueError, "size must be a whole number in 0..32768; got None"),
        (lambda x: ia.cutout(KEY, x, 2, jnp.ones(2)), ValueError, r"fill must be a number or 3, .* got shape \(2,\)"),
        (lambda x: ia.rand_augment(KEY, x, fill=7), ValueError, r"fill must be a number in \[0, 1\]; got 7"),
        (
            lambda x: ia.mixup(KEY, x, jnp.arange(5)),
            ValueError,
            r"targets must be probabilities \[B, classes\] with B = 5",
        ),
        (lambda x: ia.mixup(KEY, x, jnp.eye(5), 0), ValueError, r"alpha must be a number in \[0.001, 1000\]; got 0"),
        (lambda x: ia.cutmix(KEY, x, jnp.eye(4)), ValueError, r"got float32 of shape \(4, 4\)"),
        (lambda x: ia.rand_augment(KEY, x, 1.5), ValueError, "operations must be a whole number in 0..100; got 1.5"),
        (lambda x: ia.rand_augment(KEY, x, 1, 9), ValueError, r"magnitude must be a number in \[0, 1\]; got 9"),
    ],
)
def test_bad_options_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(images(5))
