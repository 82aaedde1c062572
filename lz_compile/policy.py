"""What the user decides about kernels: rules that lock, allow, deny or boost them where conditions hold.

Enters: a policy (a YAML file, its text, or a dict), and for each region its facts and the names of the kernels that
compete for it.  Leaves: a :class:`Judgement`.

A rule has one action on kernels, named by globs over ``provider.kernel`` or over the bare provider:

* ``deny``: these kernels may not run.
* ``allow``: only these kernels may run, and ``inductor``.  Several allow rules that hold add up.
* ``lock``: one of these kernels runs, or the compile stops with a :class:`PolicyError` that says why none can.
* ``boost``, with ``by``: the kernel's time counts as divided by ``by`` (below 1 it counts as slower).

``inductor``, which leaves the region as it is, can be named like a kernel, but a wildcard never means it: ``deny: "*"``
is plain Inductor, and ``lock: "*"`` is any kernel but Inductor.  In globs ``*`` stands for any text, dots included.

How rules combine:  every ``deny`` and ``allow`` that holds applies, whatever the order.  The first ``lock`` that holds
wins, and the locks after it do nothing.  Boosts multiply.  ``deny`` and ``allow`` come before ``boost`` and before
``lock``: a lock on kernels that are all denied cannot be honoured, which is an error.  A lock without a condition on
``op`` says nothing about regions whose op its kernels do not run.

A rule holds when every condition of its ``when`` holds.  A scalar means ``==``, a list ``in``, and
``{"<": 128, ">": 32}`` both.  ``match`` is a glob, and case counts everywhere.  A fact that a region does not have (a
symbolic size, the head size of a region without heads) fulfils no condition but ``!=`` and ``not_in``, which are the
opposites of ``==`` and ``in``.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import os
import re
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lz_compile import config
from lz_compile.region import INDUCTOR

log = logging.getLogger("lz_compile")

VARIABLE = "LZ_COMPILE_POLICY"
ACTIONS = ("lock", "allow", "deny", "boost")
OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not_in", "match")

# What a condition may ask about a region, and what it means.
FACTS: dict[str, str] = {
    "op": "kind of region: attention, rope_table, ...",
    "module": "module path: model.layers.0.self_attn",
    "pattern": "how the graph spelled it, as the report names it: sdpa, ...",
    "dtype": "bfloat16, float16, float32, ...",
    "head_size": "head size of queries and keys",
    "value_head_size": "head size of values",
    "queries": "query length",
    "keys": "key length: all slots of a static cache",
    "sequence_length": "another name for keys",
    "batch": "batch size",
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "device": "cpu or cuda",
    "device_name": "product name: NVIDIA H200",
    "phase": "prefill or decode",
    "mode": "mode of torch.compile: default, reduce-overhead, ...",
}
ALIASES = {"sequence_length": "keys"}

_MAX_BYTES = 1 << 20


class PolicyError(ValueError):
    """A policy that cannot be read, or a lock that cannot be honoured."""

    @property
    def problems(self) -> list[str]:
        """One line for each problem of a file."""
        return str(self).splitlines()


@dataclass(frozen=True)
class Condition:
    """``fact operator value``: ``value`` is text or a whole number, a tuple of them for ``in`` and ``not_in``."""

    fact: str
    operator: str
    value: Any

    def holds(self, facts: Mapping[str, Any]) -> bool:
        actual = facts.get(ALIASES.get(self.fact, self.fact))
        if not isinstance(actual, (str, int)):  # unknown; a SymInt must not be compared, that would install a guard
            return self.operator in ("!=", "not_in")
        match self.operator:
            case "==":
                return actual == self.value
            case "!=":
                return actual != self.value
            case "in":
                return actual in self.value
            case "not_in":
                return actual not in self.value
            case "match":
                return fnmatchcase(str(actual), self.value)
        if not isinstance(actual, int):
            return False
        match self.operator:
            case "<":
                return actual < self.value
            case "<=":
                return actual <= self.value
            case ">":
                return actual > self.value
            case _:
                return actual >= self.value


@dataclass(frozen=True)
class Rule:
    """One rule; ``where`` is its ``file:line``, ``by`` the factor of a boost."""

    action: str
    globs: tuple[str, ...]
    when: tuple[Condition, ...] = ()
    by: float = 1.0
    name: str = ""
    because: str = ""
    where: str = ""

    def holds(self, facts: Mapping[str, Any]) -> bool:
        return all(condition.holds(facts) for condition in self.when)

    def names(self, kernel: str) -> bool:
        """Whether the rule is about this kernel."""
        return any(_named(glob, kernel) for glob in self.globs)

    @functools.cached_property
    def text(self) -> str:
        """The rule in the report: ``policy.yaml:4 deny flash_attn.* (its name): because``."""
        factor = f" by {self.by:g}" if self.action == "boost" else ""
        name = f" ({self.name})" if self.name else ""
        because = f": {self.because}" if self.because else ""
        return f"{self.where} {self.action} {', '.join(self.globs)}{factor}{name}{because}"


@dataclass
class Judgement:
    """What a policy says about the kernels of one region.

    ``locked``: one of these must run; None without a lock.  ``denied``: kernels that may not run, with the rule for the
    report.  ``boost``: the factors that kernels' times are divided by; denied kernels have none.  ``fired``: the rules
    that decided something, in the policy's order.  ``lock`` is the lock's rule, and ``lock_reasons`` maps every kernel
    it names to why the policy itself rules it out, empty when it does not.
    """

    locked: tuple[str, ...] | None = None
    denied: dict[str, str] = field(default_factory=dict)
    boost: dict[str, float] = field(default_factory=dict)
    fired: list[str] = field(default_factory=list)
    lock: str = ""
    lock_reasons: dict[str, str] = field(default_factory=dict)

    def why_not(self, kernel: str) -> str | None:
        """The rule by which the kernel may not run here, or None when it may."""
        if kernel in self.denied:
            return self.denied[kernel]
        if self.locked is not None and kernel not in self.locked:
            return self.lock
        return None

    def require(self, usable: Collection[str], why_not: Mapping[str, str], where: str = "") -> None:
        """Checks that a lock can be honoured by one of the ``usable`` kernels.  ``inductor`` always can.

        Args:
            usable: the kernels that can run the region.
            why_not: for the others, why not.
            where: the region in the error, such as its module path.

        Raises:
            PolicyError: with the reason for every kernel that the lock names.
        """
        if self.locked is None or any(name == INDUCTOR or name in usable for name in self.locked):
            return
        reasons = [
            f"{name}: {reason or why_not.get(name) or 'not offered'}" for name, reason in self.lock_reasons.items()
        ]
        place = f" for {where}" if where else ""
        raise PolicyError(f"{self.lock}: cannot be honoured{place}: {'; '.join(reasons)}")


@dataclass(frozen=True)
class Policy:
    """Rules in their order; without rules everything may run."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def load(cls, source: str | os.PathLike[str] | dict[str, Any] | Policy | None) -> Policy:
        """The policy in ``source``.

        Args:
            source: the path of a YAML file; YAML text, told by a line break or by beginning with ``rules:`` or
                ``version:``; a dict of the same form; None or an empty text for no rules.  A file is read again only
                when its time or size changed.

        Raises:
            PolicyError: with ``file:line: message`` for every problem, and the nearest right word; also for a file that
                is missing, unreadable or larger than 1 MiB.
        """
        if source is None or (isinstance(source, str) and not source.strip()):
            return cls()
        if isinstance(source, Policy):
            return source
        if isinstance(source, str):
            if "\n" in source or re.match(r"\s*(rules|version)\s*:", source):
                return _parsed(source)
            return _load_file(source)
        if isinstance(source, os.PathLike):
            return _load_file(source)
        if isinstance(source, dict):
            return _parsed(source)
        raise PolicyError(f"a policy is a path, YAML text or a dict, not {source!r}")

    @functools.cached_property
    def digest(self) -> str:
        """The same for policies that judge alike rule by rule: names, reasons, comments and lines do not count."""
        meaning = [(rule.action, rule.globs, rule.by, sorted(map(_canonical, rule.when))) for rule in self.rules]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    def judge(self, facts: Mapping[str, Any], kernels: Sequence[str], known: Iterable[str] = ()) -> Judgement:
        """What the rules say where ``facts`` are true.

        Args:
            facts: values by the names of :data:`FACTS`, text or int; missing, None or symbolic is unknown.
            kernels: the names of the kernels for this kind of region, those that cannot run here included;
                ``inductor`` is judged beside them in any case.
            known: the names of the kernels for all kinds of region, by which a lock that is about another kind is told
                from a lock on a name that does not exist.
        """
        candidates = list(dict.fromkeys([*kernels, INDUCTOR]))
        holding = [(i, rule) for i, rule in enumerate(self.rules) if rule.holds(facts)]
        judgement = Judgement()
        fired: set[int] = set()
        for i, rule in holding:
            for name in candidates:
                if rule.action == "deny" and rule.names(name):
                    judgement.denied.setdefault(name, rule.text)
                    fired.add(i)
        allowing = [(i, rule) for i, rule in holding if rule.action == "allow"]
        if allowing:
            outside = f"not among {', '.join(rule.text for _, rule in allowing)}"
            for name in candidates:
                if name != INDUCTOR and not any(rule.names(name) for _, rule in allowing):
                    judgement.denied.setdefault(name, outside)
                    fired.update(i for i, _ in allowing)
        known = list(dict.fromkeys([*candidates, *known]))
        for i, rule in holding:
            if rule.action == "lock" and _concerns(rule, candidates, known):
                judgement.lock = rule.text
                judgement.lock_reasons = _lock_reasons(rule, candidates, known, judgement.denied)
                judgement.locked = tuple(n for n in candidates if rule.names(n) and n not in judgement.denied)
                fired.add(i)
                break
        for i, rule in holding:
            for name in candidates:
                if rule.action == "boost" and rule.names(name) and name not in judgement.denied:
                    judgement.boost[name] = judgement.boost.get(name, 1.0) * rule.by
                    fired.add(i)
        judgement.fired = [self.rules[i].text for i in sorted(fired)]
        return judgement

    def unmatched(self, kernels: Sequence[str], ops: Sequence[str] = ()) -> list[str]:
        """A warning with the rule's line and the nearest name for every glob that names none of the kernels.

        With ``ops``, the kinds of region that exist, also for every op that a condition asks for and that does not.
        """
        names = [*kernels, INDUCTOR]
        warnings = []
        for rule in self.rules:
            for glob in rule.globs:
                if not any(_named(glob, name) for name in names):
                    warnings.append(f"{rule.where}: warning: {glob!r} names no kernel{_nearest_kernel(glob, names)}")
            for op in _ops(rule) if ops else ():
                if op not in ops:
                    warnings.append(f"{rule.where}: warning: there is no op {op!r}{nearest(op, ops)}")
        return warnings


