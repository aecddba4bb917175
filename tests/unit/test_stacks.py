"""The lists of what needs one of the stacks: no stale names, and a test is skipped on the other stack only."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import stacks

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", stacks.NEEDS_FIRST_STACK | stacks.NEEDS_SECOND_STACK)
def test_every_name_means_a_test(name):
    file, _, pattern = name.partition("::")
    source = (TESTS / file).read_text()
    start = re.split(r"\*.*\]", pattern)[0].rstrip("*")  # parameters are not in the source as a test's id has them
    assert not pattern or any(
        fnmatchcase(test, f"{start}*") for test in re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    )


def test_what_is_named_is_skipped_on_another_stack_only(monkeypatch):
    listed = "tests/integration/test_server.py::test_a_budget_leaves_room_for_pictures"
    free = "tests/integration/test_server.py::test_bad_requests_are_answered_400_and_the_server_goes_on[a local file]"
    monkeypatch.setattr(stacks, "first_stack", lambda: False)
    other = "tests/unit/test_swift.py::test_any"
    assert stacks.reason_to_skip(listed) == f"first stack only: {stacks.THINKING_BUDGETS}"
    found = stacks.reason_to_skip("tests/integration/test_training.py::test_any[x]")
    assert found == f"first stack only: {stacks.LLAMAFACTORY}"
    assert stacks.reason_to_skip(free) is stacks.reason_to_skip(other) is None
    monkeypatch.setattr(stacks, "first_stack", lambda: True)
    assert stacks.reason_to_skip(listed) is stacks.reason_to_skip(free) is None
    assert stacks.reason_to_skip(other) == f"second stack only: {stacks.MS_SWIFT}"
