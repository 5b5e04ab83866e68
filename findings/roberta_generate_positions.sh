#!/usr/bin/env bash
# transformers 5.23.0: one would guess that the first token of a greedy generate is the argmax of forward's last
# logits.  It is for BertLMHeadModel.  For RobertaForCausalLM it is not: forward without position_ids counts
# positions from padding_idx + 1 (as the weights were trained: 2, 3, 4, ...), while generate hands it
# position_ids that begin at 0.  So texts are generated with positions that are off by two, the first two of
# which were never trained, without an error or a warning.  CamemBERT, XLM-RoBERTa and Data2Vec share the code.
# A model that is fine-tuned by forward is decoded as another.  So: pass position_ids yourself, in both.
#
# Fails if generate's first tokens become those of forward, or if they differ once forward is given
# position_ids that begin at 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
export TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import BertConfig, BertLMHeadModel, RobertaConfig, RobertaForCausalLM

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
special = {"is_decoder": True, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
options = {"vocab_size": 64, "max_position_embeddings": 66, **sizes, **special}
torch.manual_seed(0)
bert = BertLMHeadModel(BertConfig(**options)).eval()
roberta = RobertaForCausalLM(RobertaConfig(**options)).eval()
prompts = [torch.randint(3, 64, (1, 8)) for _ in range(20)]


@torch.no_grad()
def equal_tokens(model, **inputs):
    """How many of 20 first tokens of generate are the argmax of forward."""
    count = 0
    for ids in prompts:
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        logits = model(ids, attention_mask=mask, **inputs).logits
        count += int(output[0, -1] == logits[0, -1].argmax())
    return count


for model in (bert, roberta):
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(10)  # at their random size the logits hardly depend on the input
of_bert = equal_tokens(bert)
of_roberta = equal_tokens(roberta)
from_zero = equal_tokens(roberta, position_ids=torch.arange(8)[None])
print(f"BERT: {of_bert} of 20 first tokens are forward's; RoBERTa: {of_roberta}")
print(f"RoBERTa, forward with position_ids 0, 1, 2, ...: {from_zero}")
assert of_bert == 20
assert from_zero == 20
assert of_roberta < 20, "generate counts positions as forward does now"
PY