def _ops(rule: Rule) -> list[str]:
    """The ops that the rule's conditions spell out."""
    values = [condition.value for condition in rule.when if condition.fact == "op" and condition.operator != "match"]
    return [op for value in values for op in ([value] if isinstance(value, str) else value)]


def _canonical(condition: Condition) -> tuple[str, str, Any]:
    return ALIASES.get(condition.fact, condition.fact), condition.operator, condition.value


def _named(glob: str, kernel: str) -> bool:
    if kernel == INDUCTOR:
        return glob == INDUCTOR
    return fnmatchcase(kernel, glob) or fnmatchcase(kernel.partition(".")[0], glob)


def _concerns(lock: Rule, candidates: list[str], known: list[str]) -> bool:
    """Whether a lock is about this region: not when it names only kernels for other kinds, unless it asks for an op."""
    if any(lock.names(name) for name in candidates) or any(c.fact == "op" for c in lock.when):
        return True
    return not any(lock.names(name) for name in known)


def _lock_reasons(lock: Rule, candidates: list[str], known: list[str], denied: dict[str, str]) -> dict[str, str]:
    reasons = {name: denied.get(name, "") for name in candidates if lock.names(name)}
    if reasons:
        return reasons
    others = {name: "is for another op" for name in known if lock.names(name)}
    return others or {glob: f"no kernel has this name{_nearest_kernel(glob, known)}" for glob in lock.globs}


