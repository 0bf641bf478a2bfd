"""Data sets as tfds builders, on array_record, without TensorFlow. They need the extra `data`: see `snnfuse.data.catalog`."""
