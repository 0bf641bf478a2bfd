"""The recipes of experiments/recipes.py: they are options of train.py, and the list shows what was measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import accuracy
import config as configuration
import recipes
import train
from inputs.reading import in_memory


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_configuration_of_whole_epochs(name):
    config = configuration.parse(recipes.arguments(name), train.Config(), train.CHOICES)
    assert config.name == name and config.steps % config.eval_every == 0
    samples = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000}.get(config.data.name)
    if samples:  # of images; recordings are few, and their recipes count steps
        assert config.first_steps % (samples // config.batch) == 0
        assert (config.steps - config.first_steps) % (samples // (config.second_batch or config.batch)) == 0


def test_the_list_shows_each_seed_that_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    steps = configuration.parse(recipes.arguments("mnist"), train.Config(), train.CHOICES).steps
    row = dict(
        case="mnist", implementation="pallas", seed=0, held_out_accuracy=0.9, seconds=30, steps=steps, device="cpu"
    )
    rows = [row, row | dict(held_out_accuracy=0.995), row | dict(seed=1, held_out_accuracy=0.994)]
    rows += [row | dict(implementation="scan", held_out_accuracy=0.1), dict(row, case="mnist r18"), row | dict(seed=2)]
    del rows[-1]["held_out_accuracy"]  # a run that failed
    rows += [row | dict(seed=3, steps=6000)]  # an older recipe
    rows += [row | dict(seed=4, implementation="scan")]
    (tmp_path / "accuracy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert recipes.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert "mnist                 99.50% in 30 s; 99.40% in 30 s; 90.00% in 30 s by scan on cpu\n" in text
    assert text.count("not measured") == len(recipes.RECIPES) - 1
    assert recipes.main(["imagenet"]) == 2 and "expected one of mnist" in capsys.readouterr().err
    assert recipes.main(["--help"]) == 0 and "recipes.py cifar10" in capsys.readouterr().out


@pytest.mark.parametrize("line", recipes.table().split("\n")[::2])
def test_a_recipe_says_a_result_or_that_it_was_not_measured(line):
    name, _, result = line.partition(" ")
    if name == "cifar10_long":
        return  # it says what nearly the same recipe reached
    said = recipes.RECIPES[name].__doc__.strip().splitlines()[0]
    measured = result.strip() != "not measured"
    assert measured == ("Not measured" not in said) == ("%" in said)


def test_a_recipe_is_a_case_of_the_benchmark(monkeypatch):
    args = type(
        "", (), dict(script="paper", recipe="mnist", data="", model="", implementations="pallas", runs="runs/x")
    )
    args.more = "--seed=1 --model.T=2"
    (case,) = accuracy.accuracy(args)
    assert case.key == dict(case="mnist T=2", implementation="pallas")
    assert case.args[:2] == ("recipes", ["mnist", "--seed=1", "--model.T=2", "--model.implementation=pallas"])


def test_samples_are_read_many_at_a_time():
    asked = []

    class Source(list):
        def __getitems__(self, indices):
            asked.append(len(indices))
            return [self[i] for i in indices]

    assert in_memory(Source(range(2500)), "x") == in_memory(list(range(2500)), "x") == list(range(2500))
    assert asked == [1000, 1000, 500]
