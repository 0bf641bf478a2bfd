"""Data: encoders and event tools, which need JAX alone; data sets, the loader and `python -m snnfuse.data`, the extra `data`.

encoders    images and signals to spikes, on the device     catalog   data sets by name: prepare, source
audio       sound to mel bands, on the device
events      recordings to frames, on the host      loader    batches on the device, resumable
packed      bits and events, unpacked on the device    augment   random changes of recordings
image_augment, event_augment   random changes of images and of events, on the device
examples    what the loader makes of a sample
signals     signals of several channels to sliding windows, on the device
"""

from snnfuse.data import (
    audio,
    augment,
    catalog,
    encoders,
    event_augment,
    events,
    examples,
    image_augment,
    loader,
    packed,
    signals,
)

__all__ = [
    "audio",
    "augment",
    "catalog",
    "encoders",
    "event_augment",
    "events",
    "examples",
    "image_augment",
    "loader",
    "packed",
    "signals",
]
