"""Stentor-30M: Stentor-12M's recipe and data with a larger model.

Shape and tokens are from the family table in Stentor3-20M's card.
"""

from dataclasses import replace

from config.stentor_12m import config as stentor_12m
from model import ModelConfig

config = replace(
    stentor_12m,
    name="stentor_30m",
    # 30,419,712 parameters, 27.6% of them in the embedding.
    model=ModelConfig(
        vocab_size=32_768,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=21,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        scale_residual_init=False,
        fp32_blocks=(0, -1),
    ),
    max_steps=36_622,  # x 16,384 = 600 million tokens
    eval_interval=1000,
)
