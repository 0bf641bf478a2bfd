"""Augmentations of images: pure functions of a key and a batch, on the device, inside of the jitted step.

    images = image_augment.crop(k1, image_augment.flip(k2, images), padding=4)
    images, targets = image_augment.mixup(k3, images, jax.nn.one_hot(labels, 10), alpha=0.2)

`images` are [B, H, W, C], floating, in [0, 1]; the result has the same shape, dtype and range. Each image of a batch has
its own draw, except that `mixup` and `cutmix` draw one share for the whole batch. Equal keys give equal results. Encode to
spikes afterwards: then all T steps see the same augmented image.

Every function raises ValueError for an option out of its range, and if `images` has another rank; TypeError if it is not
floating.
"""

from numbers import Integral, Real

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.ndimage import map_coordinates

from snnfuse.data.draws import beta_share


def _check(images: Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be [B, H, W, C]; got shape {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be floating, in [0, 1]; got dtype {images.dtype}")


def _within(name: str, value: float, low: float, high: float) -> float:
    """The number, or ValueError."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}]; got {value!r}")
    return float(value)


def _whole(name: str, value: int, high: int = 100) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value <= high:
        raise ValueError(f"{name} must be a whole number in 0..{high}; got {value!r}")
    return int(value)


def flip(key: Array, images: Array, probability: float = 0.5) -> Array:
    """Left and right exchanged, in each image with this probability."""
    _check(images)
    chosen = jax.random.bernoulli(key, _within("probability", probability, 0, 1), (len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def crop(key: Array, images: Array, padding: int = 4, mode: str = "constant") -> Array:
    """Each image moved by up to `padding` pixels each way: padded on all sides, then cut at a random place.

    `mode` is that of `jnp.pad`: "constant" pads with 0, "reflect" mirrors the image. Krizhevsky, Sutskever and Hinton 2012.
    """
    _check(images)
    padding = _whole("padding", padding, high=1024)
    if mode not in ("constant", "reflect"):
        raise ValueError(f"mode must be 'constant' or 'reflect'; got {mode!r}")
    if mode == "reflect" and padding >= min(images.shape[1:3]):
        raise ValueError(f"padding must be below the size of the image, {images.shape[1:3]}, to reflect; got {padding}")
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, corners)


def move(key: Array, images: Array, *, scale: float = 0.0, turn: float = 0.0, fill: float = 0.0) -> Array:
    """Each image scaled and turned around its middle, with linear interpolation between pixels.

        (x, y) = middle + factor R(angle) ((x, y) - middle)

    Args:
      scale: ln(factor) is uniform in -ln(1 + scale) .. ln(1 + scale).
      turn: the angle is uniform in -turn .. turn, in degrees.
      fill: what comes in from outside of the image.
    """
    _check(images)
    scale, turn, fill = _within("scale", scale, 0, 1e3), _within("turn", turn, 0, 180), _within("fill", fill, 0, 1)
    B, height, width, _ = images.shape
    uniform = lambda k, most: jax.random.uniform(k, (B, 1, 1), minval=-most, maxval=most)
    grow, spin = jax.random.split(key)
    factor, angle = jnp.exp(uniform(grow, jnp.log1p(scale))), uniform(spin, jnp.deg2rad(turn))
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    across, down = jnp.cos(angle) / factor, jnp.sin(angle) / factor  # of the inverse: from a new pixel to its source
    row, column = across * y - down * x + (height - 1) / 2, down * y + across * x + (width - 1) / 2
    take = lambda channel, *at: map_coordinates(channel, at, order=1, mode="constant", cval=fill)
    each = jax.vmap(jax.vmap(take, in_axes=(-1, None, None), out_axes=-1))
    return each(images.astype(jnp.float32), row, column).astype(images.dtype)


def cutout(key: Array, images: Array, size: int = 16, fill: Array | float = 0.0) -> Array:
    """A square of `size` x `size` pixels set to `fill`, in each image, with its centre anywhere in the image.

    So a part of the square may lie outside. `fill` is a number or one for each channel, such as the mean of the data.
    DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552.
    """
    _check(images)
    size = _whole("size", size, high=2**15)
    centres = [jax.random.randint(k, (len(images), 1), 0, n) for k, n in _sides(key, images)]
    inside = [(i >= c - size // 2) & (i < c - size // 2 + size) for (i, c) in _positions(images, centres)]
    hole = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    if jnp.shape(fill) not in ((), (1,), images.shape[-1:]):
        raise ValueError(
            f"fill must be a number or {images.shape[-1]}, one for each channel; got shape {jnp.shape(fill)}"
        )
    return jnp.where(hole, jnp.asarray(fill, images.dtype), images)


def _sides(key, images):
    return zip(jax.random.split(key), images.shape[1:3], strict=True)


def _positions(images, centres):
    return [(jnp.arange(n)[None], c) for n, c in zip(images.shape[1:3], centres, strict=True)]


def _partners(images: Array, targets: Array, alpha: float) -> tuple[Array, Array]:
    """The other image of each pair, and its target: the batch in reversed order."""
    _check(images)
    _within("alpha", alpha, 1e-3, 1e3)
    if targets.ndim != 2 or len(targets) != len(images) or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            f"targets must be probabilities [B, classes] with B = {len(images)}, such as jax.nn.one_hot gives; "
            f"got {targets.dtype} of shape {targets.shape}"
        )
    return images[::-1], targets[::-1]


def mixup(key: Array, images: Array, targets: Array, alpha: float = 0.2) -> tuple[Array, Array]:
    """Images and targets mixed in pairs, with one share for the batch.

        share ~ Beta(alpha, alpha);   image = share image_1 + (1 - share) image_2
        target = share target_1 + (1 - share) target_2

    An image's partner is the one at the same place from the end of the batch, so batches must be shuffled. `targets` are
    [B, classes]. Zhang et al. 2018, https://arxiv.org/abs/1710.09412.
    """
    others, other_targets = _partners(images, targets, alpha)
    share = beta_share(key, alpha)
    mix = lambda a, b: (share * a + (1 - share) * b).astype(a.dtype)
    return mix(images, others), mix(targets, other_targets)


def cutmix(key: Array, images: Array, targets: Array, alpha: float = 1.0) -> tuple[Array, Array]:
    """A rectangle of each image replaced by that of its partner; the targets are mixed by the area.

        share ~ Beta(alpha, alpha);   the rectangle has sides sqrt(1 - share) times the image's, and its centre anywhere

    A part of the rectangle may lie outside of the image; the targets count what lies inside. One rectangle for the batch.
    Partners and `targets` are as for `mixup`. Yun et al. 2019, https://arxiv.org/abs/1905.04899.
    """
    others, other_targets = _partners(images, targets, alpha)
    share_key, place = jax.random.split(key)
    part = jnp.sqrt(1 - beta_share(share_key, alpha))
    centres = [jax.random.randint(k, (1, 1), 0, n) for k, n in _sides(place, images)]
    halves = [part * n / 2 for n in images.shape[1:3]]
    inside = [
        (i >= jnp.round(c - h)) & (i < jnp.round(c + h))
        for (i, c), h in zip(_positions(images, centres), halves, strict=True)
    ]
    cut = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    area = cut.mean().astype(targets.dtype)
    return jnp.where(cut, others, images), (1 - area) * targets + area * other_targets


def rand_augment(key: Array, images: Array, operations: int = 2, magnitude: float = 0.3, fill: float = 0.5) -> Array:
    """RandAugment: `operations` transforms of each image, drawn in turn from `RAND_AUGMENT`, all of one strength.

    `magnitude` is in [0, 1]: 0.3 is the paper's 9 of 30. Its meaning for each transform, and the transforms, are those of
    torchvision's RandAugment: shear up to 0.3, moves up to 0.45 of the width, rotation up to 30 degrees (all with a random
    sign, the nearest pixel, and `fill` where there is none); brightness, colour, contrast and sharpness changed by a factor
    of up to 1 +- 0.9; solarize above 1 - magnitude; posterize to 8 - 4 magnitude bits; autocontrast; equalize; and the
    image as it is. Cubuk et al. 2020, https://arxiv.org/abs/1909.13719.
    """
    _check(images)
    operations, magnitude = _whole("operations", operations), _within("magnitude", magnitude, 0, 1)
    fill = _within("fill", fill, 0, 1)
    for each in jax.random.split(key, operations):
        which, sign = jax.random.split(each)
        which = jax.random.randint(which, (len(images),), 0, len(RAND_AUGMENT))
        sign = jnp.where(jax.random.bernoulli(sign, 0.5, (len(images),)), 1.0, -1.0)
        images = _transformed(images, which, sign * magnitude, fill)
    return images


GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOUR = ("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize")
RAND_AUGMENT = ("identity", *GEOMETRIC, *COLOUR)


def _transformed(images, which, strength, fill):
    """Transform number `which` of RAND_AUGMENT for each image. All are computed, and each image takes one."""
    dtype, images = images.dtype, images.astype(jnp.float32)
    out = _moved(images, which, strength, fill)
    for i, (_, changed) in enumerate(_colours(images, strength[:, None, None, None]), 1 + len(GEOMETRIC)):
        out = jnp.where((which == i)[:, None, None, None], changed, out)
    return jnp.clip(out, 0, 1).astype(dtype)


def _moved(images, which, strength, fill):
    """The geometric transforms: each output pixel takes the nearest one at A (x - centre) + centre + offset."""
    _, height, width, _ = images.shape
    is_ = {name: (which == 1 + i) * 1.0 for i, name in enumerate(GEOMETRIC)}
    shear, turn = 0.3 * strength, jnp.deg2rad(30.0) * strength * is_["rotate"]
    cos, sin, move = jnp.cos(turn), jnp.sin(turn), 150 / 331 * strength
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    each = lambda v: v[:, None, None]
    source_x = each(cos) * x + each(sin + shear * is_["shear_x"]) * y + each(move * width * is_["translate_x"])
    source_y = each(-sin + shear * is_["shear_y"]) * x + each(cos) * y + each(move * height * is_["translate_y"])
    row = jnp.round(source_y + (height - 1) / 2).astype(jnp.int32)
    column = jnp.round(source_x + (width - 1) / 2).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    taken = jax.vmap(lambda image, r, c: image[r, c])(images, row.clip(0, height - 1), column.clip(0, width - 1))
    return jnp.where(inside[..., None], taken, fill)


def _colours(images, strength):
    """(name, the changed images) of each transform that moves no pixel. `strength` is [B, 1, 1, 1], with its sign."""
    factor, size = 1 + 0.9 * strength, jnp.abs(strength)
    grey = _grey(images)
    blend = lambda other: jnp.clip(other + factor * (images - other), 0, 1)
    yield "brightness", blend(jnp.zeros_like(images))
    yield "color", blend(grey)
    yield "contrast", blend(jnp.broadcast_to(grey.mean((1, 2, 3), keepdims=True), images.shape))
    yield "sharpness", blend(_blurred(images))
    bits = 2.0 ** (8 - jnp.round(4 * size))
    yield "posterize", jnp.floor(jnp.round(images * 255) * bits / 256) * 256 / bits / 255
    yield "solarize", jnp.where(images >= 1 - size, 1 - images, images)
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    yield "autocontrast", jnp.where(high > low, (images - low) / jnp.where(high > low, high - low, 1), images)
    yield "equalize", _equalized(images)


def _grey(images):
    if images.shape[-1] != 3:
        return images
    weights = jnp.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    return jnp.broadcast_to((images * weights).sum(-1, keepdims=True), images.shape)


def _blurred(images):
    """3 x 3 mean with weight 5 in the centre, 1 around it; the border stays, as in Pillow."""
    around = sum(jnp.roll(images, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    _, height, width, _ = images.shape
    inner = jnp.zeros((height, width, 1), bool).at[1:-1, 1:-1].set(True)
    return jnp.where(inner, (around + 4 * images) / 13, images)


def _equalized(images):
    """Each channel of each image with its grey levels spread evenly, as Pillow's ImageOps.equalize."""
    levels = jnp.round(images * 255).astype(jnp.int32)

    def channel(level):  # [H, W]
        counts = jnp.zeros(256, jnp.int32).at[level.ravel()].add(1)
        last = counts[level.max()]
        step = (counts.sum() - last) // 255
        table = ((step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)).clip(0, 255)
        return jnp.where(step > 0, table[level], level)

    each = jax.vmap(jax.vmap(channel, in_axes=-1, out_axes=-1))
    return each(levels).astype(images.dtype) / 255
