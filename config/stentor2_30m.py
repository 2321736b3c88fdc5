"""Stentor2-30M: Stentor2-12M's recipe and data with a larger model.

Shape and tokens are from the family table in Stentor3-20M's card.
"""

from dataclasses import replace

from config.stentor2_12m import config as stentor2_12m
from model import ModelConfig

config = replace(
    stentor2_12m,
    name="stentor2_30m",
    # 30,353,920 parameters, 13.6% of them in the embedding.
    model=ModelConfig(
        vocab_size=8064,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        scale_residual_init=False,
        fp32_blocks=(0, -1),
    ),
    max_steps=24_415,  # x 32,768 = 800 million tokens
    eval_interval=625,  # as many evaluations in a run as Stentor2-12M
)
