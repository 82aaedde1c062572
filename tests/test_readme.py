"""What the README shows is true: its policies load and do what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lz_compile
from lz_compile.policy import Policy, check
from road import compile_road

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
POLICIES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def run(policy: str) -> Any:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.randn(1, 2, 8, 16)
    with lz_compile.overrule(policy), torch.no_grad():
        compiled, road = compile_road(attend)
        torch.testing.assert_close(compiled(q), attend(q))
    return road.regions[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_of_the_readme_loads_and_a_compile_takes_it(policy: str) -> None:
    assert Policy.load(policy).rules
    run(policy)


def test_the_policies_are_those_that_the_policy_tests_execute() -> None:
    kept = {path.read_text().strip() for path in (ROOT / "tests" / "policies").glob("*.yaml")}
    assert len(POLICIES) >= 3 and {policy.strip() for policy in POLICIES} <= kept


def test_denying_everything_is_plain_inductor() -> None:
    (everything,) = (policy for policy in POLICIES if 'deny: "*"' in policy)
    region = run(everything)
    assert region.kernel == "inductor" and region.rules and "deny" in region.rules[0]


def test_the_error_that_the_readme_shows_is_the_one_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICIES[0].replace("queries", "querys"))
    (problem,) = check(path)
    (shown,) = re.findall(r"^policy\.yaml:\d+: .*$", TEXT, re.MULTILINE)
    assert problem.endswith(shown)


def test_every_option_of_the_readme_exists() -> None:
    settings = lz_compile.config.get_config_copy()
    for options in re.findall(r'options=\{"(\w+)"', TEXT):
        assert options in settings, options