def _nearest_kernel(glob: str, kernels: Sequence[str]) -> str:
    providers = dict.fromkeys(name.partition(".")[0] for name in kernels)
    return nearest(glob, [*kernels, *providers, *(f"{provider}.*" for provider in providers if provider != INDUCTOR)])


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'right'?"``, or the known words when none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


# -- files -----------------------------------------------------------------------------------------------------------

_files: dict[Path, tuple[tuple[int, int], Policy]] = {}
_files_lock = threading.Lock()


def _load_file(source: str | os.PathLike[str]) -> Policy:
    try:
        path = Path(source).expanduser()
        status = path.stat()
    except FileNotFoundError:
        raise PolicyError(f"{source}: no such file") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{source}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(f"{path}: not a file")
    if status.st_size > _MAX_BYTES:
        raise PolicyError(f"{path}: {status.st_size} bytes; a policy has at most {_MAX_BYTES}")
    stamp = (status.st_mtime_ns, status.st_size)
    key = path.absolute()
    with _files_lock:
        cached = _files.get(key)
    if cached is not None and cached[0] == stamp:
        return cached[1]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{path}:{line}: not UTF-8 text") from None
    policy = _parsed(text, str(path))
    with _files_lock:
        _files[key] = (stamp, policy)
    return policy


def _parsed(source: str | dict[str, Any], name: str = "<policy>") -> Policy:
    from lz_compile.policy_file import read

    if isinstance(source, str) and len(source) > _MAX_BYTES:
        raise PolicyError(f"{name}: {len(source)} characters; a policy has at most {_MAX_BYTES}")
    rules, problems = read(source, name)
    if problems:
        raise PolicyError("\n".join(problems))
    return Policy(tuple(rules))


