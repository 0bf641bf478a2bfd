"""Docstrings are plain text. This escapes what Markdown would interpret, and turns the names of snnfuse into links."""

import re

import griffe

CODE = re.compile(r"(`[^`]*`)")
NAME = re.compile(r"`(snnfuse\.[\w.]+)`")
EQUATION = re.compile(r"\w+(\[t\]|, state) = ")
SECTION = re.compile(r"(Args|Returns|Raises):")


class Plain(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = "\n\n".join(map(_plain, obj.docstring.value.split("\n\n")))


def _plain(paragraph):
    if paragraph.startswith("    "):
        return paragraph
    if EQUATION.match(paragraph):  # it begins the docstring, so its indentation is lost
        return "\n".join("    " + line for line in paragraph.splitlines())
    lines, section = [], False
    for line in paragraph.splitlines():
        section = section or bool(SECTION.match(line))
        lines.append(line if line.startswith("    ") and not section else _escaped(line))
    return "\n".join(lines)


def _escaped(line):
    return "".join(_linked(part) if part.startswith("`") else _text(part) for part in CODE.split(line))


def _text(part):
    return part.replace("*", r"\*").replace("<", "&lt;")


def _linked(code):
    return NAME.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', code)
