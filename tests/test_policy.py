"""Policies: what rules decide, how a broken file is reported, and which policy applies."""

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lz_compile import config, plan, policy
from lz_compile.policy import Condition, Judgement, Policy, PolicyError, active, check, overrule

POLICIES = Path(__file__).parent / "policies"
KERNELS = ["aten.cudnn", "aten.sdpa", "cpu.ranges", "flash_attn.fa3", "triton.split_kv", "triton.tiled"]
PREFILL = {
    "op": "attention",
    "module": "model.layers.3.self_attn",
    "pattern": "sdpa",
    "dtype": "bfloat16",
    "head_size": 64,
    "value_head_size": 64,
    "queries": 8192,
    "keys": 8192,
    "batch": 1,
    "heads": 32,
    "kv_heads": 8,
    "device": "cuda",
    "device_name": "NVIDIA H200",
    "phase": "prefill",
    "mode": "default",
}
DECODE = PREFILL | {"queries": 1, "phase": "decode"}


def judge(*rules: dict, facts: dict = PREFILL, kernels: list[str] = KERNELS, known: list[str] = ()) -> Judgement:
    return Policy.load({"rules": list(rules)}).judge(facts, kernels, known)


# -- what rules decide -----------------------------------------------------------------------------------------------


def test_a_policy_without_rules_decides_nothing():
    for source in (None, "", " ", {}, {"rules": []}, "rules:\n", "# nothing yet\n", "version: 1\n"):
        assert Policy.load(source).judge(PREFILL, KERNELS) == Judgement()


def test_a_denied_kernel_names_the_rule_and_its_reason():
    found = Policy.load("rules:\n  - deny: flash_attn.*\n    because: too new\n").judge(PREFILL, KERNELS)
    assert found.denied == {"flash_attn.fa3": "<policy>:2 deny flash_attn.*: too new"}
    assert found.fired == ["<policy>:2 deny flash_attn.*: too new"]
    assert found.why_not("flash_attn.fa3") == "<policy>:2 deny flash_attn.*: too new"
    assert found.why_not("triton.tiled") is None


def test_a_bare_provider_names_all_its_kernels_and_no_prefix_of_a_name_does():
    assert set(judge({"deny": "triton"}).denied) == {"triton.split_kv", "triton.tiled"}
    assert not judge({"deny": "trit"}).denied


def test_a_wildcard_never_means_inductor():
    assert set(judge({"deny": "*"}).denied) == set(KERNELS)
    assert judge({"lock": "*"}).locked == tuple(KERNELS)
    assert judge({"boost": "*", "by": 2}).boost == dict.fromkeys(KERNELS, 2.0)
    assert set(judge({"deny": "inductor"}).denied) == {"inductor"}
    assert judge({"lock": "inductor"}).locked == ("inductor",)
    assert judge({"boost": "inductor", "by": 2}).boost == {"inductor": 2.0}


def test_allow_rules_add_up_and_leave_inductor():
    found = judge({"allow": "aten.*"}, {"allow": "triton.tiled"})
    assert set(found.denied) == {"cpu.ranges", "flash_attn.fa3", "triton.split_kv"}
    assert len(found.fired) == 2
    assert "allow aten.*" in found.denied["cpu.ranges"] and "allow triton.tiled" in found.denied["cpu.ranges"]
    assert set(judge({"allow": "aten.*"}, {"deny": "inductor"}).denied) == {*KERNELS[2:], "inductor"}


def test_an_allow_rule_whose_condition_fails_restricts_nothing():
    assert judge({"allow": "aten.*", "when": {"phase": "decode"}}) == Judgement()


def test_the_first_lock_that_holds_wins_and_the_others_are_not_reported():
    found = judge(
        {"lock": "cpu.ranges", "when": {"device": "cpu"}},
        {"lock": "triton.*"},
        {"lock": "aten.sdpa", "because": "late"},
    )
    assert found.locked == ("triton.split_kv", "triton.tiled")
    assert found.fired == ["<policy> rules[1].lock lock triton.*"]
    assert found.why_not("aten.sdpa") == found.lock == "<policy> rules[1].lock lock triton.*"


