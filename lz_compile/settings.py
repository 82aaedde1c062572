"""The settings of :mod:`lz_compile.config` in words: each with its value, where that comes from, and a line of help."""

from __future__ import annotations

import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lz_compile import config

# "environment": a variable of the process; "set": assigned, or patched for this block or compile.
Source = Literal["default", "environment", "set"]

# Settings that a variable sets for the process.
_VARIABLES = {"measure": "LZ_COMPILE_MEASURE", "policy": "LZ_COMPILE_POLICY"}


@dataclass(frozen=True)
class Setting:
    name: str
    value: Any
    source: Source
    help: str


def settings() -> list[Setting]:
    """All settings as they hold here, in the order of the module."""
    values = {name: value for name, value in config.get_config_copy().items() if name.islower() and name[0] != "_"}
    lines = _comments(values)
    return [Setting(name, *_value(name, values[name]), lines.get(name, "")) for name in values]


def _value(name: str, value: Any) -> tuple[Any, Source]:
    variable = os.environ.get(_VARIABLES.get(name, ""), "")
    before = vars(config)["_config"][name].default  # what the module's code gave, where the variable may have had a say
    if value != before:
        return value, "set"
    if variable and not value:  # read when it is needed (the policy), not into the setting
        return variable, "environment"
    return value, "environment" if variable and variable == value else "default"


def _comments(names: Any) -> dict[str, str]:
    """The first sentence of the comment above each setting; empty where the source is not there."""
    try:
        text = Path(config.__file__).read_text(encoding="utf-8")
    except OSError:
        return {}
    found = {}
    for comment, name in re.findall(r"((?:^# .*\n)+)(\w+)(?=: )", text, re.MULTILINE):
        if name in names:
            whole = " ".join(line.removeprefix("# ") for line in comment.splitlines())
            found[name] = re.split(r"(?<=[.])\s|: ", whole)[0].rstrip(".")
    return found


def as_text(columns: int = 120) -> str:
    """Two or more lines for each setting."""
    lines = ["lz_compile.config"]
    for setting in settings():
        lines += textwrap.wrap(
            f"{setting.name} = {setting.value!r}  ({setting.source})",
            columns,
            initial_indent="  ",
            subsequent_indent="      ",
        )
        lines += textwrap.wrap(setting.help, columns, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
