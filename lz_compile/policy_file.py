"""The form of a policy: YAML or a dict becomes rules, or a list of what is wrong with it.

Enters: text or a dict.  Leaves: :class:`~lz_compile.policy.Rule` objects, and for every problem a line
``file:line: message`` with the nearest right word.  Imports pydantic and PyYAML: :mod:`lz_compile.policy` imports this
module when there is a policy to read.

The YAML is composed to nodes and never constructed, so no tag can make objects; nodes know their lines, and a path such
as ``("rules", 0, "when", "dtype")`` finds the line for an error of pydantic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from lz_compile.policy import ACTIONS, OPERATORS, Condition, Rule, nearest

Path = tuple[str | int, ...]
UNSET: Any = None

_MAX_DEPTH = 16
_ALIAS = "a star without quotes begins a YAML alias"
_QUOTES = 'quote operators and globs: "!=", ">=", "*.tiled"'


# -- the form --------------------------------------------------------------------------------------------------------


def _problem(message: str) -> PydanticCustomError:
    return PydanticCustomError("policy", "{message}", {"message": message})


def _plain(text: str) -> str:
    if "*" in text or "?" in text:
        raise _problem(f"{text!r} would be compared letter by letter; for a glob write {{match: {text!r}}}")
    return text


def _word(text: str, known: list[str]) -> str:
    if text not in known:
        raise _problem(f"there is no {text!r}{nearest(text, known)}")
    return text


def _mode(text: str) -> str:
    import torch._inductor

    return _word(text, list(dict.fromkeys(["default", *torch._inductor.list_mode_options()])))


def _dtype(text: str) -> str:
    """The dtype's full name: ``half`` and ``torch.half`` are ``float16``."""
    name = text.removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    common = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
    raise _problem(f"there is no dtype {text!r}{nearest(name, common)}")


def _glob(text: str) -> str:
    if not re.fullmatch(r"[\w.*?\[\]!-]+", text):
        raise _problem(f"{text!r} is no glob over kernel names; several go in a list")
    return text


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else [value]


