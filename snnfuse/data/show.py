"""Shows a data set: a table of its splits, and a picture of one or more samples."""

import collections
from pathlib import Path

import numpy as np

from snnfuse.data import audio, catalog, encoders
from snnfuse.data.events import Sensor, to_frames
from snnfuse.data.optional import require

ON, OFF, GREY = (32, 96, 200), (200, 48, 48), (255, 255, 255)
SHEET = 1000  # pixels: the width of a sheet of samples


def summary(name: str, folder=None) -> dict:
    """Splits, sizes and label names; for recordings also counts and rates. Reads only what `prepare` wrote, and no sample."""
    info = catalog.prepared(name, folder).info
    sizes = {split: {"samples": part.num_examples, "bytes": part.num_bytes} for split, part in info.splits.items()}
    metadata = dict(info.metadata or {})
    sensor = Sensor(*metadata["sensor"]) if "sensor" in metadata else None
    for split, totals in metadata.get("totals", {}).items():
        if "audio_samples" in totals:
            seconds = totals["audio_samples"] / metadata["rate"] / max(1, sizes[split]["samples"])
            sizes[split] |= {"seconds_per_sample": seconds}
            continue
        if "signal_steps" in totals:
            sizes[split] |= {"steps_per_sample": totals["signal_steps"] / max(1, sizes[split]["samples"])}
            continue
        seconds = totals["microseconds"] * 1e-6
        sizes[split] |= {
            "events": totals["events"],
            "events_per_sample": totals["events"] / max(1, sizes[split]["samples"]),
            "seconds_per_sample": seconds / max(1, sizes[split]["samples"]),
            "hertz_per_place": totals["events"] / seconds / sensor.size if seconds else float("nan"),
        }
    about = {
        "name": info.full_name,
        "folder": str(info.data_dir),
        "about": " ".join((info.description or "").split()),
        "labels": info.features["label"].names,
        "sensor": sensor and sensor._asdict(),
        "samples_a_second": metadata.get("rate"),
        "channels": metadata.get("channels"),
        "image": list(info.features["image"].shape) if "image" in info.features else None,
        "splits": sizes,
    }
    return about | {key: metadata[key] for key in ("skipped", "sorted") if metadata.get(key, {}).get("count")}


def strip(counts: np.ndarray, scale: int) -> list[np.ndarray]:
    """Frames [T, H, W, P] as T pictures [H', W', 3]: ON is blue, OFF is red, and more events give a stronger colour."""
    top = max(1, np.percentile(counts[counts > 0], 95) if counts.any() else 1)
    strength = np.clip(counts / top, 0, 1)[..., None]
    ink = np.array([ON] if counts.shape[-1] == 1 else [OFF, ON], float) - GREY
    pictures = np.clip(GREY + (strength * ink).sum(-2), 0, 255).astype(np.uint8)
    return [picture.repeat(scale, 0).repeat(scale, 1) for picture in pictures]


def _raster(events: dict, sensor: Sensor, T: int) -> np.ndarray:
    """The events of a sensor with one row, as a picture of channels by time."""
    counts = to_frames(events, sensor, T, split="time")[:, 0]  # [T, W, P]
    return counts.transpose(1, 0, 2)[None, ::-1]


