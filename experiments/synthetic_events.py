"""Train a spiking network on events: real MNIST digits, seen by a synthetic event camera. Not N-MNIST.

    python experiments/synthetic_events.py                  3 to 6 minutes on 2 CPU cores; 97 % of the held-out digits
    python experiments/synthetic_events.py --steps 100 --model.T 16 --data.bins 16

The first run prepares the events (5,000 recordings, a minute or two) in $TFDS_DATA_DIR, by default
~/tensorflow_datasets. A recording is cut into 12 frames of equal duration, four for each movement of the camera. This
script only gives other defaults to train.py, which has the loop and the keys.
"""

import sys

import train

DEFAULTS = ["--data=synthetic_saccades", "--model.T=12", "--model.channels", "16", "32"]
DEFAULTS += ["--name=synthetic_events", "--steps=300"]

if __name__ == "__main__":
    sys.exit(train.main([*DEFAULTS, *sys.argv[1:]]))
