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
    yield
    left = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ]
    assert not left and not torch.distributed.is_initialized(), f"{left}: use ranks.run"
