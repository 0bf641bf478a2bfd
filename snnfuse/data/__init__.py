"""Data: encoders and event tools, which need JAX alone; data sets, the loader and `python -m snnfuse.data`, the extra `data`.

encoders    images to spikes, on the device        catalog   data sets by name: prepare, source
events      recordings to frames, on the host      loader    batches on the device, resumable
packed      bits and events, unpacked on the device    augment   random changes of recordings
image_augment   random changes of images, on the device
"""

from snnfuse.data import augment, catalog, encoders, events, image_augment, loader, packed

__all__ = ["augment", "catalog", "encoders", "events", "image_augment", "loader", "packed"]
