"""The command line of a configuration: tyro reads a dataclass, after `--model NAME` and `--data NAME` chose two of its parts."""

import dataclasses
import difflib
import typing
from typing import Any

import tyro


@dataclasses.dataclass(frozen=True, eq=False)  # tyro hashes annotations
class Needs:
    """A mark beside an option, made by `needs`: its option has no effect unless one of `others` holds."""

    others: dict[str, tuple]  # name -> the values that will do; an empty tuple: any value that turns the option on

    def holds(self, part: Any, whole: Any = None) -> bool:
        return any(
            _found(name, part, whole) in values if values else _is_on(name, part, whole)
            for name, values in self.others.items()
        )

    def text(self, prefix: str) -> str:
        keys = {_key(name, prefix): values for name, values in self.others.items()}
        return _either(f"{key} {_either(values)}" if values else key for key, values in keys.items())


def _key(name, prefix):
    """The option of this name on the command line: `--name` stays as it is, others are beside the marked one."""
    return name if name.startswith("--") else prefix + name


def _place(name, part, whole):
    """(the dataclass that has this option, its name there)"""
    return (whole, name.removeprefix("--")) if name.startswith("--") else (part, name)


def _found(name, part, whole):
    return _plain(getattr(*_place(name, part, whole)))


def _is_on(name, part, whole):
    """Whether its value turns an option on. Zero does if the option is off by None, such as `rate_upper`."""
    value, (part, name) = _found(name, part, whole), _place(name, part, whole)
    (kind,) = (field.type for field in dataclasses.fields(part) if field.name == name)
    off_is_none = type(None) in typing.get_args(typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind)
    return value is not None if off_is_none else bool(value)


def needs(*names: str, **values: Any) -> Needs:
    """Marks an option that has no effect without another option of the same dataclass; `parse` then refuses it.

        kernel: Annotated[int, needs("channels")] = 8            needs a --channels that is not 0, None, False or empty
        size: Annotated[int | None, needs(store="events")] = None            needs that value, or one of a tuple of values
        shift: Annotated[float, needs("--first_levels")] = 0.0            needs an option of the whole configuration

    One of several names and values is enough. With several marks an option needs all of them. An object made in Python is not
    checked, nor is a command line with `--resume`.
    """
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return Needs(dict.fromkeys(names, ()) | several)


def marks(field: dataclasses.Field) -> list[Needs]:
    """The marks of an option, in the order in which they stand beside it."""
    return [mark for mark in getattr(field.type, "__metadata__", ()) if isinstance(mark, Needs)]


Choices = dict[str, dict[str, Any]]  # key -> name -> the dataclass instance that the name stands for


def parse(arguments: list[str], config: Any, choices: Choices, description: str = "") -> Any:
    """`config` with the overrides of `arguments`, `--steps 100 --model.T 8` or `--model.T=8`; the last one of a key counts.

    Raises ValueError for a value that the configuration refuses, and for an option that has no effect (see `needs`). Like
    argparse, tyro prints a message about any other mistake, with the nearest keys, and exits with status 2.
    """
    chosen = {key: _chosen(key, arguments, known) for key, known in choices.items()}
    config = dataclasses.replace(config, **{key: value for key, value in chosen.items() if value is not None})
    parts = tuple(type(getattr(config, key)) for key in choices)
    names = "\n".join(f"--{key} is one of {', '.join(known)}" for key, known in choices.items())
    found = tyro.cli(
        type(config)[parts],
        default=config,
        args=arguments,
        description=f"{description}\n{names}",
        use_underscores=True,
    )
    if not found.resume:  # its options must be those of the run, whatever they are; --mesh may be left out
        _check_needs(found, config, found)
    return found


def _check_needs(part, default, whole, prefix="--"):
    """Raises ValueError for an option that differs from its default and has no effect."""
    for field in dataclasses.fields(part):
        value, usual = getattr(part, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            _check_needs(value, usual, whole, f"{prefix}{field.name}.")
        for mark in marks(field) if value != usual else ():
            if not mark.holds(part, whole):
                names = (field.name, *mark.others)
                given, *others = (_shown(_key(name, prefix), _found(name, part, whole)) for name in names)
                raise ValueError(f"{given} needs {mark.text(prefix)}, or it has no effect; got {' and '.join(others)}")


def _plain(value):
    """The name of a model or a data set; other values as they are."""
    return value.name if dataclasses.is_dataclass(value) else value


def _shown(key, value):
    """An option as it is written on the command line."""
    if isinstance(value, bool):
        start, dot, name = key.rpartition("." if "." in key else "--")
        return key if value else f"{start}{dot}no_{name}"
    return f"{key} {' '.join(map(str, value)) or '(nothing)' if isinstance(value, tuple) else _plain(value)}"


def _either(words):
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


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