Whole = Annotated[int, Field(ge=0, lt=1 << 63)]
Plain = Annotated[str, AfterValidator(_plain)]
Phase = Annotated[str, AfterValidator(lambda text: _word(text, ["prefill", "decode"]))]
Device = Annotated[str, AfterValidator(lambda text: _word(text, ["cpu", "cuda"]))]
Mode = Annotated[str, AfterValidator(_mode)]
Dtype = Annotated[str, AfterValidator(_dtype)]
Globs = Annotated[list[Annotated[str, AfterValidator(_glob)]], BeforeValidator(_list), Field(min_length=1)]
T = TypeVar("T")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Compared(Strict, Generic[T]):
    eq: T = Field(default=UNSET, alias="==")
    ne: T = Field(default=UNSET, alias="!=")
    among: list[T] = Field(default=UNSET, alias="in", min_length=1)
    not_among: list[T] = Field(default=UNSET, alias="not_in", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        return {"in": list(value)} if isinstance(value, (list, tuple)) else {"==": value}


class Text(Compared[T], Generic[T]):
    match: str = Field(default=UNSET, min_length=1)


class Number(Compared[Whole]):
    lt: Whole = Field(default=UNSET, alias="<")
    le: Whole = Field(default=UNSET, alias="<=")
    gt: Whole = Field(default=UNSET, alias=">")
    ge: Whole = Field(default=UNSET, alias=">=")


class When(Strict):
    op: Text[Plain] = UNSET
    module: Text[Plain] = UNSET
    pattern: Text[Plain] = UNSET
    dtype: Text[Dtype] = UNSET
    head_size: Number = UNSET
    value_head_size: Number = UNSET
    queries: Number = UNSET
    keys: Number = UNSET
    sequence_length: Number = UNSET
    batch: Number = UNSET
    heads: Number = UNSET
    kv_heads: Number = UNSET
    device: Text[Device] = UNSET
    device_name: Text[Plain] = UNSET
    phase: Text[Phase] = UNSET
    mode: Text[Mode] = UNSET


class RuleForm(Strict):
    name: str = ""
    lock: Globs = UNSET
    allow: Globs = UNSET
    deny: Globs = UNSET
    boost: Globs = UNSET
    # Bounded, so that no product of boosts becomes zero or infinite.
    by: float = Field(default=1.0, ge=0.001, le=1000)
    when: When = When()
    because: str = ""


class PolicyForm(Strict):
    version: Literal[1] = 1
    rules: Annotated[list[RuleForm], BeforeValidator(lambda value: [] if value is None else value)] = []


# -- reading ---------------------------------------------------------------------------------------------------------


def read(source: str | dict[str, Any], name: str) -> tuple[list[Rule], list[str]]:
    """The rules of a policy, and what is wrong with it; with problems there are no rules.

    Args:
        source: YAML text or a dict.
        name: what stands for the file in messages.
    """
    found = _Found(name, None)
    value: Any = source
    if isinstance(source, str):
        found.lines = {}
        value = _compose(source, found)
        if value is None and not found.problems:
            return [], []
    if not found.problems or value is not None:
        form = _validate(value, found)
        if form is not None and not found.problems:
            return [_rule(rule, i, found) for i, rule in enumerate(form.rules)], []
    return [], found.sorted()


class _Found:
    """Problems by place; ``lines`` maps paths to lines, and is None for a dict, whose places are the paths."""

    def __init__(self, name: str, lines: dict[Path, int] | None) -> None:
        self.name = name
        self.lines = lines
        self.problems: list[tuple[int, str]] = []

    def line(self, path: Path) -> int:
        lines = self.lines or {}
        if len(path) == 6 and path not in lines:
            path = (*path[:4], path[5])  # a list that stood for {in: list}
        while path and path not in lines:
            path = path[:-1]
        return lines.get(path, 1)

    def where(self, path: Path) -> str:
        if self.lines is not None:
            return f"{self.name}:{self.line(path)}"
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        return f"{self.name} {steps.lstrip('.')}".rstrip()

    def add(self, path: Path, message: str) -> None:
        self.problems.append((self.line(path), f"{self.where(path)}: {message}"))

    def add_at(self, line: int, message: str) -> None:
        self.problems.append((line, f"{self.name}:{line}: {message}"))

    def sorted(self) -> list[str]:
        return [text for _, text in sorted(self.problems, key=lambda problem: problem[0])]


def _validate(value: Any, found: _Found) -> PolicyForm | None:
    if not isinstance(value, dict):
        found.add((), f"a policy is a mapping with the key 'rules', not {_shown(value)}")
        return None
    version = value.get("version", 1)
    if type(version) is not int or version != 1:
        found.add(("version",), f"there is no version {version!r} of the policy format; this release reads version 1")
        return None
    for path, message in _misplaced(value.get("rules")):
        found.add(path, message)
    try:
        return PolicyForm.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            found.add(detail["loc"], _message(detail))
        return None


def _misplaced(rules: Any) -> Iterator[tuple[Path, str]]:
    """What is wrong between the keys of a rule: not exactly one action, or a boost without its factor."""
    for i, rule in enumerate(rules if isinstance(rules, list) else []):
        if not isinstance(rule, dict):
            continue
        actions = [key for key in rule if key in ACTIONS]
        if len(actions) > 1:
            yield ("rules", i, actions[1]), f"a rule has one action; this one has {' and '.join(actions)}"
        elif not actions and set(rule) <= set(RuleForm.model_fields):
            yield ("rules", i), f"a rule needs one of {', '.join(ACTIONS)}"
        if "boost" in actions and "by" not in rule:
            yield ("rules", i, "boost"), "boost needs 'by', the factor that the kernel's time is divided by"
        elif "by" in rule and actions and "boost" not in actions:
            yield ("rules", i, "by"), f"'by' belongs to boost, not to {actions[0]}"


_NOUNS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a mapping",
}
_SYNONYMS = {"=": "==", "=>": ">=", "=<": "<=", "<>": "!=", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">"}
_SYNONYMS |= {"ge": ">=", "not in": "not_in", "glob": "match", "like": "match"}


def _message(error: ErrorDetails) -> str:
    path, kind, value = error["loc"], error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown(path)
    asks = len(path) > 3 and path[2] == "when"
    subject = path[3] if asks else next((step for step in reversed(path) if isinstance(step, str)), "the policy")
    if kind == "too_short":
        return f"{subject} takes an entry or more"
    if kind == "policy":
        return f"{subject}: {error['msg']}"
    if asks and len(path) > 4 and path[4] != "==":
        subject = f"{subject} {str(path[4])!r}"
    if kind in _NOUNS:
        noun = _NOUNS[kind]
        if len(path) > 2 and path[2] in ACTIONS:
            noun = "a glob or a list of globs"
        elif len(path) == 2:
            subject = "a rule"
            return f"{subject} is a mapping, not {_shown(value)}"
        return f"{subject} takes {noun}, not {_shown(value)}"
    return f"{subject}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {_shown(value)}"