def test_a_lock_takes_what_deny_leaves():
    assert judge({"lock": "triton.*"}, {"deny": "triton.tiled"}).locked == ("triton.split_kv",)


def test_a_rule_that_changes_nothing_is_not_reported():
    assert judge({"deny": "liger.*"}, {"boost": "liger.*", "by": 2}, {"allow": "*"}).fired == []
    assert judge({"deny": "aten.*"}, {"boost": "aten.*", "by": 2}).fired == ["<policy> rules[0].deny deny aten.*"]


def test_boosts_multiply():
    assert judge({"boost": "triton.*", "by": 2}, {"boost": "*.tiled", "by": 0.25}).boost == {
        "triton.split_kv": 2.0,
        "triton.tiled": 0.5,
    }


def test_a_lock_about_another_op_leaves_this_region_alone():
    known = [*KERNELS, "table.stored"]
    found = judge({"lock": "aten.cudnn"}, kernels=["table.stored"], known=known)
    assert found == Judgement()
    asked = judge({"lock": "table.stored", "when": {"op": "attention"}}, known=known)
    with pytest.raises(PolicyError, match=r"table\.stored: is for another op"):
        asked.require(KERNELS, {})


# -- a lock that cannot be honoured ----------------------------------------------------------------------------------


def test_a_lock_that_can_be_honoured_passes():
    judge({"lock": "aten.*"}).require(["aten.sdpa"], {"aten.cudnn": "no cuDNN"})
    judge({"lock": "inductor"}).require([], {})
    judge().require([], {})


def test_a_lock_that_cannot_be_honoured_says_why_for_every_kernel_it_names():
    found = judge({"lock": "aten.*", "because": "we pin it"}, {"deny": "aten.sdpa", "because": "slow"})
    with pytest.raises(PolicyError) as error:
        found.require(["triton.tiled", "aten.sdpa"], {"aten.cudnn": "head size 320 is above 256"}, "layers.0.attn")
    assert str(error.value) == (
        "<policy> rules[0].lock lock aten.*: we pin it: cannot be honoured for layers.0.attn: "
        "aten.cudnn: head size 320 is above 256; aten.sdpa: <policy> rules[1].deny deny aten.sdpa: slow"
    )


def test_a_lock_on_a_kernel_that_does_not_exist_names_the_nearest():
    with pytest.raises(PolicyError, match=r"aten\.cudn: no kernel has this name; did you mean 'aten\.cudnn'\?"):
        judge({"lock": "aten.cudn"}).require(KERNELS, {})


def test_a_lock_on_inductor_that_is_denied_cannot_be_honoured():
    with pytest.raises(PolicyError, match="cannot be honoured"):
        judge({"lock": "inductor"}, {"deny": "inductor"}).require(["inductor"], {})


# -- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ({"head_size": 64}, True),
        ({"head_size": 128}, False),
        ({"head_size": [32, 64]}, True),
        ({"head_size": {"in": [32]}}, False),
        ({"head_size": {"not_in": [32]}}, True),
        ({"head_size": {"!=": 64}}, False),
        ({"head_size": {"<": 64}}, False),
        ({"head_size": {"<=": 64}}, True),
        ({"head_size": {">": 63, "<": 65}}, True),
        ({"head_size": {">": 63, "<": 64}}, False),
        ({"head_size": {">=": 64}}, True),
        ({"head_size": {">=": 65}}, False),
        ({"sequence_length": {">=": 8192}}, True),
        ({"sequence_length": {">": 8192}}, False),
        ({"module": {"match": "model.layers.*.self_attn"}}, True),
        ({"module": {"match": "model.layers.[0-2].self_attn"}}, False),
        ({"module": {"match": "Model.*"}}, False),
        ({"module": "model.layers.3.self_attn"}, True),
        ({"dtype": ["float16", "torch.bfloat16"]}, True),
        ({"dtype": "half"}, False),
        ({"op": "attention", "phase": "prefill", "device": "cuda", "mode": "default"}, True),
        ({"op": "attention", "phase": "decode"}, False),
        ({}, True),
    ],
)
def test_a_rule_holds_when_all_its_conditions_do(when: dict, holds: bool):
    assert bool(judge({"deny": "*", "when": when}).denied) == holds


