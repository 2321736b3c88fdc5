"""The embedded default: in under five minutes on two cores, a tiny Llama learns from what every Python carries.

Of the sizes and rates that NOTES.md lists, these reached the lowest held-out bits per byte in that time. At this scale
the clock decides: a smaller model sees more text, and that wins until the model is too small.
"""

from config import Config, Source
from model import ModelConfig

config = Config(
    name="quickstart",
    data_dir="data/quickstart",
    tokenizer="quickstart-2048",
    # Like Stentor3's mixture, with an anneal that shifts toward code and math. It has more math than Stentor3's 10%,
    # because a model this small must see each sum some hundred times.
    sources={
        "web": Source("library:docs", ratio=0.38, anneal_ratio=0.25),
        "code": Source("library:code", ratio=0.37, anneal_ratio=0.40, preserve_linebreaks=True),
        "math": Source("library:arithmetic", ratio=0.25, anneal_ratio=0.35, preserve_linebreaks=True),  # one sum a line
    },
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        fp32_blocks=(),  # two of three blocks in FP32 would undo what bf16 gains
    ),
    block_size=256,
    tokens_per_step=4096,
    micro_batch_size=16,
    max_steps=2500,
    train_minutes=4.5,
    max_minutes=5.0,  # whatever the estimate says
    seed=7,
    learning_rate=6e-3,
    schedule="wsd",
    decay_fraction=0.3,
    weight_decay=0.3,
    eval_interval=200,
)
