"""Spikes as bits: 8 or 32 time steps of a neuron in one word; graded spikes take several words, one for each bit."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Words = Array | tuple[Array, ...]


@dataclass(frozen=True)
class Packed:
    """An `out_dtype` that stores spikes as bits: words [ceil(T / steps), *B, N].

    Bit k of word w is 1 where the output at t = steps w + k is not 0. `steps` is 8 (uint8) or 32 (uint32). A packed output
    carries no gradient. `unpack` reverses it.

    Graded spikes are whole numbers from `lowest` to `highest`: 0 and 4 for `papers.ILIF(levels=4)`, -1 and 1 for
    `papers.TernaryLIF()`. Then the output is a tuple of words, which hold the bits of output - lowest, the lowest bit first: 3 bits
    a spike for five values, 2 for three.
    """

    steps: int = 8
    lowest: int = 0
    highest: int = 1

    def __post_init__(self):
        if self.steps not in (8, 32):
            raise ValueError(f"Packed: steps must be 8 or 32; got {self.steps}")
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.lowest, self.highest))
        if not whole or not 1 <= self.highest - self.lowest <= 255:
            raise ValueError(
                f"Packed: lowest and highest must be whole numbers, highest 1 to 255 above lowest; got {self.lowest!r} and "
                f"{self.highest!r}"
            )

    def __repr__(self):
        return f"Packed(steps={self.steps}" + (
            f", lowest={self.lowest}, highest={self.highest})" if self.graded else ")"
        )

    @property
    def word(self):
        return jnp.dtype(f"uint{self.steps}")

    @property
    def graded(self) -> bool:
        return (self.lowest, self.highest) != (0, 1)

    @property
    def bits(self) -> int:
        """Bits of a spike."""
        return (self.highest - self.lowest).bit_length()

    def planes(self, out: Array) -> tuple[Array, ...]:
        """The bits of out - lowest, each as 0 or 1 in the dtype of `out`. It uses comparisons alone, which all kernels have."""
        one, zero = jnp.ones_like(out), jnp.zeros_like(out)
        found = [zero] * self.bits
        for code in range(1, self.highest - self.lowest + 1):
            here = jax.lax.select(out == self.lowest + code, one, zero)
            found = [bit + here if code >> k & 1 else bit for k, bit in enumerate(found)]
        return tuple(found)

    def words(self, outs: list[Array]) -> list[Array]:
        """Words made of successive outputs; the first output belongs to a step that is a multiple of `steps`."""
        bits = [jax.lax.select(s != 0, jnp.full_like(s, 1, self.word), jnp.zeros_like(s, self.word)) for s in outs]
        words = []
        for start in range(0, len(bits), self.steps):
            word = bits[start]
            for k, bit in enumerate(bits[start + 1 : start + self.steps], 1):
                word = word | (bit << jnp.full_like(bit, k))
            words.append(word)
        return words


def packed_for(neuron: Any, steps: int = 8) -> Packed:
    """The `Packed` of a neuron's spikes. One whose spikes are not 0 and 1 says so: `spike_range` is (lowest, highest)."""
    while hasattr(neuron, "inner"):
        neuron = neuron.inner
    low, high = getattr(neuron, "spike_range", (0, 1))
    if high - low > 255:
        raise ValueError(
            f"spikes of {type(neuron).__name__} must have at most 256 levels to be packed; got {low} to {high}"
        )
    return Packed(steps, low, high)


@dataclass(frozen=True)
class Planes:
    """The same neuron with the bits of some outputs in place of them: `formats` has a graded `Packed` or None for each output."""

    inner: Any
    formats: tuple[Packed | None, ...]

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        state, out = self.inner.step(params, state, x)
        leaves, tree = jax.tree.flatten(out)
        split = [o if f is None else f.planes(o) for o, f in zip(leaves, self.formats, strict=True)]
        return state, tree.unflatten(split)


def pack(spikes: Array, packed: int | Packed = 8) -> Words:
    """Words [ceil(T / steps), *B, N] of [T, *B, N]; a bit is 1 where the value is not 0.

    `packed` is the number of steps in a word, 8 or 32, or a `Packed`. A graded one gives a tuple of words.
    """
    packed = packed if isinstance(packed, Packed) else Packed(packed)
    if packed.graded:
        return tuple(pack(plane, packed.steps) for plane in packed.planes(spikes))
    steps = packed.steps
    padded = jnp.pad(spikes != 0, [(0, -len(spikes) % steps)] + [(0, 0)] * (spikes.ndim - 1))
    shift = jnp.arange(steps, dtype=packed.word).reshape(1, steps, *(1,) * (spikes.ndim - 1))
    return (padded.reshape(-1, steps, *spikes.shape[1:]).astype(packed.word) << shift).sum(1, dtype=packed.word)


def unpack(words: Words, T: int, dtype=None, *, lowest: int = 0) -> Array:
    """Packed spikes back to [T, *B, N] in `dtype`. Raises ValueError if the words do not hold T steps.

    A tuple of words holds graded spikes, whose lowest value is `lowest`. `dtype` is bool by default, or int32 for graded spikes;
    it must hold `lowest` and all values above it that so many bits can stand for.
    """
    if isinstance(words, tuple):
        dtype = jnp.dtype(jnp.int32 if dtype is None else dtype)
        highest = lowest + 2 ** len(words) - 1
        whole = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else None
        if dtype.kind == "b" or (whole and not (whole.min <= lowest and highest <= whole.max)):
            raise ValueError(f"dtype must hold whole numbers from {lowest} to {highest}; got {dtype}")
        bits = [unpack(plane, T, dtype) for plane in words]
        return sum((bit * 2**k for k, bit in enumerate(bits)), jnp.asarray(lowest, dtype))
    if lowest:
        raise ValueError(f"lowest must be 0 unless words are a tuple, which holds graded spikes; got {lowest}")
    dtype, steps = jnp.bool_ if dtype is None else dtype, jnp.iinfo(words.dtype).bits
    if not 0 <= len(words) * steps - T < steps:
        raise ValueError(
            f"T must be in {(len(words) - 1) * steps + 1}..{len(words) * steps} for {words.shape}; got {T}"
        )
    shift = jnp.arange(steps, dtype=words.dtype).reshape(1, steps, *(1,) * (words.ndim - 1))
    bits = (words[:, None] >> shift) & jnp.ones((), words.dtype)
    return bits.reshape(-1, *words.shape[1:])[:T].astype(dtype)