@pytest.mark.parametrize("unknown", [None, object()])
def test_an_unknown_fact_fulfils_only_the_negations(unknown: object):
    for facts in ({"keys": unknown}, {}):
        for operator in ("==", "<", "<=", ">", ">=", "in", "match"):
            assert not Condition("keys", operator, (1,) if operator == "in" else 1).holds(facts)
        assert Condition("keys", "!=", 1).holds(facts) and Condition("keys", "not_in", (1,)).holds(facts)


def test_a_symbolic_size_is_unknown_and_gets_no_guard():
    guards = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        size = next(i for i in inputs if isinstance(i, torch.SymInt))
        before = len(size.node.shape_env.guards)
        for operator in ("==", "<", ">="):
            assert not bool(Condition("keys", operator, 5).holds({"keys": size}))
        guards.append(len(size.node.shape_env.guards) - before)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.ones(5))
    assert guards == [0]


def test_every_fact_has_a_place_in_the_form_of_a_file():
    from lz_compile.policy_file import RuleForm, When

    assert set(When.model_fields) == set(policy.FACTS)
    assert set(policy.ACTIONS) < set(RuleForm.model_fields)
    assert policy.INDUCTOR == plan.INDUCTOR


# -- laws ------------------------------------------------------------------------------------------------------------

words = st.sampled_from(["prefill", "decode"])
sizes = st.sampled_from([1, 64, 128, 8192])
numbers = st.one_of(
    sizes,
    st.lists(sizes, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), sizes, min_size=1, max_size=2),
    st.builds(lambda values: {"not_in": values}, st.lists(sizes, min_size=1, max_size=2)),
)
whens = st.fixed_dictionaries(
    {},
    optional={
        "phase": words,
        "head_size": numbers,
        "sequence_length": numbers,
        "module": st.sampled_from([{"match": "model.*"}, {"match": "*.5.*"}, {"!=": "lm_head"}]),
    },
)
globs = st.sampled_from(["*", "aten", "aten.*", "*.tiled", "triton.split_kv", "flash*", "inductor", "liger.*"])
targets = st.one_of(globs, st.lists(globs, min_size=1, max_size=2))
rules = st.one_of(
    st.builds(
        lambda action, target, when: {action: target, "when": when},
        st.sampled_from(["deny", "allow", "lock"]),
        targets,
        whens,
    ),
    st.builds(
        lambda target, by, when: {"boost": target, "by": by, "when": when},
        targets,
        st.sampled_from([0.5, 1.25, 2.0]),
        whens,
    ),
)
facts = st.fixed_dictionaries(
    {"op": st.just("attention"), "module": st.sampled_from(["model.layers.5.self_attn", "lm_head", None])},
    optional={"phase": words, "head_size": st.one_of(sizes, st.none()), "keys": st.one_of(sizes, st.none())},
)


@given(st.lists(rules, max_size=5), facts)
def test_deny_and_allow_win_over_boost_and_lock(rules: list[dict], facts: dict):
    found = judge(*rules, facts=facts)
    assert not set(found.denied) & set(found.boost)
    assert not set(found.denied) & set(found.locked or ())


@given(st.lists(rules, max_size=5), facts, st.randoms())
def test_only_locks_depend_on_the_order_of_rules(rules: list[dict], facts: dict, random: object):
    shuffled = list(rules)
    random.shuffle(shuffled)
    one, other = judge(*rules, facts=facts), judge(*shuffled, facts=facts)
    assert one.denied.keys() == other.denied.keys()
    assert one.boost == other.boost  # the factors are exact in binary
    locks = [rule for rule in rules if "lock" in rule]
    others = [rule for rule in rules if "lock" not in rule]
    assert judge(*others, *locks, facts=facts).locked == one.locked


