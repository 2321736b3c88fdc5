"""The model as a GGUF file, for llama.cpp and what is built on it: export.py --format gguf

Two things differ there. llama.cpp turns neighbouring pairs of a head's numbers by RoPE, where we (and transformers)
turn pairs that stand half a head apart: the rows of q_proj and k_proj are put in its order. And of its tokenizers none
is TokenMonster's, but one, "t5", is a Unigram, as portable.py makes them: of two ways that are equally good it even
takes the one that the `tokenizers` library takes, so a text has the same ids (NOTES.md has the other that was tried).
It works on characters, and so cannot write one of which the vocabulary has only the bytes: that becomes "?" (and so
does "??", where that is not a piece). What the model writes comes out whole.

A model that learnt with TokenMonster's own search writes delete marks too, of which llama.cpp knows nothing: remove
each 0x7F, and the space after it.
"""

import json
from pathlib import Path

import numpy as np
import torch

import portable
from config import BadInput
from model import Llama
from vocabulary import Tokenizer, TokenMonster

NORMAL, CONTROL, BYTE = 1, 3, 6  # llama.cpp's kinds of tokens
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter of ours."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)  # model.layers.N.self_attn.q_proj
    return f"blk.{layer}.{NAMES[module]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q_proj or k_proj (heads * D, C), such that rows j and j + D/2 of a head become neighbours."""
    return weight.view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)  # (heads, 2, D/2, C)


def is_text(piece: bytes) -> bool:
    """Whether a piece is UTF-8 by itself, and can be a string of C's."""
    try:
        return b"\0" not in piece and bool(piece.decode())
    except UnicodeDecodeError:
        return False


def unigram(tokens: Tokenizer) -> tuple[list[bytes], list[float]]:
    """Bytes and score of each id of the portable segmentation.

    Raises BadInput for a tokenizer.json that portable.py has not made.
    """
    if isinstance(tokens, TokenMonster):
        return portable.pieces(tokens, lossless=False)
    made = json.loads(tokens.data)
    if made["model"]["type"] != "Unigram" or "ByteLevel" not in json.dumps(made["pre_tokenizer"]):
        raise BadInput(f"the tokenizer of {tokens.name} is a {made['model']['type']}, which is not written to GGUF "
                       f"here; use --format hf, and llama.cpp's convert_hf_to_gguf.py on that")
    value = {character: byte for byte, character in enumerate(portable.CHARACTERS)}
    names, scores = zip(*made["model"]["vocab"])
    pieces = [b"" if token == tokens.eos_id else bytes(value[c] for c in name) for token, name in enumerate(names)]
    return pieces, list(scores)


def token_table(tokens: Tokenizer, rows: int) -> tuple[list[bytes], list[float], list[int], int]:
    """Text, score and kind of each of the model's rows, and the id that stands for what cannot be written."""
    pieces, scores = unigram(tokens)
    texts, kinds = [], []
    for token, piece in enumerate(pieces):
        if token == tokens.eos_id:
            text, kind = portable.END_OF_DOCUMENT.encode(), CONTROL
        elif is_text(piece):
            text, kind = piece.replace(b" ", "\u2581".encode()), NORMAL  # its sign for a space
        elif len(piece) == 1:
            text, kind = b"<0x%02X>" % piece[0], BYTE  # never found in a text, but written as that byte
        else:
            text, kind = b"<unused%d>" % token, CONTROL  # part of a character, and more
        texts.append(text), kinds.append(kind)
    for token in range(len(texts), rows):  # rows that no token has
        texts.append(b"<unused%d>" % token), scores.append(portable.DEAD), kinds.append(CONTROL)
    return texts, scores, kinds, texts.index(b"?") if b"?" in texts else tokens.eos_id


def write_gguf(folder: Path, model: Llama, name: str, tokens: Tokenizer, dtype: str) -> str:
    """Write NAME-DTYPE.gguf, and read it back; what was found, in words.

    Matrices are in `dtype` (q8_0 where its rows divide into blocks of 32, else float16), norms in FP32. Raises BadInput
    where the package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise BadInput("GGUF needs a package: pip install -r requirements-export.txt") from error
    c = model.config
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    texts, scores, kinds, unknown = token_table(tokens, c.vocab_size)
    path = folder / f"{name}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("t5")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokens.eos_id)
    writer.add_unk_token_id(unknown)
    writer.add_add_bos_token(True)  # a text follows the end of another, as in training
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)

    written = {}
    for name, p in model.named_parameters():
        weight = p.detach().float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, weight.size(0) // c.head_dim)
        as_ = kind if weight.dim() == 2 else "F32"
        if as_ == "Q8_0" and weight.size(1) % 32:
            as_ = "F16"
        quantized = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[as_])
        writer.add_tensor(gguf_name(name), quantized, raw_dtype=gguf.GGMLQuantizationType[as_])
        written[gguf_name(name)] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors}
    error, largest = 0.0, {"F32": 0.0, "F16": 2**-10, "BF16": 2**-8, "Q8_0": 1 / 127}[kind]  # of a tensor's largest
    for name, weight in written.items():
        difference = float(np.abs(read[name] - weight.numpy()).max())
        if not difference <= largest * float(weight.abs().max()):  # so written, NaN is refused too
            raise BadInput(f"{name} differs by {difference:.2g} in {kind}: too much for it; use --dtype float32")
        error = max(error, difference)
    return f"{len(read)} tensors, {len(texts):,} tokens; read back, no weight differs by more than {error:.1g}"
