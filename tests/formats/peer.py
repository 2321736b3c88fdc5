"""Somebody's model, of another kind than ours, in a folder as transformers writes it."""
import tokenizers
import transformers


def another_model(folder, texts):
    """A GPT-2 of another vocabulary, learnt from these texts, and of another context -> (model, encode, eos)."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>").save_pretrained(folder)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=library.get_vocab_size(), n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=0)).eval()
    model.save_pretrained(folder)
    return model, lambda text: library.encode(text).ids, library.token_to_id("<eos>")