@given(st.lists(rules, max_size=5), facts)
def test_a_judgement_is_what_the_definition_says(rules: list[dict], facts: dict):
    policy_ = Policy.load({"rules": rules})
    names = [*KERNELS, "inductor"]

    def named(rule: dict, action: str, kernel: str) -> bool:
        patterns = rule[action] if isinstance(rule[action], list) else [rule[action]]
        if kernel == "inductor":
            return "inductor" in patterns
        return any(fnmatchcase(kernel, p) or fnmatchcase(kernel.split(".")[0], p) for p in patterns)

    holding = [raw for raw, rule in zip(rules, policy_.rules) if all(c.holds(facts) for c in rule.when)]
    allows = [rule for rule in holding if "allow" in rule]
    denied = {n for n in names if any("deny" in rule and named(rule, "deny", n) for rule in holding)}
    denied |= {n for n in KERNELS if allows and not any(named(rule, "allow", n) for rule in allows)}
    lock = next((rule for rule in holding if "lock" in rule), None)
    found = policy_.judge(facts, KERNELS)
    assert set(found.denied) == denied
    assert found.locked == (
        None if lock is None else tuple(n for n in names if named(lock, "lock", n) and n not in denied)
    )
    for name in set(names) - denied:
        product = 1.0
        for rule in holding:
            product *= rule["by"] if "boost" in rule and named(rule, "boost", name) else 1.0
        assert found.boost.get(name, 1.0) == product


@given(st.lists(rules, max_size=4), facts)
def test_rules_that_decided_nothing_can_be_taken_away(rules: list[dict], facts: dict):
    loaded = Policy.load({"rules": rules})
    found = loaded.judge(facts, KERNELS)
    fired = Policy(tuple(rule for rule in loaded.rules if rule.text in found.fired))
    assert fired.judge(facts, KERNELS) == found


@given(st.sampled_from(["phase", "module", "keys", "head_size"]), st.one_of(st.none(), words, sizes), words, sizes)
def test_negations_are_the_opposite_whatever_is_known(fact: str, actual: object, word: str, size: int):
    for value in (word, size):
        known = {fact: actual}
        assert Condition(fact, "==", value).holds(known) != Condition(fact, "!=", value).holds(known)
        assert Condition(fact, "in", (value,)).holds(known) != Condition(fact, "not_in", (value,)).holds(known)
        assert Condition(fact, "in", (value,)).holds(known) == Condition(fact, "==", value).holds(known)


@given(st.lists(rules, max_size=4), st.text(min_size=1, max_size=8))
def test_yaml_and_dict_mean_the_same_and_remarks_do_not_change_the_digest(rules: list[dict], remark: str):
    plain = Policy.load({"rules": rules})
    remarked = Policy.load({"version": 1, "rules": [{"name": remark, **rule, "because": remark} for rule in rules]})
    text = Policy.load(json.dumps({"rules": rules}) + "\n")
    assert plain.digest == remarked.digest == text.digest


@pytest.mark.parametrize(
    "other",
    [
        [{"deny": "aten.*"}, {"boost": "triton.*", "by": 2}],
        [{"boost": "triton.*", "by": 2}, {"lock": "aten.*"}],
        [{"lock": "aten.*"}, {"boost": "triton.*", "by": 3}],
        [{"lock": "aten.*", "when": {"batch": 1}}, {"boost": "triton.*", "by": 2}],
        [{"lock": "aten.*", "when": {"batch": [1]}}, {"boost": "triton.*", "by": 2}],
        [],
    ],
)
def test_the_digest_follows_what_rules_mean(other: list[dict]):
    rules = [{"lock": "aten.*"}, {"boost": "triton.*", "by": 2}]
    assert Policy.load({"rules": rules}).digest != Policy.load({"rules": other}).digest


# -- errors ----------------------------------------------------------------------------------------------------------

