#!/usr/bin/env bash
# transformers 5.17.0: model.set_attn_implementation(name) is how an attention function of one's own, registered
# with AttentionInterface, gets into a loaded model.  One would guess that after it every attention layer calls
# that function, or that the call is refused.  T5ForConditionalGeneration keeps a copy of its configuration in
# each of its stacks, and the method passes over a part whose configuration has the class of the model's own: the
# model's configuration names the new function, no layer calls it, and nothing warns.  What one measures then is
# torch's sdpa under another name.  LlamaForCausalLM and BartForConditionalGeneration, whose parts share one
# configuration, call it in every layer; so does T5 by transformers 5.23.0.  So: set it on each PreTrainedModel
# among model.modules(), which is right for both.
#
# Fails if T5's layers call the function after set_attn_implementation alone, or do not after it is set on each
# part.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 transformers==5.17.0
export TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers as tf
from transformers.integrations.sdpa_attention import sdpa_attention_forward

calls = []


def counted(*args, **options):
    calls.append(1)
    return sdpa_attention_forward(*args, **options)


tf.AttentionInterface.register("counted", counted)
tf.AttentionMaskInterface.register("counted", tf.masking_utils.sdpa_mask)


def count(model):
    """Return the model's own word for its attention, and how often the layers call `counted`."""
    calls.clear()
    ids = torch.tensor([[5, 6, 7]])
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, **decoder)
    return model.config._attn_implementation, len(calls)


sizes = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
heads = {"num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
models = [
    (tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_attention_heads=4)), 2),
    (tf.BartForConditionalGeneration(tf.BartConfig(**sizes, **heads, pad_token_id=0)), 6),
    (tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **heads, d_kv=8, pad_token_id=0)), 6),
]
for model, layers in models:
    model.eval().set_attn_implementation("counted")
    name, found = count(model)
    print(f"{type(model).__name__}: its config says {name}; {found} of {layers} layers call it")
    assert name == "counted"
    assert found == (0 if model.config.model_type == "t5" else layers), "it is otherwise now"
t5, layers = models[-1]
for part in t5.modules():
    if isinstance(part, tf.PreTrainedModel):
        part.set_attn_implementation("counted")
name, found = count(t5)
print(f"T5 after each part was set: {found} of {layers} layers call it")
assert found == layers
PY
