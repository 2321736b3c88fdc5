"""What is drawn of a model's inside is what goes on there, and in transformers' Llama too."""
import pytest
import torch
import transformers

from backend import expand_heads
from tests.web.models import CONTEXT, llama
from web import inside


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_lens_are_the_models(rng, kv_heads):
    """The patterns weigh the values to what each attention gives, and are those of transformers; the last lens is the
    model's output, and the others are its head on transformers' hidden states."""
    model = llama(num_key_value_heads=kv_heads)
    ids, c = [rng.randrange(2048) for _ in range(rng.randint(1, 20))], model.config
    patterns, lens = inside.look_inside(model, ids)
    T = len(ids)
    x = model.model.embed_tokens(torch.tensor([ids]))
    for pattern, block in zip(patterns, model.model.layers):
        h, attention = block.input_layernorm(x), block.self_attn
        v = expand_heads(attention.v_proj(h).view(1, T, kv_heads, c.head_dim).transpose(1, 2), 4)
        mixed = attention.o_proj((pattern @ v).transpose(1, 2).reshape(1, T, -1))
        cos, sin = model.model.cos[:T], model.model.sin[:T]
        torch.testing.assert_close(mixed, attention(h, cos, sin), atol=1e-5, rtol=1e-4)
        x = block(x, cos, sin)
    torch.testing.assert_close(lens[-1], model(torch.tensor([ids]))[0][0])
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=2050, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT, rms_norm_eps=c.rms_norm_eps, bos_token_id=None,
        eos_token_id=None, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    theirs.load_state_dict(model.state_dict())
    output = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(patterns, torch.cat(output.attentions), atol=1e-5, rtol=1e-4)
    for ours, stream in zip(lens[:-1], output.hidden_states):
        torch.testing.assert_close(ours, theirs.lm_head(theirs.model.norm(stream))[0], atol=1e-3, rtol=1e-3)