DENY = "version: 1\nrules:\n  - deny: aten.*\n"
ERRORS = [
    ("verson: 1\nrules: []\n", 1, "unknown key 'verson'; did you mean 'version'?"),
    ("version: 1\nrule: []\n", 2, "unknown key 'rule'; did you mean 'rules'?"),
    ("\nversion: 2\nrules: []\n", 2, "there is no version 2 of the policy format; this release reads version 1"),
    ("version: '1'\nrules: []\n", 1, "there is no version '1' of the policy format; this release reads version 1"),
    ("version: yes\nrules: []\n", 1, "there is no version True of the policy format; this release reads version 1"),
    ("rules:\n  - name: a\n    denny: aten.*\n", 3, "unknown key 'denny'; did you mean 'deny'?"),
    (DENY + "    wen: {batch: 1}\n", 4, "unknown key 'wen'; did you mean 'when'?"),
    (
        DENY + "    when:\n      batch: 1\n      head_sise: 64\n",
        6,
        "unknown fact 'head_sise'; did you mean 'head_size'?",
    ),
    (DENY + "    when: {keys: {'=>': 1}}\n", 4, "unknown operator '=>'; did you mean '>='?"),
    (DENY + "    when: {keys: {not-in: [1]}}\n", 4, "unknown operator 'not-in'; did you mean 'not_in'?"),
    (DENY + "    when:\n      keys:\n        '>': 1\n        lt: 5\n", 7, "unknown operator 'lt'; did you mean '<'?"),
    (
        DENY + "    when: {phase: {'<': 3}}\n",
        4,
        "'<' does not compare phase, which is text; it takes ==, !=, in, not_in, match",
    ),
    (
        DENY + "    when: {keys: {match: '1*'}}\n",
        4,
        "'match' does not compare keys, which is a number; it takes ==, !=, <, <=, >, >=, in, not_in",
    ),
    (DENY + "    lock: aten.*\n", 4, "a rule has one action; this one has deny and lock"),
    (DENY + "  - because: so\n", 4, "a rule needs one of lock, allow, deny, boost"),
    (DENY + "  - boost: aten.*\n", 4, "boost needs 'by', the factor that the kernel's time is divided by"),
    (DENY + "    by: 2\n", 4, "'by' belongs to boost, not to deny"),
    (DENY + "  - boost: x\n    by: 0\n", 5, "by: input should be greater than or equal to 0.001, not 0"),
    (DENY + "  - boost: x\n    by: .inf\n", 5, "by: input should be less than or equal to 1000, not inf"),
    (DENY + "  - boost: x\n    by: fast\n", 5, "by takes a number, not 'fast'"),
    (DENY + "  - boost: x\n    by: yes\n", 5, "by takes a number, not True"),
    (DENY + "  - deny: 5\n", 4, "deny takes a glob or a list of globs, not 5"),
    (DENY + "  - deny:\n      - a.*\n      - {b: c}\n", 6, "deny takes a glob or a list of globs, not a mapping"),
    (DENY + "  - deny: []\n", 4, "deny takes an entry or more"),
    (DENY + "  - deny: a, b\n", 4, "deny: 'a, b' is no glob over kernel names; several go in a list"),
    (DENY + "  - flash_attn.*\n", 4, "a rule is a mapping, not 'flash_attn.*'"),
    ("rules: aten.*\n", 1, "rules takes a list, not 'aten.*'"),
    ("- deny: aten.*\n", 1, "a policy is a mapping with the key 'rules', not a list"),
    (DENY + "    name: 3\n", 4, "name takes text, not 3"),
    (DENY + "    when: decode\n", 4, "when takes a mapping, not 'decode'"),
    (DENY + "    when:\n", 4, "when takes a mapping, not nothing"),
    (DENY + "    when: {batch: four}\n", 4, "batch takes a whole number, not 'four'"),
    (DENY + "    when: {batch: true}\n", 4, "batch takes a whole number, not True"),
    (DENY + "    when: {batch: 1.5}\n", 4, "batch takes a whole number, not 1.5"),
    (DENY + "    when: {batch: {'<': '4'}}\n", 4, "batch '<' takes a whole number, not '4'"),
    (DENY + "    when: {batch: {in: 4}}\n", 4, "batch 'in' takes a list, not 4"),
    (DENY + "    when:\n      batch:\n        - 1\n        - two\n", 7, "batch 'in' takes a whole number, not 'two'"),
    (DENY + "    when: {batch: -1}\n", 4, "batch: input should be greater than or equal to 0, not -1"),
    (DENY + "    when: {op: }\n", 4, "op takes text, not nothing"),
    (DENY + "    when: {phase: decod}\n", 4, "phase: there is no 'decod'; did you mean 'decode'?"),
    (DENY + "    when: {device: cudda}\n", 4, "device: there is no 'cudda'; did you mean 'cuda'?"),
    (DENY + "    when: {dtype: bf16}\n", 4, "dtype: there is no dtype 'bf16'; did you mean 'bfloat16'?"),
    (
        DENY + "    when: {mode: reduce-overead}\n",
        4,
        "mode: there is no 'reduce-overead'; did you mean 'reduce-overhead'?",
    ),
    (
        DENY + "    when: {module: layers.*}\n",
        4,
        "module: 'layers.*' would be compared letter by letter; for a glob write {match: 'layers.*'}",
    ),
    (DENY + "    deny: cpu.*\n", 4, "duplicate key 'deny', first in line 3"),
    (DENY + "    when:\n      batch: 1\n      keys: 2\n      batch: 3\n", 7, "duplicate key 'batch', first in line 5"),
    (
        DENY + "  - deny: *.tiled\n",
        4,
        'a star without quotes begins a YAML alias; quote operators and globs: "!=", ">=", "*.tiled"',
    ),
    (
        DENY + "    when: {keys: {>=: 4}}\n",
        4,
        'found character \'>\' that cannot start any token; quote operators and globs: "!=", ">=", "*.tiled"',
    ),
    (
        DENY + "    when: {keys: {!=: 4}}\n",
        4,
        'a key is plain text; quote operators and globs: "!=", ">=", "*.tiled"',
    ),
    (DENY + "\t- deny: x\n", 4, "found character '\\t' that cannot start any token; indent with spaces"),
    (DENY + "    because: slow: very\n", 4, "mapping values are not allowed here"),
    (DENY + "    when: &small {batch: 1}\n", 4, "a policy takes no YAML anchors"),
    (DENY + "    when: {batch: !!int four}\n", 4, "'four' is no int"),
    ("rules:\n" + "[" * 100, 2, "nested too deeply"),
    ("rules:\n---\nrules:\n", 2, "expected a single document in the stream, but found another document"),
    (DENY + "  - deny: \x07\n", 4, "character #x0007 is not allowed in YAML"),
]


