"""sizing.py: the figures of Stentor3-20M's card, as functions and as a command."""
import torch

import sizing
from config import Config, load
from model import KVCache, Llama, ModelConfig
from tests.commands import ROOT, refused, run


def preset(name) -> Config:
    return load([str(ROOT / "config" / f"{name}.py")])


def test_the_cards_parameter_table():
    """Every row of the table in Stentor3-20M's card."""
    with torch.device("meta"):
        count = sizing.count_parameters(Llama(preset("stentor3_20m").model))
    assert count == {"embedding": 1_310_720, "head": 1_310_720, "attention": 2_949_120, "mlp": 14_745_600,
                     "layer norms": 7_680, "final norm": 320}


def test_the_cards_memory_table():
    """Weights as the card has them; the KV cache by its formula, of which its own table shows half (12 and 6 MB)."""
    config = preset("stentor3_20m").model
    table = {name: tuple(round(size / 1e6, 1) for size in sizes)
             for name, sizes in sizing.memory_table(config, 20_324_160).items()}
    assert table == {"FP32": (81.3, 25.2), "FP16 / BF16": (40.6, 12.6), "INT8": (20.3, 12.6), "INT4": (10.2, 12.6)}
    assert sizing.kv_cache_bytes(config, 4096, 4) == 2 * 2 * 32 * 12 * 4096 * 4


def test_the_cache_is_as_large_as_the_formula_says(rng):
    """A filled KVCache holds as many bytes as kv_cache_bytes, for a random shape."""
    heads = rng.choice([1, 2, 4])
    config = ModelConfig(vocab_size=50, hidden_size=32, num_attention_heads=4, num_key_value_heads=heads,
                         num_hidden_layers=rng.randint(1, 4), max_position_embeddings=rng.randint(8, 40))
    cache = KVCache(config.max_position_embeddings)
    with torch.no_grad():
        Llama(config)(torch.zeros(1, config.max_position_embeddings, dtype=torch.long), cache=cache)
    held = sum(tensor.nbytes for tensors in (cache.keys, cache.values) for tensor in tensors.values())
    assert held == sizing.kv_cache_bytes(config, config.max_position_embeddings, 4)


def test_the_table_as_a_command(tmp_path, capsys):
    """`python sizing.py config/NAME.py` prints the card's figures, and those of a shape from the command line."""
    code, out, err = run("sizing.py", ROOT / "config/stentor3_20m.py", cwd=tmp_path)
    assert code == 0, err
    for figure in ("20,324,160", "1,310,720", "17,702,400", "2,949,120", "14,745,600", "7,680", "12.9%", "87.1%",
                   "14.5%", "81.3 MB", "40.6 MB", "20.3 MB", "10.2 MB", "25.2 MB", "12.6 MB", "8,500,019,200"):
        assert figure in out, figure
    sizing.main([str(ROOT / "config/stentor3_20m.py"), "--model.tie_word_embeddings=True"])
    out = capsys.readouterr().out
    assert "19,013,440" in out and "untied" not in out
    refused(run("sizing.py", "config/stentor4.py", cwd=tmp_path), "stentor4.py", "stentor3_20m.py")
