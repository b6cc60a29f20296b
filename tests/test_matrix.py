"""Every pair of choices runs or is refused with its reason; docs/matrix.md says which."""

import itertools

import matrix
import pytest

import tiny

CASES = matrix.cases()
QUICK = [case for case in CASES if case[2] <= 2]


def test_the_cases_cover_every_pair_that_is_not_refused():
    covered = set().union(*map(matrix.pairs, CASES))
    refused = matrix.refused_pairs()
    names = list(matrix.FACTORS)
    for case in itertools.product(*matrix.FACTORS.values()):
        for one, two in matrix.pairs(case) - covered:
            assert (f"{names[one[0]]} {one[1]}", f"{names[two[0]]} {two[1]}") in refused
    assert all(";" in reason for reason in refused.values()), "each says what to use instead"
    assert refused["stage 0", "precision fp16"].startswith("fp16 at ZeRO stage 0")


def test_the_page_is_what_the_program_says():
    outcomes = dict.fromkeys(CASES, "works")
    assert matrix.PAGE.read_text() == matrix.page(outcomes), "python tests/matrix.py writes it"


@pytest.mark.parametrize("case", QUICK, ids=matrix.words)
def test_a_combination_runs(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK], ids=matrix.words)
def test_another_combination_runs(case):
    check(case)


def check(case):
    if "fp16" in case and not tiny.FP16:
        pytest.skip("no fp16 on this processor")
    matrix.check(case)
