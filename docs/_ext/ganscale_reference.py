"""Writes the reference from the code: fields of the configuration, verbs of the command, presets.

A page says `<!-- generated: NAME -->` where the text belongs, and Sphinx reads the Markdown of
`GENERATED[NAME]` in its place. Nothing that is generated is committed, so nothing can be out of
date: a field or a verb that is added is in the next build.

`<!-- file: PATH -->` stands for a Markdown file elsewhere in the clone. Links of pages are written
as they lead to files of the clone, so that they work where the pages are read without a build; here
they become links of the site, or downloads.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from ganscale.cli import app
from ganscale.config import Config, Schedule
from ganscale.config.changes import MAY_CHANGE_IN_POPULATION, MAY_CHANGE_ON_RESUME
from ganscale.config.loading import PRESET_COLUMNS, preset_rows
from ganscale.config.sweep import SweepFile

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["GENERATED", "Command", "commands", "examples", "setup"]

_MARKER = re.compile(r"<!-- generated: ([\w-]+) -->")
_FILE = re.compile(r"<!-- file: (\S+) -->")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
_WORDS = {
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    str: "text",
    Path: "path",
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    page = Path(app.env.doc2path(docname))
    text = _MARKER.sub(lambda marker: GENERATED[marker[1]](), source[0])
    origin = page
    if marker := _FILE.match(text):
        origin = (page.parent / marker[1]).resolve()
        text = origin.read_text(encoding="utf-8")
    pages = _pages_of_files(docs)

    def link(match: re.Match[str]) -> str:
        target = (origin.parent / match["path"]).resolve()
        if not target.is_file():
            return match[0]  # Sphinx says that it leads nowhere
        if target in pages:
            target = pages[target]
        anchor = match["anchor"] or ""
        # The separator of the system is one that Markdown escapes with, on some.
        path = Path(os.path.relpath(target, page.parent)).as_posix()
        if target.suffix == ".md" and not target.is_relative_to(docs):
            return f"{{download}}`{match['text']} <{path}>`"
        return f"{match['image']}[{match['text']}]({path}{anchor})"

    source[0] = _LINK.sub(link, text)


@cache
def _pages_of_files(docs: Path) -> dict[Path, Path]:
    """The pages that stand for files outside the documentation, by these files."""
    return {
        (page.parent / marker[1]).resolve(): page
        for page in docs.rglob("*.md")
        if (marker := _FILE.match(page.read_text(encoding="utf-8")))
    }


# The configuration

Variant = tuple[str | None, FieldInfo]
"""A field, and the architecture or method that it belongs to if a section has several."""


def configuration() -> str:
    """Every field that can be set, by section, as Markdown."""
    own: dict[str, list[Variant]] = {
        name: [(None, field)] for name, field in Config.model_fields.items() if not _sections(field)
    }
    parts = ["## The run itself", *_fields(own, "")]
    for name, field in Config.model_fields.items():
        if variants := _sections(field):
            parts += [f"## `{name}`", *_section(name, variants)]
    return "\n\n".join(parts)


def sweep_file() -> str:
    """Every field of a sweep's file, as Markdown."""
    own: dict[str, list[Variant]] = {
        name: [(None, field)]
        for name, field in SweepFile.model_fields.items()
        if name != "scheduler"
    }
    parts = list(_fields(own, "sweep: "))
    for kind in _sections(SweepFile.model_fields["scheduler"]):
        name = kind.model_fields["name"].default
        options: dict[str, list[Variant]] = {
            key: [(None, field)] for key, field in kind.model_fields.items() if key != "name"
        }
        parts += [f"## `scheduler: {{name: {name}}}`", _text(kind.__doc__)]
        parts += _fields(options, f"sweep: {name}: ")
    return "\n\n".join(parts)


def _section(name: str, variants: Sequence[type[BaseModel]]) -> Iterator[str]:
    """A section's text and fields; those of all its variants are one list."""
    if len(variants) == 1:
        yield _text(variants[0].__doc__)
    else:
        yield "\n".join(
            f"- `{name}.name={kind.model_fields['name'].default}`: {_text(kind.__doc__)}"
            for kind in variants
        )
    fields: dict[str, list[Variant]] = {}
    for kind in variants:
        of = kind.model_fields["name"].default if len(variants) > 1 else None
        for field_name, field in kind.model_fields.items():
            fields.setdefault(field_name, []).append((of, field))
    yield from _fields(fields, f"{name}.", len(variants))


