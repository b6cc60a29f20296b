"""What holds for every test."""

import pytest

from ranks import kill_the_rest


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test():
    yield
    kill_the_rest()
