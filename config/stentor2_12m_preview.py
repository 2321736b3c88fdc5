"""Stentor2-12M-Preview: 240,001,024 tokens on one of Kaggle's T4s.

The second half of its card survives. The rest is from the family table in Stentor3-20M's card. Where both are silent,
comments say what we chose.
"""

from config import Config, Source
from model import ModelConfig

config = Config(
    name="stentor2_12m_preview",
    data_dir="data/stentor2_preview",
    tokenizer="english-8000-strict-nocapcode-v1",
    # The card names FineWeb-Edu, but no part of it. The authors' sample of 10 billion tokens is far more than enough.
    # Held out: the first 2,000 documents of the stream (card, Validation Split).
    sources={"web": Source("HuggingFaceFW/fineweb-edu", subset="sample-10BT", held_out=2000)},
    # 12,294,400 parameters, 16.8% of them in the embedding.
    model=ModelConfig(
        vocab_size=8064,  # 8,000 ids and one that ends documents, padded to a multiple of 64
        hidden_size=256,
        intermediate_size=768,  # the family table says 512, which would make 9.9M, not its own 12.3M
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,  # the table has no GQA; Stentor3's card recalls that it was unstable at this size
        max_position_embeddings=1024,
        rope_theta=10_000.0,  # no card says; LlamaConfig's default
        tie_word_embeddings=True,
        scale_residual_init=False,  # card, Weight Initialization: 0.02 for every Linear
        fp32_blocks=(0, -1),
    ),
    block_size=1024,
    tokens_per_step=16_384,
    micro_batch_size=16,
    max_steps=14_649,  # x 16,384 = 240,009,216 tokens; the card counts 240,001,024, half a step less
    # The part of the card with the rates is lost. This is Stentor3's peak, the only rate of the family that we have.
    # With 16,384 tokens a step it is on the safe side (our quickstart takes 6e-3 with 4,096).
    learning_rate=8e-4,
    schedule="cosine",  # card, Training Dynamics
    warmup_fraction=0.05,  # from here on as in Stentor3
    weight_decay=0.01,
    betas=(0.9, 0.95),
    eps=1e-8,
    max_grad_norm=1.0,
    seed=42,
    eval_interval=375,
    # "INT8 QAT + FP32 critical layer + FP32 norm" (card, Related Work). The lost part of the card says which linears;
    # we take all seven of a block.
    int8_linears=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