def _fields(fields: dict[str, list[Variant]], prefix: str, num_variants: int = 1) -> Iterator[str]:
    for name, variants in fields.items():
        dotted = f"{prefix}{name}"
        if name == "name" and len(variants) > 1:
            choices = ", ".join(f"`{of}`" for of, _ in variants)
            default = variants[0][1].default
            text = _text(variants[0][1].description)
            yield _confval(dotted, f"one of {choices}", f"`{default}`", [text])
            continue
        kinds = {of: describe_type(field.annotation, field.metadata) for of, field in variants}
        defaults = {of: _default(field) for of, field in variants}
        lines = [*_sentences(variants)]
        if num_variants > len(variants):
            owners = ", ".join(f"`{of}`" for of, _ in variants)
            lines.append(f"*Only with {owners}.*")
        yield _confval(dotted, _by_variant(kinds), _by_variant(defaults), lines)


def _sentences(variants: Sequence[Variant]) -> Iterator[str]:
    """What a field means; where architectures differ, what it means for each of them."""
    owners: dict[str, list[str]] = {}
    text = ""
    for of, field in variants:
        # An architecture that says nothing of its own means the same as the one before.
        text = _text(field.description) or text
        owners.setdefault(text, []).append(f"`{of}`")
    if len(owners) == 1:
        yield text
    else:
        yield "\n".join(f"- {', '.join(of)}: {text}" for text, of in owners.items())


def _confval(name: str, kind: str, default: str, sentences: Iterable[str]) -> str:
    """The directive that describes a field."""
    notes = []
    if not name.startswith("sweep: ") and name.startswith(MAY_CHANGE_ON_RESUME):
        notes.append("*May be changed when a run is resumed.*")
    elif name in MAY_CHANGE_IN_POPULATION:
        notes.append("*Fixed for a run, but a population may vary it.*")
    text = "\n\n".join([*sentences, *notes])
    return f"```{{confval}} {name}\n:type: {kind}\n:default: {default}\n\n{text}\n```"


def _by_variant(values: dict[str | None, str]) -> str:
    """One text if all variants agree, else which variants have which."""
    by_text: dict[str, list[str | None]] = {}
    for variant, text in values.items():
        by_text.setdefault(text, []).append(variant)
    if len(by_text) == 1:
        text, variants = by_text.popitem()
        return text
    return "; ".join(
        f"{text} ({', '.join(str(variant) for variant in variants)})"
        for text, variants in by_text.items()
    )


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type with its bounds in words, such as "whole number, at least 1"."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return describe_type(arguments[0], [*arguments[1:], *metadata])
    if get_origin(annotation) is Literal:
        text = "one of " + ", ".join(f"`{value}`" for value in arguments)
    elif annotation is Schedule:
        text = "number or schedule"
    elif annotation in _WORDS:
        text = _WORDS[annotation]
    elif get_origin(annotation) is tuple and arguments[-1] is Ellipsis:
        text = f"list, each {describe_type(arguments[0])}"
    elif get_origin(annotation) is tuple:
        text = f"list of {len(arguments)}, each {describe_type(arguments[0])}"
    elif get_origin(annotation) is dict:
        text = "mapping of dotted field names"
    elif type(None) in arguments:
        rest = [describe_type(part) for part in arguments if part is not type(None)]
        return " or ".join(rest) + _suffix(metadata) + ", or `null`"
    elif arguments:
        text = ", or ".join(describe_type(part) for part in arguments)
    else:
        raise TypeError(f"no words for the type {annotation!r}")
    return text + _suffix(metadata)


def _suffix(metadata: Iterable[Any]) -> str:
    return "".join(f", {bound}" for bound in _bounds(metadata))


_BOUNDS = {
    "ge": "at least {}",
    "gt": "greater than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "min": "at least {}",
    "max": "at most {}",
    "multiple_of": "a multiple of {}",
    "pattern": "matching `{}`",
}


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        elif isinstance(item, AfterValidator) and item.func.__qualname__.startswith("within."):
            # The bounds of a schedule are what the closure of its validator holds.
            limits = inspect.getclosurevars(item.func).nonlocals
            yield f"{'greater than' if limits['above'] else 'at least'} {limits['low']:g}"
            if limits["high"] != float("inf"):
                yield f"at most {limits['high']:g}"
        elif getattr(item, "min_length", None):
            yield "not empty"
        else:
            for name, text in _BOUNDS.items():
                if (value := getattr(item, name, None)) is not None:
                    yield text.format(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none; must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, tuple):
        value = list(value)
    if value == "":
        return "empty"
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    return [kind for kind in _models_in(field.annotation) if kind is not Schedule]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _models_in(part)]