def _unknown(path: Path) -> str:
    key = str(path[-1])
    if len(path) == 1:
        return f"unknown key {key!r}{nearest(key, PolicyForm.model_fields)}"
    if len(path) == 3:
        return f"unknown key {key!r}{nearest(key, RuleForm.model_fields)}"
    if len(path) == 4:
        return f"unknown fact {key!r}{nearest(key, When.model_fields)}"
    fact = str(path[3])
    form = When.model_fields[fact].annotation
    operators = [o for o in OPERATORS if o in {f.alias or n for n, f in form.model_fields.items()}]  # type: ignore
    if key in OPERATORS:
        return f"{key!r} does not compare {fact}, which is {'a number' if form is Number else 'text'}; it takes " + (
            ", ".join(operators)
        )
    if key in _SYNONYMS:
        return f"unknown operator {key!r}; did you mean {_SYNONYMS[key]!r}?"
    return f"unknown operator {key!r}{nearest(key, operators)}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return "so large a number"  # Python refuses to spell out really large ones
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rule(form: RuleForm, index: int, found: _Found) -> Rule:
    action = next(action for action in ACTIONS if action in form.model_fields_set)
    when = form.when.model_dump(by_alias=True, exclude_unset=True)
    return Rule(
        action=action,
        globs=tuple(getattr(form, action)),
        when=tuple(
            Condition(fact, operator, tuple(value) if isinstance(value, list) else value)
            for fact, condition in when.items()
            for operator, value in condition.items()
        ),
        by=form.by,
        name=" ".join(form.name.split()),
        because=" ".join(form.because.split()),
        where=found.where(("rules", index, action)),
    )


# -- YAML ------------------------------------------------------------------------------------------------------------


# A date is text; so are the signs = and << which YAML 1.1 gives a meaning.
_TAGS: dict[type, tuple[str, ...]] = {
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
    yaml.ScalarNode: ("null", "bool", "int", "float", "str", "timestamp", "value", "merge"),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes.  Anchors and aliases are refused: a star without quotes is a glob that was meant as text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=_ALIAS, problem_mark=mark)
        if getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="a policy takes no YAML anchors", problem_mark=mark)
        if self.depth == _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, found: _Found) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _plain_value(loader, node, (), found)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found.add_at(mark.line + 1 if mark else 1, _yaml_message(error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found.add_at(line, f"character #x{error.character:04x} is not allowed in YAML")
    return None


def _yaml_message(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if problem.startswith("but "):
        problem = f"{error.context}, {problem}"
    if error.context == "while scanning an alias":
        problem = _ALIAS
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces"
    if problem == _ALIAS or "start any token" in problem:
        return f"{problem}; {_QUOTES}"
    return problem


def _plain_value(loader: _Loader, node: Any, path: Path, found: _Found) -> Any:
    """Dicts, lists and scalars; fills ``found.lines``, keeps the first of duplicate keys."""
    lines = found.lines
    assert lines is not None
    first = node.start_mark.line + 1
    lines.setdefault(path, first)
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if tag not in _TAGS[type(node)]:
        found.add_at(first, f"the YAML tag {tag!r} is not allowed here")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag.startswith("!"):
                found.add_at(line, f"a key is plain text; {_QUOTES}")
                continue
            here = (*path, key.value)
            if key.value in mapping:
                found.add_at(line, f"duplicate key {key.value!r}, first in line {lines[here]}")
                continue
            lines[here] = line
            mapping[key.value] = _plain_value(loader, value, here, found)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(loader, item, (*path, i), found) for i, item in enumerate(node.value)]
    try:
        match tag:
            case "null":
                return None
            case "bool":
                return loader.construct_yaml_bool(node)
            case "int":
                return loader.construct_yaml_int(node)
            case "float":
                return loader.construct_yaml_float(node)
    except (ValueError, KeyError):
        found.add_at(first, f"{_shown(node.value)} is no {tag}")
    return node.value
