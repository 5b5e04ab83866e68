#!/usr/bin/env bash
# transformers 5.23.0: decoding by hand, one passes the token just chosen, the cache, and an attention mask of
# all tokens so far, as decoders of this library take it; generate does so too, for all but a few.  One would
# guess that a mask of ones changes nothing, or that a mask of the wrong length is refused.  MambaForCausalLM
# multiplies the one new token by the whole mask, which broadcasts it to as many tokens as there are so far:
# the first step is right, its state is not, and from the second step on the logits are off by more than the
# largest of them is large, without an error or a warning.  (Its own prepare_inputs_for_generation sets the
# mask to None after the first step, so generate is right.)  LlamaForCausalLM gives the same logits with the
# mask as without.  So: leave the mask out of the cached steps of a model whose cache is called cache_params.
#
# Fails if a mask of ones no longer changes Mamba's logits, or if they are wrong without one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
export TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
heads = {"intermediate_size": 64, "num_attention_heads": 4}
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@torch.no_grad()
def errors(model, cache_name, with_mask):
    """Largest difference of each cached step's logits from those of the whole text, read at once."""
    whole = model(ids, use_cache=False).logits
    cache = model(ids[:, :4], use_cache=True)[cache_name]
    found = []
    for n in range(4, 8):
        options = {cache_name: cache}
        if with_mask:
            options["attention_mask"] = torch.ones(1, n + 1, dtype=torch.long)
        logits = model(ids[:, n : n + 1], use_cache=True, **options).logits
        assert logits.shape == (1, 1, 64)
        found.append((logits[:, -1] - whole[:, n]).abs().max() / whole.abs().max())
    return [round(error.item(), 5) for error in found]


torch.manual_seed(0)
models = {"past_key_values": LlamaForCausalLM(LlamaConfig(**sizes, **heads))}
models["cache_params"] = MambaForCausalLM(MambaConfig(**sizes))
for cache_name, model in models.items():
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)  # at their random size the logits are small
    model.eval()
    without = errors(model, cache_name, with_mask=False)
    masked = errors(model, cache_name, with_mask=True)
    print(f"{type(model).__name__}: without a mask {without}, with one {masked}")
    assert max(without) < 1e-4
    if cache_name == "past_key_values":
        assert max(masked) < 1e-4
    else:
        assert masked[0] < 1e-4 < 0.1 < min(masked[1:]), "the mask does no harm any more"
PY
