"""The registry: every provider, and the kernels of those that work on this machine, in order of preference.

Enters: our own kernels (:data:`KERNELS`), the modules of this folder that wrap a third-party library
(:data:`OPTIONAL`, each with a ``PROVIDER``), the entry points of the group ``lz_compile.providers``, and what a script
hands to :func:`register`.  Leaves: :func:`kernels`, :func:`providers` and :func:`status`.

Foreign code runs in this process only after a child process has run it (:mod:`lz_compile.discovery`): a library when
its provider's probe passed, the module of an entry point when a child has loaded it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lz_compile import config, discovery
from lz_compile.discovery import Finding, Spec
from lz_compile.lowering import (
    aten,
    cpu,
    projections,
    sampling,
    sampling_cpu,
    tables,
    triton,
    triton_moe,
    triton_sampling,
)
from lz_compile.region import Kernel, Provider

log = logging.getLogger("lz_compile")

GROUP = "lz_compile.providers"

# What comes with PyTorch or with us, in order of preference; it groups into providers by the kernels' names.  The
# kernels of others follow, in the order of their providers.
KERNELS: list[Kernel] = [
    triton.SPLIT_KV,
    aten.SDPA,
    cpu.RANGES,
    triton.TILED,
    aten.SDPA_MASKED,
    tables.STORED,
    triton_moe.MOE,
    sampling_cpu.FILTERED,
    triton_sampling.UNSETTLED,
    triton_sampling.FILTERS,
    sampling.WARPERS,
    projections.PACKED,
]
KERNELS += [kernel for kernel in aten.PROVIDER.kernels if kernel not in KERNELS]

# Modules of lz_compile.lowering that wrap a third-party library, each named as its provider.
OPTIONAL = ("flash_attn", "flashinfer", "xformers", "flex", "liger")


@dataclass(frozen=True)
class ProviderStatus:
    """A provider that is considered on this machine.

    ``origin`` is ``"built in"``, ``"registered"``, or ``"entry point of <distribution>"``.  ``provider`` is None when
    it did not load, or when a child could not load its entry point.  ``kernels`` are those that compete: none unless
    the finding is usable, and only those that the probe vouched for.
    """

    name: str
    origin: str
    finding: Finding
    provider: Provider | None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        if self.provider is None or not self.finding.usable:
            return ()
        vouched = self.finding.kernels
        return tuple(k for k in self.provider.kernels if vouched is None or k.name.partition(".")[2] in vouched)


@dataclass(frozen=True)
class _Source:
    name: str
    origin: str
    what: Provider | importlib.metadata.EntryPoint | Finding
    spec: Spec | None = None

    @property
    def question(self) -> Provider | Spec | None:
        """What discovery has to answer; None when it is answered."""
        return self.spec or (self.what if isinstance(self.what, Provider) else None)


_registered: tuple[Provider, ...] = ()
_modules: dict[str, Provider | Finding] = {}
_loaded: dict[tuple[str, str], Provider | str] = {}


def kernels() -> list[Kernel]:
    """The kernels of all working providers, in order of preference; the first call may run probes."""
    rank = {kernel.name: position for position, kernel in enumerate(KERNELS)}
    every = [kernel for provider in providers() for kernel in provider.kernels]
    return sorted(every, key=lambda kernel: rank.get(kernel.name, len(rank)))


def providers() -> list[Provider]:
    """The providers that work, each with the kernels that do: ours, wrappers, entry points, registered ones."""
    working = [(entry.provider, entry.kernels) for entry in status()]
    return [dataclasses.replace(provider, kernels=kept) for provider, kept in working if provider is not None and kept]


def status() -> list[ProviderStatus]:
    """Every provider that ``LZ_COMPILE_PROVIDERS`` lets take part, whether it works or not."""
    sources = _sources()
    found = iter(discovery.findings([source.question for source in sources if source.question is not None]))
    entries = []
    for source in sources:
        finding = source.what if isinstance(source.what, Finding) else next(found)
        provider = source.what if isinstance(source.what, Provider) else None
        if isinstance(source.what, importlib.metadata.EntryPoint) and finding.usable:
            loaded = _load(source.what)
            if isinstance(loaded, Provider):
                provider = loaded
            else:
                finding = dataclasses.replace(finding, state="failed", detail=loaded)
        entries.append(ProviderStatus(source.name, source.origin, finding, provider))
    return entries


def register(provider: Provider) -> None:
    """Adds a provider made in this process.  It is trusted: a child tries it only when it names a probe.

    Raises:
        ValueError: the name belongs to another provider, or a kernel's name does not start with the provider's.
    """
    global _registered
    _check(provider)
    if provider.name in _reserved() or any(provider.name == other.name for other in _registered):
        raise ValueError(f"there is a provider {provider.name} already")
    _registered = (*_registered, provider)


def unregister(name: str) -> None:
    """Takes a registered provider away.

    Raises:
        KeyError: no provider of this name was registered.
    """
    global _registered
    left = tuple(provider for provider in _registered if provider.name != name)
    if len(left) == len(_registered):
        raise KeyError(name)
    _registered = left


@contextlib.contextmanager
def registered(provider: Provider) -> Iterator[Provider]:
    """:func:`register` for a block."""
    register(provider)
    try:
        yield provider
    finally:
        unregister(provider.name)


def _check(provider: Provider) -> None:
    for kernel in provider.kernels:
        if kernel.provider != provider.name:
            raise ValueError(f"kernel {kernel.name} of provider {provider.name} must be called {provider.name}.*")


def _reserved() -> set[str]:
    return {kernel.provider for kernel in KERNELS} | set(OPTIONAL)


def _sources() -> list[_Source]:
    """All that is considered, without running anything foreign."""
    every = [_Source(provider.name, "built in", provider) for provider in _own()]
    every += [_Source(name, "built in", _wrapper(name)) for name in OPTIONAL if discovery.considered(name)]
    taken = _reserved() | {provider.name for provider in _registered}
    for entry, spec in _entry_points(tuple(sys.path)):
        distribution = " or ".join(spec.distributions) or "an unknown distribution"
        if entry.name in taken:
            _warn_once(f"the entry point {entry.name} of {distribution} is not used: there is a provider of this name")
            continue
        taken.add(entry.name)
        every.append(_Source(entry.name, f"entry point of {distribution}", entry, spec))
    every += [_Source(provider.name, "registered", provider) for provider in _registered]
    _warn_of_typos({source.name for source in every} | taken)
    return [source for source in every if discovery.considered(source.name)]


def _own() -> list[Provider]:
    """Our own kernels by provider, in order of first preference."""
    names = dict.fromkeys(kernel.provider for kernel in KERNELS)
    return [Provider(name, tuple(kernel for kernel in KERNELS if kernel.provider == name)) for name in names]


def _wrapper(name: str) -> Provider | Finding:
    """The provider of one of our wrapper modules; a module that does not import costs a warning and is not used."""
    if name not in _modules:
        try:
            provider = importlib.import_module(f"lz_compile.lowering.{name}").PROVIDER
            _check(provider)
            _modules[name] = provider
        except Exception as error:
            if config.strict:
                raise
            log.warning("lz-compile's own module for %s does not import: %s: %s", name, type(error).__name__, error)
            _modules[name] = Finding(name, "failed", f"lz_compile.lowering.{name}: {type(error).__name__}: {error}")
    return _modules[name]


@functools.lru_cache(maxsize=4)
def _entry_points(path: tuple[str, ...]) -> tuple[tuple[importlib.metadata.EntryPoint, Spec], ...]:
    """The entry points of our group, by name; read once for each state of ``sys.path``."""
    found = [(entry, Spec.of(entry)) for entry in importlib.metadata.entry_points(group=GROUP)]
    return tuple(sorted(found, key=lambda pair: (pair[0].name, pair[1].distributions)))


def _load(entry: importlib.metadata.EntryPoint) -> Provider | str:
    """The provider of an entry point that a child has loaded already, or why it does not load here."""
    key = (entry.name, entry.value)
    if key not in _loaded:
        try:
            found = entry.load()
            provider = found if isinstance(found, Provider) else found()
            if not isinstance(provider, Provider):
                raise TypeError(f"{entry.value} gives a {type(provider).__name__}, not a Provider")
            _check(provider)
            _loaded[key] = provider
        except Exception as error:
            if config.strict:
                raise
            _loaded[key] = f"loads in a child process, but not in this one: {type(error).__name__}: {error}"
            log.warning("lz-compile does not use %s: it %s", entry.name, _loaded[key])
    return _loaded[key]


def _warn_of_typos(names: set[str]) -> None:
    for glob in (glob for globs in discovery.selection() for glob in globs):
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": {', '.join(sorted(names))}"
            _warn_once(f"LZ_COMPILE_PROVIDERS: {glob} names no provider{hint}")


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    log.warning("%s", message)
