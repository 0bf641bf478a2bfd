"""The command line of a configuration: tyro reads a dataclass, after `--model NAME` and `--data NAME` chose two of its parts."""

import dataclasses
import difflib
from typing import Any

import tyro

Choices = dict[str, dict[str, Any]]  # key -> name -> the dataclass instance that the name stands for


def parse(arguments: list[str], config: Any, choices: Choices, description: str = "") -> Any:
    """`config` with the overrides of `arguments`, `--steps 100 --model.T 8` or `--model.T=8`; the last one of a key counts.

    Raises ValueError for a value that the configuration refuses. Like argparse, tyro prints a message about any other
    mistake, with the nearest keys, and exits with status 2.
    """
    chosen = {key: _chosen(key, arguments, known) for key, known in choices.items()}
    config = dataclasses.replace(config, **{key: value for key, value in chosen.items() if value is not None})
    parts = tuple(type(getattr(config, key)) for key in choices)
    names = "\n".join(f"--{key} is one of {', '.join(known)}" for key, known in choices.items())
    return tyro.cli(
        type(config)[parts],
        default=config,
        args=arguments,
        description=f"{description}\n{names}",
        use_underscores=True,
    )


def _chosen(key, arguments, known):
    """The instance that the last `--key NAME` names; None if there is none."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name == f"--{key}" and (equals or i + 1 < len(arguments)):
            found = text if equals else arguments[i + 1]
    if found is not None and found not in known:
        close = difflib.get_close_matches(found, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"--{key} must be one of {', '.join(known)}; got {found!r}{hint}")
    return known.get(found)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"steps": 600, "model": "conv", "model.T": 4, ...}: what is saved with a run and compared when it resumes."""
    flat = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            flat |= {key: value.name} | flatten(value, key + ".")
        elif not (prefix and field.name == "name"):
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
