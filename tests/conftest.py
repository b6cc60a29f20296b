"""What holds for every test."""

import os

import pytest
import torch

from ranks import kill_the_rest


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test():
    yield
    kill_the_rest()


@pytest.fixture(autouse=True)
def the_tests_own_process_never_becomes_a_rank():
    """What it starts later would take itself for one of that launch, on a port that is in use."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    left = {name: value for name in names if (value := os.environ.pop(name, None)) != before[name]}
    os.environ.update({name: value for name, value in before.items() if value is not None})
    assert not left and not torch.distributed.is_initialized(), f"{left} is left behind: use ranks.run"
