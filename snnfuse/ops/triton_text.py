"""Parts that all Triton kernel texts use: names, the step and its pullback as functions, calls, and templates with holes.

`triton_source` and `recurrent_source` build their kernels from these.
"""

import re
import textwrap

import jax

from snnfuse.ops import triton_equations as equations
from snnfuse.ops.problem import Problem

Periods = tuple[int, ...]  # of each array in params: lane m reads element m % period


def module(problem, *functions):
    neuron = re.sub(r" at 0x[0-9a-f]+", "", repr(problem.step.neuron))  # the same text in every process
    about = textwrap.wrap(neuron, 117) or [""]
    imports = "import triton\nimport triton.language as tl\n"
    if any("libdevice." in f for f in functions):
        imports += "from triton.language.extra import libdevice\n"
    return "\n\n".join(["\n".join(f"# {line}" for line in about) + "\n" + imports, *functions])


class Names:
    """Unique names for the leaves of params, state, xs and outs, taken from the neuron's own names."""

    def __init__(self, problem: Problem):
        step, taken = problem.step, set(equations.RESERVED)
        params = _leaf_names(step.params_tree, "param")
        params = [p for p, c in zip(params, step.constants, strict=True) if c is None]
        self.params = [_unique(n, taken) for n in params]
        self.state = [_unique(n, taken) for n in _leaf_names(step.state_tree, "state")]
        self.xs = [_unique(n, taken) for n in _leaf_names(step.x_tree, "x", full=True)]
        self.outs = [_unique(n, taken) for n in _leaf_names(problem.out_tree, "out", full=True)]


def _leaf_names(tree, root, full=False):
    """A name for each leaf: the last word of its key path; with `full`, or if two would be equal, `root` and the whole path."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree.unflatten(range(tree.num_leaves)))]
    words = [re.findall(r"\w+", jax.tree_util.keystr(path)) for path in paths]
    short = [w[-1] if w and not w[-1].isdigit() else None for w in words]
    if full or None in short or len(set(short)) < len(short):
        return ["_".join([root, *w]) for w in words]
    return short


def _unique(name, taken):
    """The name, with underscores until neither it nor a name derived from it is taken."""
    relatives = (
        "{0}",
        "d_{0}",
        "{0}_new",
        "d_{0}_new",
        "{0}_at",
        "d_{0}_at",
        "{0}_ahead",
        "{0}_tail",
        "d_{0}_here",
        "{0}_word",
    )
    while not taken.isdisjoint(family := [form.format(name) for form in relatives]):
        name += "_"
    taken.update(family)
    return name


def step_function(problem, names, shape):
    """(the text of `step`, the name of each expression in it)."""
    jaxpr = problem.step_jaxpr(shape).jaxpr
    inputs = [*names.params, *names.state, *names.xs]
    outputs = [f"{s}_new" for s in names.state] + names.outs
    return equations.function("step", jaxpr, inputs, outputs, hints=equations.assigned(jaxpr))


def pullback_function(problem, names, shape, wanted, live_outs, known):
    jaxpr = problem.pullback_jaxpr(shape, wanted.params, wanted.xs, live_outs).jaxpr
    inputs = [*names.params, *names.state, *names.xs, *(f"d_{s}_new" for s in names.state)]
    inputs += [f"d_{o}" for o in pick(names.outs, live_outs)]
    outputs = [f"d_{s}" for s in names.state]
    outputs += [f"d_{n}" for n in (*pick(names.params, wanted.params), *pick(names.xs, wanted.xs))]
    return equations.function("pullback", jaxpr, inputs, outputs, known=known)[0]


def offset(index, stride, problem):
    """An offset; in 64 bits if 32 could overflow."""
    return f"tl.cast({index}, tl.int64) * {stride}" if problem.T * problem.M >= 2**31 else f"{index} * {stride}"


def call(targets, function, *groups):
    """`targets = function(...)`, with the words of all groups as arguments."""
    call = f"{function}({', '.join(word for group in groups for word in group)})"
    return f"{', '.join(targets)} = {call}" if targets else call


# A function that loads the K steps of a chunk, in kernels of recurrent and of other layers.
LOAD_CHUNK = """
@triton.jit
def {name}({arguments}):
    {empty}
    for k in tl.static_range(K):  # all loads before any use: they are in flight together
        {load}
    {give_back}
"""


def fill(template: str, **holes: list[str]) -> str:
    """The template with its holes filled. A line whose only hole is filled with no lines vanishes."""
    lines = []
    for line in template.strip("\n").splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if (hole := re.fullmatch(r"\s*\{(\w+)\}", line)) is not None:
            filled = [indent + one for one in holes[hole[1]]]
        else:
            filled = [line.format(**{name: ", ".join(words) for name, words in holes.items()})]
        lines += [part for one in filled for part in _wrapped(one)]
    return "\n".join(lines) + "\n"


def _wrapped(line: str, width: int = 110) -> list[str]:
    """A call or a signature on several lines if it is long: its arguments stand between the outermost brackets."""
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) - len(indent) <= width or (call := re.fullmatch(r"(.*?\()(.*)(\):?)", line)) is None:
        return [line]
    opening, arguments, closing = call.groups()
    lines = [""]
    for argument in arguments.split(", "):
        if len(lines[-1]) + len(argument) > width:
            lines.append("")
        lines[-1] += f"{argument}, "
    return [opening, *(f"{indent}    {line.rstrip()}" for line in lines), indent + closing]


def returned(names):
    return [f"return {', '.join(names)}"] if names else []


def pointers(names, suffix=""):
    return [f"{n}{suffix}_ptr" for n in names]


def at_step(names):
    return [f"{n}_at[k]" for n in names]


def d_of(names):
    return [f"d_{n}" for n in names]


def pick(values, which):
    return [v for v, w in zip(values, which, strict=True) if w]