def _text(docstring: str | None) -> str:
    """A docstring as Markdown: on one line, with what Markdown would take for markup escaped."""
    pieces = " ".join((docstring or "").split()).split("`")
    pieces[::2] = [re.sub(r"([*_<>\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


# The command line


@dataclass(frozen=True)
class Command:
    """A verb of the command, such as `ganscale shards build`."""

    name: str
    command: Any

    @property
    def parameters(self) -> list[Any]:
        """Its arguments and options, without `--help`."""
        return [param for param in self.command.params if "--help" not in param.opts]

    @property
    def annotations(self) -> dict[str, Any]:
        """The annotations of its function, by the names of the parameters."""
        return get_type_hints(self.command.callback, include_extras=True)


def commands(command: Any = None, name: str = "ganscale") -> Iterator[Command]:
    """Every verb, those of groups after the group's own."""
    command = typer.main.get_command(app) if command is None else command
    for verb, inner in getattr(command, "commands", {}).items():
        full = f"{name} {verb}"
        if getattr(inner, "commands", None):
            yield from commands(inner, full)
        else:
            yield Command(full, inner)


def command_line() -> str:
    """Every verb with its arguments and options, as Markdown."""
    verbs = sorted(commands(), key=lambda verb: verb.name)
    return "\n\n".join(part for verb in verbs for part in _command(verb))


def _command(verb: Command) -> Iterator[str]:
    yield f"## `{verb.name}`"
    yield from (_text(part) for part in inspect.cleandoc(verb.command.help or "").split("\n\n"))
    usage = [_usage(param) for param in verb.parameters if param.param_type_name == "argument"]
    if any(param.param_type_name == "option" for param in verb.parameters):
        usage.insert(0, "[OPTIONS]")
    yield f"```text\n{' '.join([verb.name, *usage])}\n```"
    yield f"```{{program}} {verb.name}\n```"
    yield from (_parameter(verb, param) for param in verb.parameters)
    if lines := list(examples(verb)):
        text = "\n".join(f"# {label}\n{line}" if label else line for label, line in lines)
        yield f"```shell\n{text}\n```"


def _usage(param: Any) -> str:
    name = _metavar(param)
    name += "..." if param.nargs == -1 and not name.endswith("...") else ""
    return name if param.required else f"[{name}]"


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _parameter(verb: Command, param: Any) -> str:
    is_option = param.param_type_name == "option"
    is_flag = is_option and param.is_flag
    names = param.opts if is_option else [_metavar(param)]
    value = f" <{param.metavar or param.name}>" if is_option and not is_flag else ""
    facts = [] if is_flag else [_value_type(verb, param)]
    if param.required:
        facts.append("must be given")
    elif (default := _option_default(param)) is not None:
        facts.append(f"default: {default}")
    if getattr(param, "envvar", None):
        facts.append(f"also the environment variable `{param.envvar}`")
    if getattr(param, "multiple", False):
        facts.append("may be given several times")
    text = _text(param.help)
    note = f"*{'; '.join(fact for fact in facts if fact)}*" if any(facts) else ""
    head = ", ".join(name + value for name in names)
    return "\n".join([f"```{{option}} {head}", "", text, "", note, "```"])


def _value_type(verb: Command, param: Any) -> str:
    annotation = verb.annotations[param.name]
    metadata: Sequence[Any] = ()
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    # What may be omitted, or given several times, is said elsewhere.
    if type(None) in get_args(annotation):
        (annotation,) = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is list:
        (annotation,) = get_args(annotation)
    return describe_type(annotation, metadata)


def _option_default(param: Any) -> str | None:
    value = param.default() if callable(param.default) else param.default
    if value is None or value is False or value == [] or param.nargs == -1:
        return None
    return f"`{value}`"


_EXAMPLE = re.compile(
    r"(?P<label>[A-Z][^:.]*): (?P<line>(?:[A-Z_]+=\S+ )?ganscale .*?)"
    r"(?=[.;]?\s+[A-Z][^:.=]*: (?:[A-Z_]+=\S+ )?ganscale |$)"
)


def examples(verb: Command) -> Iterator[tuple[str, str]]:
    """The commands that end a verb's `--help`, each with what it shows if it says so."""
    for match in _EXAMPLE.finditer(verb.command.epilog or ""):
        label = "" if match["label"] == "Example" else match["label"]
        # One example of several commands, one after the other.
        for line in match["line"].rstrip(".").split(";"):
            yield label, line.strip()
            label = ""


# The presets


def presets() -> str:
    """A table of all presets, as `ganscale presets` prints it."""
    rows = [PRESET_COLUMNS, ("---",) * len(PRESET_COLUMNS)]
    rows += [(f"`{name}`", f"`{model}`", *rest) for name, model, *rest in preset_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "sweep-file": sweep_file,
    "command-line": command_line,
    "presets": presets,
}
"""What can be generated, by the name in the marker."""
