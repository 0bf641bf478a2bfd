"""Options of train.py that have no effect without another one: each is refused without it, and accepted with it."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

pytest.importorskip("tensorflow_datasets", reason="the experiments need the extra `data`")

import config as configuration
import inputs
import settings
import train
from config import needs
from models import MODELS

FIRST = "--first_T 1 --first_steps 10"
TRAINING = [  # the option, what it needs in words, options without what it needs, and one or more with what it needs
    ("--first_T 1", "--first_steps", "", "--first_steps 10"),
    ("--first_steps 10", "--first_T", "", "--first_T 1"),
    ("--first_levels 4", "--first_T", "--model vgg --model.memory fast", f"--model vgg --model.memory fast {FIRST}"),
    (
        "--first_levels 4",
        "--model resnet, vgg, spikformer or qkformer",
        f"--model conv {FIRST}",
        *(f"--model {name} --model.memory fast {FIRST}" for name in ("resnet", "vgg", "spikformer", "qkformer")),
    ),
    ("--second_rate 0.1", "--first_steps", "", FIRST),
    ("--second_batch 8", "--first_steps", "", FIRST),
    ("--second_rate 0.1", "--schedule cosine", f"--schedule constant {FIRST}", FIRST),
    (
        "--neuron_rate 0.5",
        "--model conv, recurrent or timeconv",
        "--model vgg --model.tau 2",
        *("--model conv", "--model recurrent", "--model timeconv"),
    ),
    ("--truncate", "--piece", "", "--piece 2"),
    ("--reach 4", "--update_every", "", "--update_every 2"),
    ("--rate_weight 2", "--rate_lower or --rate_upper", "", "--rate_lower 0.1", "--rate_upper 0.1"),
    ("--rate_per layer", "--rate_lower or --rate_upper", "", "--rate_lower 0.1", "--rate_upper 0"),
    ("--no_sync_batch_norm", "--mesh", "", "--mesh data=2"),
]
NETWORK = [
    ("--model.tau 2", "--model.levels None", "--model.levels 4 --model.memory fast", ""),
    ("--model.reset soft", "--model.tau", "", "--model.tau 2"),
    ("--model.no_detach", "--model.tau", "", "--model.tau 2"),
    ("--model.surrogate triangle", "--model.tau", "", "--model.tau 2"),
    (
        "--model.v_rest 0.5",
        "--model.tau, --model.levels or --first_levels",
        "",
        "--model.tau 2",
        "--model.levels 4 --model.memory fast",
        f"--first_levels 4 {FIRST} --model.memory fast",
    ),
]
NO_HIDDEN = "--model.hidden"  # with no number after it
DENSE = [
    ("--model.scale 1", "--model.recurrent", "--model.no_recurrent", "--model.recurrent"),
    ("--model.precision bfloat16", "--model.recurrent", "--model.no_recurrent", "--model.recurrent"),
    ("--model.tau_adapt 9", "--model.hidden", NO_HIDDEN, ""),
    ("--model.beta 0.3", "--model.hidden", NO_HIDDEN, ""),
]
ON_DEVICE = ("events 99", "size 32", "shift 1", "flip", "scale 0.1", "turn 9", "drop 0.1", "longer 0")
STATISTICS = "--data.encoding direct --data.normalise"
CASES = {
    "": TRAINING,
    "--model conv": [("--model.kernel 3", "--model.channels", "--model.channels", "")],
    "--model recurrent": [
        *DENSE,
        ("--model.scale 1", "--model.hidden", NO_HIDDEN, ""),
        ("--model.precision bfloat16", "--model.hidden", NO_HIDDEN, ""),
        ("--model.kernel 3", "--model.channels", "", "--model.channels 4"),
        ("--model.no_recurrent", "--model.hidden", NO_HIDDEN, ""),
        ("--model.max_delay 3", "--model.hidden", NO_HIDDEN, ""),
        ("--model.tau 2", "--model.hidden", NO_HIDDEN, ""),
        ("--model.dropout 0.1", "--model.hidden", NO_HIDDEN, ""),
    ],
    "--model timeconv": [
        *DENSE,
        ("--model.steps 3", "--model.channels", "--model.channels", ""),
        ("--model.bands 3", "--model.channels", "--model.channels", ""),
        ("--model.recurrent", "--model.hidden", NO_HIDDEN, ""),
        *(
            (
                option,
                "--model.channels or --model.hidden",
                f"--model.channels {NO_HIDDEN}",
                NO_HIDDEN,
                "--model.channels",
            )
            for option in ("--model.tau 2", "--model.dropout 0.1")
        ),
    ],
    "--model resnet": [*NETWORK, ("--model.drop_path 0.1", "--model.connect add", "", "--model.connect add")],
    "--model vgg": NETWORK,
    "--model spikformer": NETWORK,
    "--model qkformer": NETWORK,
    "--data mnist5k": [
        ("--data.magnitude 0.5", "--data.rand_augment", "", "--data.rand_augment 1"),
        ("--data.normalise", "--data.encoding direct", "", "--data.encoding direct"),
        ("--data.mean 0.1", "--data.normalise", "--data.deviation 1", f"{STATISTICS} --data.deviation 1"),
        ("--data.mean 0.1", "--data.deviation", STATISTICS, f"{STATISTICS} --data.deviation 1"),
        ("--data.deviation 1", "--data.mean", STATISTICS, f"{STATISTICS} --data.mean 0.1"),
    ],
    "--data dvs128_objects": [
        (f"--data.{option}", "--data.store events", f"--data.store {other}", "--data.store events")
        for option, other in zip(ON_DEVICE, ("bytes", "bits") * 4, strict=True)
    ],
    "--data emg_roshambo": [
        ("--data.threshold 1", "--data.code level_crossing", "--data.code lif", "--data.code level_crossing")
    ],
    "--data spoken_digits": [
        ("--data.threshold 1", "--data.code level_crossing", "--data.code lif", "--data.code level_crossing"),
        ("--data.quiet 0.1", "--data.fit", "", "--data.fit"),
        ("--data.mask_steps 3", "--data.masks", "--data.masks 0", ""),
        ("--data.mask_bands 3", "--data.masks", "--data.masks 0", ""),
        ("--data.masks 2", "--data.mask_steps or --data.mask_bands", "", "--data.mask_steps 3", "--data.mask_bands 3"),
    ],
    "--data random": [
        (
            "--data.events 99",
            f"--data.like {', '.join(inputs.OF_EVENTS[:-1])} or {inputs.OF_EVENTS[-1]}",
            "--data.like cifar10",
            "--data.like nmnist",
        )
    ],
}


def parse(*texts):
    words = " ".join(texts).split()
    return configuration.parse(words, settings.Config(), settings.CHOICES)


@pytest.mark.parametrize(
    "chosen, given, needed, off, on", [(chosen, *row[:3], row[3:]) for chosen, rows in CASES.items() for row in rows]
)
def test_an_option_without_what_it_needs_is_refused(chosen, given, needed, off, on):
    with pytest.raises(ValueError) as refused:
        parse(chosen, given, off)
    option, *_ = given.split()
    said = str(refused.value)
    assert said.startswith(option) and f" needs {needed}, or it has no effect; got --" in said
    for more in on:
        parse(chosen, given, more)


def neurons(config):
    """The neurons of the network of the first steps, and of the network of the others."""
    return [str(model.options) for model in (settings.first_model(config), config.model)]


@pytest.mark.parametrize("first", ["", FIRST, f"{FIRST} --first_levels 8"])
@pytest.mark.parametrize("own", ["", "--model.tau 2", "--model.levels 4"])
def test_an_option_of_neurons_is_refused_exactly_where_neither_network_changes(first, own):
    config = parse(given := f"--model vgg --model.memory fast {own} {first}")
    changes = {
        "tau 3": 3.0,
        "reset soft": "soft",
        "no_detach": False,
        "surrogate triangle": "triangle",
        "v_rest 0.5": 0.5,
    }
    for option, value in changes.items():
        name = option.removeprefix("no_").split()[0]
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: value}))
        if neurons(changed) != neurons(config):
            parse(given, f"--model.{option}")
        else:
            with pytest.raises(ValueError, match=f"--model.{option}.* or it has no effect"):
                parse(given, f"--model.{option}")


def found(part, prefix):
    """(option, what it needs) for each mark of a dataclass."""
    marked = [(field.name, mark) for field in dataclasses.fields(part) for mark in configuration.marks(field)]
    return {(prefix + name, mark.text(prefix)) for name, mark in marked}


@pytest.mark.parametrize("chosen", CASES)
def test_the_marks_are_these(chosen):
    """A mark that goes fails here, and one that comes needs a case above."""
    part, prefix = settings.Config(), "--"
    if chosen:
        key, name = chosen.removeprefix("--").split()
        part, prefix = settings.CHOICES[key][name], f"--{key}."
    listed = {
        (given.split()[0].replace(".no_", ".").replace("--no_", "--"), needed) for given, needed, *_ in CASES[chosen]
    }
    assert found(part, prefix) == listed


def test_every_kind_of_model_and_data_has_its_cases():
    for key, known in settings.CHOICES.items():
        listed = {type(known[chosen.split()[1]]) for chosen in CASES if chosen.startswith(f"--{key} ")}
        assert {type(each) for each in known.values()} == listed


def test_defaults_are_never_refused():
    for key, known in settings.CHOICES.items():
        for name in known:
            parse(f"--{key} {name}")
    parse("--model vgg --model.reset hard --model.detach --model.surrogate atan --rate_weight 1")


@pytest.mark.parametrize("given", ["--model.levels 4", f"--first_levels 4 {FIRST}"])
def test_levels_without_the_memory_for_them_are_refused_by_their_name(given, capsys):
    with pytest.raises(SystemExit):
        parse(f"--model vgg {given}")
    assert f"{given.split()[0]} must be at least 1, and needs" in " ".join(capsys.readouterr().err.split())
    parse(f"--model vgg --model.memory fast {given}")


def test_a_run_that_resumes_may_leave_out_what_its_options_need():
    """Such as the devices of --mesh; `runs` compares all other options with those of the run."""
    assert parse("--no_sync_batch_norm --resume").resume


def test_the_message_is_that_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(train, "train", None)  # nothing may train
    assert train.main("--model recurrent --model.channels 0 --model.kernel 3".split()) == 2
    message = "--model.kernel 3 needs --model.channels, or it has no effect; got --model.channels 0"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert train.main("--model conv --model.kernel 3 --model.channels --rate_weight 2".split()) == 2
    assert "got --model.channels (nothing)\n" in capsys.readouterr().err


def test_a_value_of_zero_or_nothing_does_not_turn_an_option_on():
    @dataclasses.dataclass(frozen=True)
    class Part:
        a: object
        b: str = "x"

        c: float | None = None

    assert [needs("a").holds(Part(a)) for a in (None, 0, 0.0, False, (), "", 1, (2,), "y")] == [False] * 6 + [True] * 3
    assert [needs("c").holds(Part(0, c=c)) for c in (None, 0.0, 1.0)] == [
        False,
        True,
        True,
    ]  # None turns it off, zero does not
    assert needs("a", b="x").holds(Part(None)) and not needs("a", b=("y", "z")).holds(Part(None))
    assert needs(a=None).holds(Part(None)) and not needs(a=None).holds(Part(1))
    assert needs("a", b=("x", "y", "z")).text("--") == "--a or --b x, y or z"
    assert MODELS["conv"].name in needs(model=("conv",)).text("--")