def check(
    path: str | os.PathLike[str], kernels: Sequence[str] | None = None, ops: Sequence[str] | None = None
) -> list[str]:
    """All problems of a policy file as ``file:line: message``, none when it is fine.

    Args:
        path: the file.
        kernels: the names of all kernels; then a glob that names none of them is a problem too (``warning:``).
        ops: the kinds of region; with ``kernels``, a condition on another op is a problem too.
    """
    try:
        policy = _load_file(path)
    except PolicyError as error:
        return error.problems
    return policy.unmatched(kernels, ops or ()) if kernels is not None else []


# -- which policy applies --------------------------------------------------------------------------------------------

_overruling: ContextVar[Policy | None] = ContextVar("lz_compile_policy", default=None)
_warned: set[str] = set()


@contextlib.contextmanager
def overrule(source: str | os.PathLike[str] | dict[str, Any] | Policy | None) -> Iterator[Policy]:
    """A policy for what this thread compiles in a block (``with lz_compile.overrule("policy.yaml"): model(x)``).

    It applies alone: an outer block, the option and the environment say nothing inside it, and ``overrule(None)``
    switches every policy off.  What is compiled already stays as it is.

    Raises:
        PolicyError: see :meth:`Policy.load`.
    """
    policy = Policy.load(source)
    token = _overruling.set(policy)
    try:
        yield policy
    finally:
        _overruling.reset(token)


def active() -> Policy:
    """The policy that applies now: of the innermost :func:`overrule`, else ``config.policy``, else of the variable
    ``LZ_COMPILE_POLICY``.  The first of them that is set applies alone; they are not merged.

    Raises:
        PolicyError: ``config.policy`` cannot be read: the user named it for this compile.  What the variable names may
            be older than the program, so there a failure costs one warning and no rule applies (``config.strict``
            raises).
    """
    overruling = _overruling.get()
    if overruling is not None:
        return overruling
    chosen = getattr(config, "policy", "")
    if chosen:
        return Policy.load(chosen)
    try:
        return Policy.load(os.environ.get(VARIABLE))
    except Exception as error:
        if config.strict:
            raise
        if str(error) not in _warned:
            _warned.add(str(error))
            log.warning("lz-compile goes on without the policy that %s names: %s", VARIABLE, error)
        return Policy()