@pytest.mark.parametrize(("text", "line", "message"), ERRORS, ids=[f"{m[:40]}" for _, _, m in ERRORS])
def test_a_mistake_is_reported_with_its_line_and_the_nearest_word(tmp_path: Path, text: str, line: int, message: str):
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError) as error:
        Policy.load(file)
    assert f"{file}:{line}: {message}" in error.value.problems
    assert check(file) == error.value.problems
    lines = [int(problem.removeprefix(f"{file}:").partition(":")[0]) for problem in error.value.problems]
    assert lines == sorted(lines)


def test_a_tag_cannot_make_an_object(tmp_path: Path):
    target = tmp_path / "made"
    for text in (
        f"rules:\n  - deny: !!python/object/apply:os.mkdir ['{target}']\n",
        f"rules: !!python/object/apply:os.mkdir ['{target}']\n",
        f"!!python/object/apply:os.mkdir ['{target}']\n",
    ):
        with pytest.raises(PolicyError, match=r"YAML tag 'python/object/apply:os\.mkdir' is not allowed here"):
            Policy.load(text)
    assert not target.exists()


def test_check_lists_all_problems_in_the_order_of_lines(tmp_path: Path):
    file = tmp_path / "policy.yaml"
    file.write_text(
        "rules:\n"
        "  - denny: aten.*\n"
        "  - deny: aten.*\n"
        "    deny: cpu.*\n"
        "    lock: x\n"
        "    when: {phase: decod, keys: {'<': a}}\n"
        "  - boost: 3\n"
    )
    assert [problem.removeprefix(f"{file}:").split(":")[0] for problem in check(file)] == list("24566" + "77")


