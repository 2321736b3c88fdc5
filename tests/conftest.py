"""What the tests share: inputs drawn afresh on every run, with a seed to repeat them by."""
import os
import random

import pytest
import torch

from tests.commands import run

torch.set_num_threads(1)  # the models here are too small for more, and the cores may be busy


@pytest.fixture
def rng():
    """A random.Random, torch seeded with it. A failing test shows the seed; TEST_SEED=... draws it again."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")  # pytest shows it where the test fails
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def quickstart_data(tmp_path_factory):
    """The embedded data, prepared once by the real command; tests only read it."""
    directory = tmp_path_factory.mktemp("prepared")
    code, out, err = run("prepare.py", "--data_dir", "quickstart", cwd=directory)
    assert code == 0, (out, err)
    return directory / "quickstart"
