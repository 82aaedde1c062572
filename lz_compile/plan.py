"""Which kernel runs which region.

Enters: regions and kernels.  Leaves: a :class:`Plan` with one :class:`Choice` a region.  A planner is any callable
``(regions, kernels) -> Plan``; :func:`first_fit` takes, for each region on its own, the first kernel in order of
preference that supports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lz_compile import config
from lz_compile.region import Kernel, Region, Verdict

log = logging.getLogger("lz_compile")

INDUCTOR = "inductor"


@dataclass
class Choice:
    """``kernel`` is None when the region is left to Inductor; ``rejected`` maps kernel names to why not."""

    region: Region
    kernel: Kernel | None
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    choices: list[Choice]
    planner: str


Planner = Callable[[Sequence[Region], Sequence[Kernel]], Plan]


def first_fit(regions: Sequence[Region], kernels: Sequence[Kernel]) -> Plan:
    """For each region the first kernel that may run it; ``config.prefer`` and ``config.disable`` overrule the order."""
    return Plan([_choose(region, kernels) for region in regions], planner="first fit")


def _choose(region: Region, kernels: Sequence[Kernel]) -> Choice:
    if region.declined:
        return Choice(region, None, region.declined)
    rejected: dict[str, str] = {}
    for kernel in _by_preference(kernels):
        if kernel.kind != region.kind:
            continue
        if any(fnmatchcase(kernel.name, pattern) for pattern in config.disable):
            rejected[kernel.name] = "disabled by option"
            continue
        why_not = _why_not(kernel, region)
        if why_not:
            rejected[kernel.name] = why_not
            continue
        return Choice(region, kernel, kernel.summary, rejected)
    return Choice(region, None, "no kernel takes it", rejected)


def _why_not(kernel: Kernel, region: Region) -> Verdict:
    try:
        return kernel.supports(region)
    except Exception as error:
        if config.strict:
            raise
        log.warning("%s could not say whether it takes %s: %s", kernel.name, region.module, error)
        return f"failed: {type(error).__name__}: {error}"


def _by_preference(kernels: Sequence[Kernel]) -> list[Kernel]:
    def rank(kernel: Kernel) -> int:
        for position, pattern in enumerate(config.prefer):
            if fnmatchcase(kernel.name, pattern):
                return position
        return len(config.prefer)

    return sorted(kernels, key=rank)
