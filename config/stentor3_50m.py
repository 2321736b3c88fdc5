"""Stentor3-50M: Stentor3-20M's recipe and data ("same training setup", says the 20M card) with a larger model.

Shape and tokens are from the family table in Stentor3-20M's card. We do not have the larger model's own card.
"""

from dataclasses import replace

from config.stentor3_20m import config as stentor3_20m
from model import ModelConfig

config = replace(
    stentor3_20m,
    name="stentor3_50m",
    # 49,430,016 parameters, 8.5% of them in the two embeddings.
    model=ModelConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=15,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=50_000.0,  # as in the 20M; the table has no row for it
        tie_word_embeddings=False,
        fp32_blocks=(0, -1),
    ),
    max_steps=31_662,  # x 262,144 = 8.3 billion tokens, the table's figure; warmup and cosine adapt to it
)
