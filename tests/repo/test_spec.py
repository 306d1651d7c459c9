"""SPEC.md and the tests are tied both ways: every clause has a test, every name of a clause exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from agentbus import registry

ROOT = Path(__file__).parents[2]
CLAUSE = re.compile(r"[A-Z]+-\d+")

# Clauses that no test here can prove, each with its reason.
WAIVED: dict[str, str] = {}


def clauses() -> set[str]:
    text = ROOT.joinpath("SPEC.md").read_text(encoding="utf-8")
    defined = re.findall(r"^- \*\*\[([A-Z]+-\d+)\]\*\*", text, re.MULTILINE)
    assert len(defined) == len(set(defined)), "a clause is defined twice"
    return set(defined)


def proved() -> dict[str, str]:
    """The clauses that the marks name, and where."""
    found: dict[str, str] = {}
    for path in sorted(ROOT.joinpath("tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.spec":
                for argument in node.args:
                    found[ast.literal_eval(argument)] = path.name
    return found


def test_every_clause_has_a_test_or_a_reason() -> None:
    assert clauses() - set(proved()) == set(WAIVED)
    assert all(WAIVED.values())


def test_every_clause_that_a_test_names_exists() -> None:
    assert {name: where for name, where in proved().items() if name not in clauses()} == {}


def test_every_clause_that_the_code_names_exists_and_none_is_forgotten() -> None:
    named: set[str] = set()
    for path in ROOT.joinpath("agentbus").rglob("*.py"):
        named |= set(re.findall(r"\[([A-Z]+-\d+)\]", path.read_text(encoding="utf-8")))
    assert named - clauses() == set()


def test_every_variable_is_in_spec_and_readme_and_the_other_way_round() -> None:
    for name in ("SPEC.md", "README.md"):
        text = ROOT.joinpath(name).read_text(encoding="utf-8")
        assert set(re.findall(r"AGENTBUS_[A-Z_]+", text)) == set(registry.variables()), name


def test_every_test_that_the_fault_table_names_exists() -> None:
    faults = ROOT.joinpath("SPEC.md").read_text(encoding="utf-8").split("## 11. Faults")[1]
    named = set(re.findall(r"`(test_\w+)`", faults))
    there = set()
    for path in ROOT.joinpath("tests").rglob("test_*.py"):
        there |= set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named - there == set()
