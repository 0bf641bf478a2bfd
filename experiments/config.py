"""Configurations as frozen dataclasses, overridden from the command line: `--steps 100 --model.T 8`, or `--model.T=8`.

A field that holds one of several dataclasses (a model, a data set) is chosen by its registered name, `--model conv`,
and then has that one's fields. An unknown key is an error that names the known ones.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any

Choices = dict[str, dict[str, type]]  # key -> registered name -> dataclass
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse(arguments: list[str], config: Any, choices: Choices) -> Any:
    """`config` with the overrides of `arguments`. Raises ValueError: an unknown key, a missing or a bad value."""
    pairs = _pairs(arguments)
    for key, text in pairs:
        if key in choices:
            config = dataclasses.replace(config, **{key: _chosen(key, text, choices[key])()})
    for key, text in pairs:
        if key not in choices:
            config = _override(config, key, text, flatten(config, choices))
    return config


def flatten(config: Any, choices: Choices, prefix: str = "") -> dict[str, Any]:
    """{"steps": 600, "model": "conv", "model.T": 4, ...}: what is saved with a run and compared on resuming it."""
    flat = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if key in choices:
            flat[key] = next(name for name, cls in choices[key].items() if cls is type(value))
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, choices, key + ".")
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def help_text(config: Any, choices: Choices) -> str:
    lines = []
    for key, value in flatten(config, choices).items():
        names = f"   one of: {', '.join(choices[key])}" if key in choices else ""
        value = ",".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"  --{key} {value}{names}")
    return "\n".join(lines)


def _pairs(arguments):
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            raise ValueError(f"expected --key value; got {argument!r}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def _chosen(key, text, registered):
    if text not in registered:
        raise ValueError(f"--{key} must be one of {', '.join(registered)}; got {text!r}")
    return registered[text]


def _override(config, key, text, known, prefix=""):
    name, _, rest = key.removeprefix(prefix).partition(".")
    fields = {field.name for field in dataclasses.fields(config)}
    value = getattr(config, name, None)
    if name not in fields or bool(rest) != dataclasses.is_dataclass(value):
        lower = {k.lower(): k for k in known}
        close = difflib.get_close_matches(key.lower(), lower, n=1)
        hint = f" (did you mean --{lower[close[0]]}?)" if close else ""
        raise ValueError(f"unknown key --{key}{hint}; known keys: {', '.join(known)}")
    if rest:
        return dataclasses.replace(config, **{name: _override(value, key, text, known, f"{prefix}{name}.")})
    annotation = typing.get_type_hints(type(config))[name]
    try:
        value = _value(annotation, text)
    except ValueError as e:
        wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        raise ValueError(f"--{key} must be {wanted}; got {text!r}") from e
    return dataclasses.replace(config, **{name: value})


def _value(annotation, text):
    if isinstance(annotation, types.UnionType):
        if text.lower() == "none" and types.NoneType in annotation.__args__:
            return None
        return _value(annotation.__args__[0], text)
    if typing.get_origin(annotation) is tuple:
        return tuple(_value(annotation.__args__[0], part) for part in text.split(",") if part)
    if annotation is bool:
        if text.lower() not in BOOLS:
            raise ValueError(text)
        return BOOLS[text.lower()]
    return annotation(text)
