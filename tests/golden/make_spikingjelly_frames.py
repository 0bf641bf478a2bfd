"""Makes spikingjelly_frames.npz with SpikingJelly's own functions. Run where spikingjelly (and so torch) is installed:

python tests/golden/make_spikingjelly_frames.py
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
from spikingjelly.datasets import utils

H, W, N = 6, 9, 2017
TS, DTS = [1, 4, 7, 16], [777, 10_000]

rng = np.random.default_rng(0)
events = {
    "t": np.cumsum(rng.integers(0, 40, N)) + 12_345,  # with repeats, as recordings have
    "x": rng.integers(0, W, N),
    "y": rng.integers(0, H, N),
    "p": rng.integers(0, 2, N),
}
golden = dict(events, sensor=[H, W, 2], T=TS, dt=DTS, spikingjelly=version("spikingjelly"))
for split in ("number", "time"):
    for T in TS:
        golden[f"{split}_{T}"] = utils.integrate_events_by_fixed_frames_number(events, split, T, H, W).astype(np.uint16)
for dt in DTS:
    golden[f"dt_{dt}"] = utils.integrate_events_by_fixed_duration(events, dt, H, W).astype(np.uint16)
np.savez_compressed(Path(__file__).parent / "spikingjelly_frames.npz", **golden)
