"""Damaged adapters: every command ends in a result or in one error, and tells what it can tell."""

from pathlib import Path

import pytest

from tests.faults import mutate_adapter
from tests.faults.mutate_adapter import Outcome

pytestmark = pytest.mark.slow

SEED = 20
CASES = 120


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[mutate_adapter.Case, Outcome]]:
    folder = tmp_path_factory.mktemp("mutations")
    mutate_adapter.prepare(folder)
    found = []
    for case in mutate_adapter.cases(SEED):
        if case.number == CASES:
            return found
        found.append((case, mutate_adapter.try_case(case, folder)))
    return found


@pytest.mark.parametrize("verdict", ["traceback", "hang", "leftovers"])
def test_no_damage_ends_in(verdict: str, outcomes: list[tuple[mutate_adapter.Case, Outcome]]):
    assert [(case, outcome) for case, outcome in outcomes if outcome.verdict == verdict] == []


def test_every_change_of_a_verified_adapter_is_refused_or_told(
    outcomes: list[tuple[mutate_adapter.Case, Outcome]],
):
    sealed = [(case, outcome) for case, outcome in outcomes if case.with_checksums]
    # "unchanged" means here that the damage left every file as it was.
    assert sum(outcome.verdict in ("refused", "told") for _, outcome in sealed) > CASES / 8
    assert [each for each in sealed if each[1].verdict not in ("refused", "told", "unchanged")] == []


def test_another_result_without_a_word_is_of_other_values_of_weights_only(
    outcomes: list[tuple[mutate_adapter.Case, Outcome]],
):
    """Without checksums, nothing tells weights of a right shape, or files of another adapter, from the original."""
    silent = [(case, outcome) for case, outcome in outcomes if outcome.verdict == "silent"]
    assert [each for each in silent if each[0].kind != "tensors" and "of another" not in each[1].damage] == []


def test_cases_are_those_of_their_seed(outcomes: list[tuple[mutate_adapter.Case, Outcome]], tmp_path: Path):
    again = mutate_adapter.cases(SEED)
    assert [case for case, _ in outcomes] == [next(again) for _ in range(CASES)]
    assert {outcome.verdict for _, outcome in outcomes} >= {"refused", "unchanged", "told"}
