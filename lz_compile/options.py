"""``mode`` and ``options`` of torch.compile, split between lz-compile and Inductor."""

from __future__ import annotations

import difflib
import os
from typing import Any

from lz_compile import config


class OptionError(ValueError):
    """An option or mode that does not exist, with the nearest one that does."""


def split_options(mode: str | None, options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our settings and Inductor's config patches.

    ``mode`` means what it means to ``backend="inductor"``; names in ``options`` are our settings
    (:mod:`lz_compile.config`) or Inductor's.

    Raises:
        OptionError: an unknown mode or option, or a value of the wrong type for one of ours.
    """
    import torch._inductor
    import torch._inductor.config as inductor_config

    inductor: dict[str, Any] = {}
    if mode is not None and mode != "default":
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise OptionError(f"unknown mode {mode!r}{_nearest(mode, ['default', *modes])}")
        inductor.update(modes[mode])
    ours: dict[str, Any] = {}
    our_settings = config.get_config_copy()
    inductor_settings = inductor_config.get_config_copy()
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name in our_settings:
            ours[name] = _checked(name, value, our_settings[name])
        elif name in inductor_settings:
            inductor[name] = value
        else:
            raise OptionError(
                f"unknown option {key!r} for backend 'layerzero'{_nearest(name, [*our_settings, *inductor_settings])}"
            )
    return ours, inductor


def _checked(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, list) and isinstance(value, str):
        value = [value]
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if name in ("policy", "dump") and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, type(default)):
        raise OptionError(f"option {name!r} takes a {type(default).__name__}, not {value!r}")
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise OptionError(f"option {name!r} takes a list of strings, not {value!r}")
    words = config._WORDS.get(name)
    if words and value not in words:
        near = difflib.get_close_matches(value, words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"option {name!r} takes {', '.join(map(repr, words))}, not {value!r}{hint}")
    return value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(config.get_config_copy()))}"
