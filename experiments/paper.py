"""The training runs of "Towards Scalable GPU-Accelerated SNN Training via Temporal Fusion" (ICANN 2024, arXiv 2408.00280).

    python experiments/paper.py --list                     every run: its command, and its time and result if measured
    python experiments/paper.py mnist r18                  mnist, cifar10, nmnist or dvs128_gesture; r18, r34 or r50
    python experiments/paper.py cifar10 r50 --data random --data.like cifar10 --steps 200      its speed, without the data
    python experiments/paper.py mnist5k r18                real digits that need no download: a minute on an H100, 98.0 %
                                                           of those held out (the aim is 97 %)

As in the paper: T = 32, batches of 100 (10 for DVS-Gesture), Adam of rate 1e-3, 5 epochs, LIF of decay 0.2 and threshold
0.3, pixels against fresh noise at every step and in each of three channels, events in 32 frames of equally many with an
empty third channel, classes by the mean of the logits over T. Not as in the paper: activations are bfloat16 (there TF32
or float32: `--model.policy tf32`), and the last images of an epoch that fill no batch wait for another one.

`mnist5k` is not of the paper: 4,000 digits in 37 epochs, moved by up to 2 pixels; AdamW, a learning rate that rises to 2e-3
and falls to 0, gradients clipped. Further keys are those of train.py, whose loop this is; what a run leaves is described there. benchmarks/accuracy.py makes a
row of a run, or of two implementations side by side.
"""

import interrupt  # isort: skip  # the first import: Ctrl-C during the others is one line, not a traceback

if __name__ == "__main__":
    interrupt.quietly()

import json
import sys
from pathlib import Path

import train

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
DEPTHS = {"r18": 18, "r34": 34, "r50": 50}
PAPER = [
    "--model=resnet",
    "--batch=100",
    "--learning_rate=1e-3",
    "--schedule=constant",
    "--warmup=0",
    "--weight_decay=0",
]
PAPER += ["--clip=None", "--log_every=50"]
DATA = {  # 5 epochs, evaluated after each
    "mnist": ["--data=mnist", "--steps=3000", "--eval_every=600"],
    "cifar10": ["--data=cifar10", "--steps=2500", "--eval_every=500"],
    "nmnist": ["--data=nmnist", "--steps=3000", "--eval_every=600"],
    "dvs128_gesture": ["--data=dvs128_gesture", "--steps=585", "--eval_every=117", "--batch=10"],
    "mnist5k": ["--data.repeat=3", "--steps=1500", "--eval_every=300", "--learning_rate=2e-3", "--schedule=cosine"],
}
DATA["mnist5k"] += ["--warmup=0.1", "--clip=1", "--weight_decay=1e-2"]
SHAPES = {
    "mnist": (100, 28),
    "cifar10": (100, 32),
    "nmnist": (100, 34),
    "dvs128_gesture": (10, 128),
    "mnist5k": (100, 28),
}


def arguments(data: str, model: str) -> list[str]:
    """The options of train.py that make the run."""
    return [*PAPER, *DATA[data], f"--model.depth={DEPTHS[model]}", f"--name={data}-{model}"]


def table() -> str:
    """Every run with its milliseconds a step and its accuracy, from the newest rows in benchmarks/results."""
    lines = [f"{'command':46} {'steps':>5}  {'ms a step':24} held-out accuracy"]
    for data, options in DATA.items():
        steps = next(option.partition("=")[2] for option in options if option.startswith("--steps"))
        for model, depth in DEPTHS.items():
            B, size = SHAPES[data]
            wanted = dict(case=f"spiking-resnet-{depth}", implementation="pallas", memory="packed")
            wanted |= dict(dtype="bfloat16", T=32, B=B, size=size)
            ms = _last("resnet", "ms", "{:.2f} on {}", **wanted)
            wanted = dict(case=f"{data} {model}", implementation="pallas", input="real data", T=32, steps=int(steps))
            wanted |= dict(mesh=None)
            accuracy = _last("accuracy", "held_out_accuracy", "{:.2%} on {}", **wanted)
            lines.append(f"python experiments/paper.py {data} {model:{18 - len(data)}} {steps:>5}  {ms:24} {accuracy}")
    return "\n".join(lines)


def _last(name, key, text, **wanted):
    path = RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if "NVIDIA" in row["device"] and row.get("status") == "ok"]
    rows = [row for row in rows if all(row.get(k) == value for k, value in wanted.items())]
    return text.format(rows[-1][key], rows[-1]["device"].split()[1]) if rows else "not measured"


def main(argv: list[str]) -> int:
    if argv[:1] == ["--list"]:
        print(table())
        return 0
    if len(argv) < 2 or argv[0] not in DATA or argv[1] not in DEPTHS:
        print(__doc__)
        print(
            f"error: expected DATA MODEL, of {', '.join(DATA)} and {', '.join(DEPTHS)}; got {argv[:2]}", file=sys.stderr
        )
        return 2
    return train.main([*arguments(*argv[:2]), *argv[2:]])


if __name__ == "__main__":
    train.keep_compiled()
    sys.exit(main(sys.argv[1:]))
