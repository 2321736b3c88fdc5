"""Tiny models that write, and the vocabulary that they write in."""
import tokenizer
from model import Llama, ModelConfig

VOCABULARY = tokenizer.load("quickstart-2048")
EOS = VOCABULARY.eos_id


def llama(**changes):
    """A tiny model with weights so large that its likeliest tokens change from place to place."""
    model = Llama(ModelConfig(**dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=32) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model