def test_check_warns_of_globs_and_ops_that_name_nothing(tmp_path: Path):
    file = tmp_path / "policy.yaml"
    file.write_text(
        'rules:\n  - deny: [aten.*, flash_atn.*, inductor, triton]\n  - lock: "*.tilled"\n    when: {op: atention}\n'
    )
    assert check(file) == []
    assert check(file, KERNELS, ["attention", "rope_table"]) == [
        f"{file}:2: warning: 'flash_atn.*' names no kernel; did you mean 'flash_attn.*'?",
        f"{file}:3: warning: '*.tilled' names no kernel; did you mean 'triton.tiled'?",
        f"{file}:3: warning: there is no op 'atention'; did you mean 'attention'?",
    ]


def test_a_dict_is_reported_by_place():
    with pytest.raises(PolicyError, match=r"^<policy> rules\[0\]\.when\.head_sise: unknown fact .* 'head_size'\?$"):
        Policy.load({"rules": [{"deny": "x", "when": {"head_sise": 3}}]})


def test_what_is_no_policy_is_refused(tmp_path: Path):
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"rules:\n- deny: x\n  because: caf\xe9\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for source, message in [
        (5, "a policy is a path, YAML text or a dict, not 5"),
        (tmp_path / "none.yaml", f"{tmp_path}/none.yaml: no such file"),
        (str(tmp_path), f"{tmp_path}: not a file"),
        (fifo, f"{fifo}: not a file"),
        ("a\0b", "a\0b: embedded null byte"),
        (big, f"{big}: 1048577 bytes; a policy has at most 1048576"),
        ("#" * (1 << 20) + "\n", "<policy>: 1048577 characters; a policy has at most 1048576"),
        (latin, f"{latin}:3: not UTF-8 text"),
    ]:
        with pytest.raises(PolicyError) as error:
            Policy.load(source)
        assert str(error.value) == message


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(PolicyError("a:1: b\na:2: c")))
    assert error.problems == ["a:1: b", "a:2: c"]


@given(st.one_of(st.text(max_size=60), st.sampled_from([e[0] for e in ERRORS if len(e[0]) < 500])), st.data())
def test_no_text_is_worse_than_a_policy_error(text: str, data: st.DataObject):
    cut = data.draw(st.integers(0, len(text)))
    text = (
        "rules:\n"
        + text[:cut]
        + data.draw(st.sampled_from(["", " ", "{", "[", "'", "*", "!", "- deny: x\n"]))
        + text[cut:]
    )
    try:
        Policy.load(text).judge(PREFILL, KERNELS)
    except PolicyError as error:
        assert error.problems


# -- files, and which policy applies ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LZ_COMPILE_POLICY", raising=False)
    monkeypatch.setattr(policy, "_warned", set())


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path):
    file = tmp_path / "rules.yaml"  # begins like YAML text, and is a path
    file.write_text("rules:\n  - deny: aten.*\n")
    os.utime(file, ns=(1, 1))
    first = Policy.load(file)
    assert Policy.load(str(file)) is first
    file.write_text("rules:\n  - deny: aten.a\n")
    os.utime(file, ns=(1, 1))
    assert Policy.load(file) is first  # same time, same size
    os.utime(file, ns=(2, 2))
    assert Policy.load(file).rules[0].globs == ("aten.a",)


def test_one_line_is_text_when_it_begins_like_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert Policy.load('rules: [{deny: "*"}]').rules[0].globs == ("*",)
    (tmp_path / "rules.yaml").write_text("rules: [{deny: aten}]")
    monkeypatch.chdir(tmp_path)
    assert Policy.load("rules.yaml").rules[0].text == "rules.yaml:1 deny aten"


def with_policy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(policy, "config", type("Config", (), {"policy": value, "strict": False}))


def test_a_context_comes_before_the_option_and_that_before_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert active() == Policy()
    monkeypatch.setenv("LZ_COMPILE_POLICY", "rules: [{deny: a}]")
    assert active().rules[0].globs == ("a",)
    with_policy(monkeypatch, "rules: [{deny: b}]")
    assert active().rules[0].globs == ("b",)
    with overrule({"rules": [{"deny": "c"}]}) as outer:
        assert active() is outer and len(outer.rules) == 1
        with overrule({"rules": [{"deny": "d"}]}) as inner:
            assert active() is inner
            with overrule(None):
                assert active() == Policy()
        assert active() is outer
        with pytest.raises(RuntimeError), overrule("rules: [{deny: e}]"):
            raise RuntimeError
        with pytest.raises(PolicyError), overrule("nowhere.yaml"):
            pass
        assert active() is outer
    assert active().rules[0].globs == ("b",)


