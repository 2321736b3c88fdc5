"""Stentor3-20M: the published run, 8.5 billion tokens on a TPU v5e-8. Every value comes from its model card.

If the card is silent or contradicts itself, a comment at the value says what we chose and why.
"""

from config import Config, Source
from model import ModelConfig

config = Config(
    name="stentor3_20m",
    data_dir="data/stentor3",  # Stentor3-50M's too: one preparation serves both
    tokenizer="english-4096-strict-nocapcode-v1",
    # Ratios: card, Data Pipeline. About the anneal it says only that code and math are "upweighted"; we double them.
    # Held out: 5,000 documents of the web (card, max_eval_samples), and of the others in proportion to their ratio.
    sources={
        "web": Source(
            "epfml/FineWeb-HQ",
            data_files=("data/CC-MAIN-2024-51/*",),  # the crawls are folders, not configurations
            ratio=0.75,
            anneal_ratio=0.50,
            held_out=5000,
        ),
        "code": Source(
            "Cyrile/dataset-the-stack-v2-dedup-sub",
            subset="Python",
            column="content",
            ratio=0.15,
            anneal_ratio=0.30,
            held_out=1000,
            preserve_linebreaks=True,
        ),
        "math": Source(
            "HuggingFaceTB/finemath",
            subset="finemath-4plus",
            ratio=0.10,
            anneal_ratio=0.20,
            held_out=667,
        ),
    },
    anneal_fraction=0.15,
    # 20,324,160 parameters, 12.9% of them in the two embeddings.
    model=ModelConfig(
        vocab_size=4096,
        hidden_size=320,
        intermediate_size=1280,
        num_hidden_layers=12,
        # The card's specification, and its formula for the cache, say 10 and 2 of width 32. Its family table says 5 and
        # 1 of width 64, and its explanation of GQA 8 and 2. The first two have the same number of parameters.
        num_attention_heads=10,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=50_000.0,
        tie_word_embeddings=False,
        fp32_blocks=(0, -1),
    ),
    block_size=4096,
    tokens_per_step=262_144,  # 8 chips x 8 sequences x 4,096 tokens
    micro_batch_size=8,
    max_steps=32_425,  # x 262,144 = 8,500,019,200 tokens
    learning_rate=8e-4,
    schedule="cosine",  # the card's "stable_steps" belong to a schedule that the run did not use
    warmup_fraction=0.05,  # 1,621 steps
    weight_decay=0.01,
    betas=(0.9, 0.95),
    eps=1e-8,
    max_grad_norm=1.0,
    seed=42,
    eval_interval=1000,
)
