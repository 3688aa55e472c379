"""Whatever a user does in whatever order, every answer is the reference's, or a refusal that names its cause."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.trust.changing import UserActions

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
def test_random_actions() -> None:
    run_state_machine_as_test(
        UserActions, settings=settings(**QUIET, derandomize=True, max_examples=8, stateful_step_count=20)
    )


@pytest.mark.heavy
@pytest.mark.timeout(0)
def test_thousands_of_random_actions() -> None:
    """TRUST_SEED and TRUST_EXAMPLES choose others, and how many sequences of 50 actions."""
    machine = seed(int(os.environ.get("TRUST_SEED", "0")))(UserActions)
    examples = int(os.environ.get("TRUST_EXAMPLES", "200"))
    run_state_machine_as_test(machine, settings=settings(**QUIET, max_examples=examples, stateful_step_count=50))