def _sound(samples: np.ndarray, rate: int, bands: int = 40) -> np.ndarray:
    """A spectrogram above the level crossings of its mel bands, low bands at the bottom: a step is 10 ms and 4 pixels wide."""
    window = 2 ** round(np.log2(rate / 31))  # 32 ms
    samples = np.pad(samples, (0, max(0, window - len(samples))))
    log = audio.log_mel(samples, rate, window=window, hop=rate // 100, bands=bands, low=100.0)
    level = audio.loudness(log)  # [T, bands]
    grey = np.uint8(255 * (1 - np.asarray(level).T[::-1]))[..., None].repeat(3, -1)
    crossings = np.asarray(encoders.level_crossing(level, 0.1)).transpose(1, 0, 2)[None, ::-1]
    pictures = [grey.repeat(4, 0).repeat(4, 1), *strip(crossings, 4)]
    gap = np.full((2, *pictures[0].shape[1:]), 128, np.uint8)
    return np.concatenate([pictures[0], gap, pictures[1]])


def _traces(signal: np.ndarray, width: int = 800, height: int = 40) -> np.ndarray:
    """Channels [n, C] one below the other, each over the same range: a column holds the values of its steps, low to high."""
    n, channels = signal.shape
    edges = np.linspace(0, n, min(n, width) + 1).astype(int)
    low, high = (f.reduceat(signal.astype(float), edges[:-1], axis=0) for f in (np.minimum, np.maximum))
    low[1:], high[1:] = np.minimum(low[1:], high[:-1]), np.maximum(high[1:], low[:-1])  # columns touch
    top = max(np.abs(signal).max(), 1e-30)
    rows = lambda values: np.rint((1 - values / top) / 2 * (height - 1))[None]  # [1, columns, C]
    place = np.arange(height)[:, None, None]
    ink = (place >= rows(high)) & (place <= rows(low))  # [height, columns, C]
    pictures = np.where(ink.transpose(2, 0, 1)[..., None], np.uint8(ON), np.uint8(GREY))
    pictures[:, -1] = 200  # a line between channels
    return pictures.reshape(channels * height, -1, 3).repeat(max(1, width // pictures.shape[2]), 1)


def _drawn(sample: dict, metadata: dict, T: int | None, width: int) -> tuple[str, list[np.ndarray]]:
    """(what the sample holds, its pictures [H, W, 3]): one, or T of events. An image is about `width` pixels wide."""
    if T is not None and (metadata.get("sensor") or [1])[0] == 1:
        raise ValueError(
            f"T is the number of frames of events that a camera saw, and this set has no such events; got {T}"
        )
    if "image" in sample:
        image, scale = sample["image"], max(1, width // sample["image"].shape[1])
        return "", [np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)]
    if "audio" in sample:
        rate = int(metadata["rate"])
        return f", {len(sample['audio']) / rate:.3f} s at {rate} samples a second", [_sound(sample["audio"], rate)]
    if "signal" in sample:
        steps, channels = sample["signal"].shape
        return f", {steps} steps of {channels} channels", [_traces(sample["signal"])]
    events, sensor = sample["events"], Sensor(*metadata["sensor"])
    seconds = (int(events["t"][-1]) - int(events["t"][0])) * 1e-6 if len(events["t"]) else 0
    text = f", {len(events['t'])} events in {seconds:.3f} s"
    if sensor.height == 1:
        return text, strip(_raster(events, sensor, 350), 2)
    return text, strip(to_frames(events, sensor, 10 if T is None else T, split="time"), max(1, 128 // sensor.width))


def _joined(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures side by side (axis 1) or one below the other (axis 0), with a grey line between, filled up with white."""
    side = max(picture.shape[1 - axis] for picture in pictures)
    widths = lambda picture: [(0, (side - n) * (i == 1 - axis)) for i, n in enumerate(picture.shape)]
    filled = [np.pad(picture, widths(picture), constant_values=255) for picture in pictures]
    line = np.full((2, side, 3) if axis == 0 else (side, 2, 3), 128, np.uint8)
    return np.concatenate([part for picture in filled for part in (picture, line)][:-1], axis)


def render(name: str, split: str, index: int, out: Path, folder=None, T: int | None = None, count: int = 1) -> str:
    """Write a sample to `out` and return a line about it: an image, a .png strip or a .gif of events, a spectrogram of sound,
    or the channels of a signal. `T` is the number of frames of a camera's events, 10 by default. A `count` above 1 makes a sheet
    (.png) of as many samples, evenly spaced from `index` to the end of the split.
    """
    Image = require("PIL.Image")
    if count < 1 or count > 1 and out.suffix == ".gif":
        raise ValueError(f"--count must be at least 1, and 1 for a .gif; got {count}")
    source = catalog.source(name, split, folder)
    if not 0 <= index < len(source):
        raise IndexError(f"{name}/{split} has samples 0..{len(source) - 1}; got {index}")
    count = min(count, len(source) - index)
    info = catalog.prepared(name, folder).info
    label = lambda sample: info.features["label"].int2str(int(sample["label"]))
    samples = [source[index + k * (len(source) - index) // count] for k in range(count)]
    drawn = [_drawn(sample, dict(info.metadata or {}), T, 256 if count == 1 else 96) for sample in samples]
    if count == 1:
        line, pictures = f"{name}/{split}[{index}]: {label(samples[0])}{drawn[0][0]}", drawn[0][1]
    else:
        labels = collections.Counter(sorted(map(label, samples)))
        line = f"{count} samples of {name}/{split}: " + ", ".join(f"{n} of {k}" for k, n in labels.items())
        cells = [_joined(pictures, 1) for _, pictures in drawn]
        width = max(cell.shape[1] for cell in cells)
        cells = [np.pad(cell, ((0, 0), (0, width - cell.shape[1]), (0, 0)), constant_values=255) for cell in cells]
        columns = max(1, SHEET // (2 + width))
        pictures = [_joined([_joined(cells[i : i + columns], 1) for i in range(0, count, columns)], 0)]
    if out.suffix == ".gif":
        first, *rest = [Image.fromarray(picture) for picture in pictures]
        first.save(out, save_all=True, append_images=rest, duration=100, loop=0)
    else:
        Image.fromarray(_joined(pictures, 1)).save(out)
    return f"{line}; {out}"