def test_threads_do_not_see_each_others_policies():
    together = threading.Barrier(4, timeout=20)
    seen: dict[str, list] = {}

    def work(name: str) -> None:
        before = active().rules
        with overrule({"rules": [{"deny": name}]}):
            together.wait()
            seen[name] = [before, active().rules[0].globs]
            together.wait()

    with overrule({"rules": [{"deny": "main"}]}):
        threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert active().rules[0].globs == ("main",)
    assert seen == {f"t{i}": [(), (f"t{i}",)] for i in range(4)}


@pytest.mark.parametrize("broken", ["missing.yaml", "rules: [{denny: x}]", "rules: [\n"])
def test_a_broken_policy_of_the_environment_costs_one_warning(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("LZ_COMPILE_POLICY", broken)
    with caplog.at_level(logging.WARNING, logger="lz_compile"):
        assert active() == active() == Policy()
    assert len(caplog.records) == 1 and "LZ_COMPILE_POLICY" in caplog.text
    with config.patch(strict=True), pytest.raises(PolicyError):
        active()


def test_a_broken_policy_of_the_options_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with_policy(monkeypatch, "missing.yaml")
    with pytest.raises(PolicyError, match=r"^missing\.yaml: no such file$"):
        active()


def test_importing_policies_imports_neither_yaml_nor_pydantic():
    script = (
        "import sys, torch; before = set(sys.modules); import lz_compile.policy;"
        "lz_compile.policy.active();"
        "print(sorted({'yaml', 'pydantic', 'lz_compile.policy_file'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the README's examples -------------------------------------------------------------------------------------------


def test_the_examples_are_without_problems():
    for file in sorted(POLICIES.glob("*.yaml")):
        assert check(file, KERNELS, ["attention"]) == []


def test_example_rules():
    found = Policy.load(POLICIES / "rules.yaml").judge(PREFILL, KERNELS)
    text = (
        f"{POLICIES}/rules.yaml:4 deny flash_attn.* (keep FA3 out of the small heads): slower than cuDNN on our board"
    )
    assert found.denied == {"flash_attn.fa3": text}
    assert found.boost == {"triton.split_kv": 1.2, "triton.tiled": 1.2}
    assert found.locked == ("aten.cudnn",)
    assert [fired.split(": ")[0].split("rules.yaml:")[1] for fired in found.fired] == [
        "4 deny flash_attn.* (keep FA3 out of the small heads)",
        "7 boost triton by 1.2",
        "9 lock aten.cudnn",
    ]
    larger = Policy.load(POLICIES / "rules.yaml").judge(DECODE | {"head_size": 128}, KERNELS)
    assert not larger.denied and larger.locked is None


def test_example_rules_with_a_typo(tmp_path: Path):
    file = tmp_path / "policy.yaml"
    file.write_text((POLICIES / "rules.yaml").read_text().replace("queries", "querys"))
    assert check(file) == [f"{file}:10: unknown fact 'querys'; did you mean 'queries'?"]


def test_example_decode():
    loaded = Policy.load(POLICIES / "decode.yaml")
    found = loaded.judge(DECODE, KERNELS)
    assert set(KERNELS) - set(found.denied) == {"aten.cudnn", "aten.sdpa", "triton.split_kv"} and found.locked is None
    for other in ({"batch": 3}, {"keys": 1024}, {"keys": None}, {"device_name": "NVIDIA A100"}, {"phase": "prefill"}):
        assert not loaded.judge(DECODE | other, KERNELS).denied
    assert loaded.judge(DECODE | {"module": "vision_tower.layers.0.attn"}, KERNELS).locked == ("inductor",)


def test_example_off():
    found = Policy.load(POLICIES / "off.yaml").judge(DECODE, KERNELS)
    assert set(found.denied) == set(KERNELS) and found.why_not("inductor") is None
