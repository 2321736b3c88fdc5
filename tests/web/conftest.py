"""What several of these tests need."""
import pytest

from tests.web.models import EOS, llama, shelf_of


@pytest.fixture
def shelf(rng):
    """Two models of similar size, which seldom end a text."""
    models = [llama(), llama(hidden_size=24)]
    for model in models:
        model.lm_head.weight.data[EOS] = 0
    return shelf_of(*models)
