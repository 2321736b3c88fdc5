"""Portimbria-150M: Mistral's vocabulary on a TPU v5e-8, 6 billion tokens of web, code and math.

Shape and tokens are from the family table in Stentor3-20M's card. What the table does not give is taken from
Stentor3-20M, since the context, the hardware and the curriculum are the same.
"""

from dataclasses import replace

from config import Source
from config.stentor3_20m import config as stentor3_20m
from model import ModelConfig

config = replace(
    stentor3_20m,
    name="portimbria_150m",
    data_dir="data/portimbria",
    tokenizer="Xenova/mistral-tokenizer-v3",  # Mistral's BPE of 32,768
    # Its page on the hub lists FineWeb-HQ, FineMath and, for code, StarCoderData, whose terms you must accept there
    # once (then `hf auth login`). It gives no shares, so we take Stentor3's.
    sources=stentor3_20m.sources | {
        "code": Source(
            "bigcode/starcoderdata",
            data_files=("python/*.parquet",),
            column="content",
            ratio=0.15,
            anneal_ratio=0.30,
            held_out=1000,
            preserve_linebreaks=True,
        ),
    },
    # 151,026,432 parameters, 16.7% of them in the embedding.
    model=ModelConfig(
        vocab_size=32_768,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=20,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=50_000.0,
        tie_word_embeddings=True,
        fp32_blocks=(0, -1),
    ),
    micro_batch_size=4,
    max_steps=22_889,  # x 262,144 = 6 billion tokens
    learning_rate=6e-4,  # no card says; GPT-3's for a model of 125M (Brown et al. 2020, table 2.1)
)
