"""Whatever a user does in whatever order, every answer is the reference's, or a refusal that names its cause."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.trust.changing import UserActions

PARTS = 8  # of the long run, for as many processes
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
def test_random_actions() -> None:
    run_state_machine_as_test(
        UserActions, settings=settings(**QUIET, derandomize=True, max_examples=8, stateful_step_count=20)
    )


@pytest.mark.heavy
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(PARTS))
def test_thousands_of_random_actions(part: int, record_property: Callable[[str, object], None]) -> None:
    """TRUST_SEED and TRUST_EXAMPLES choose others, and how many sequences of 50 actions."""
    tried, refused = UserActions.tried.copy(), UserActions.refused.copy()
    machine = seed(PARTS * int(os.environ.get("TRUST_SEED", "0")) + part)(UserActions)
    examples = -(-int(os.environ.get("TRUST_EXAMPLES", "100")) // PARTS)
    run_state_machine_as_test(machine, settings=settings(**QUIET, max_examples=examples, stateful_step_count=50))
    for name, count in (UserActions.tried - tried).items():
        record_property(name, count)
    record_property("refused by name", (UserActions.refused - refused).total())
