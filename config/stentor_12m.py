"""Stentor-12M, the first generation: 200 million tokens with Mistral's vocabulary, on Kaggle's T4s.

Shape, data and tokens are from the family table in Stentor3-20M's card and the comparison in Stentor2-12M-Preview's.
Neither gives the hyperparameters, so we take the Preview's.
"""

from config import Config, Source
from model import ModelConfig

config = Config(
    name="stentor_12m",
    data_dir="data/stentor1",  # Stentor-30M's too
    # Mistral's BPE of 32,768, from a repository that holds nothing else and asks for no agreement.
    tokenizer="Xenova/mistral-tokenizer-v3",
    # The cards name the two sources but no shares, so we take half and half. Cosmopedia v2 is in the SmolLM corpus, not
    # in the repository HuggingFaceTB/cosmopedia, whose "v2" is something else. Held out: 2,000 in all, as in Stentor2.
    sources={
        "web": Source("HuggingFaceFW/fineweb-edu", subset="sample-10BT", ratio=0.5, held_out=1000),
        "textbooks": Source("HuggingFaceTB/smollm-corpus", subset="cosmopedia-v2", ratio=0.5, held_out=1000),
    },
    # 12,047,040 parameters, 52.2% of them in the embedding.
    model=ModelConfig(
        vocab_size=32_768,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=12,  # the family table says 9, but those make 10.6M, with 59.3% in the embedding, not 52.2%
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rope_theta=10_000.0,  # no card says; LlamaConfig's default
        tie_word_embeddings=True,
        scale_residual_init=False,  # as in Stentor2
        fp32_blocks=(0, -1),
    ),
    block_size=512,
    tokens_per_step=16_384,
    micro_batch_size=32,
    max_steps=12_208,  # x 16,384 = 200 million tokens
    learning_rate=8e-4,
    schedule="cosine",
    warmup_fraction=0.05,
    weight_decay=0.01,
    betas=(0.9, 0.95),
    eps=1e-8,
    max_grad_norm=1.0,
    seed=42,
    eval_interval=400,
    # The cards call this Stentor2's recipe. All they say about its predecessors is that T4s trained them, so we assume
    # that they used it too.
    int8_linears=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
