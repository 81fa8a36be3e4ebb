#!/usr/bin/env bash
# Versions: torch 2.13.0, transformers 5.24.0
# Behaviour: CLIP's pooled text embedding is taken at the largest token number of the prompt where the configuration
#   says eos_token_id = 2, as old configurations do, those of published text encoders among them. That is the end of the
#   text until a token is added, as textual inversion does: the new number is larger, and pooling stops at the
#   placeholder. The encoder looks back only, so whatever follows it in the prompt is lost.
# Guess: pooled at the end of the text, whatever the vocabulary.
# Seen: "a photo of <new> in the snow" and "... at the beach" have the same embedding, exactly, with eos_token_id = 2,
#   and other ones with 49407. Without the placeholder they differ in both.
# Advice: set config.eos_token_id = 49407 before adding tokens; check it where pooled embeddings condition a network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

begin, end, new = 49406, 49407, 49408
snow, beach = (530, 518, 2583), (536, 518, 2117)


def tokens(*words):
    return torch.tensor([[begin, 320, 1125, 539, *words] + [end] * (16 - len(words))])


def gap(eos, subject):
    """How far the embeddings of two prompts about a subject are apart."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        eos_token_id=eos,
    )
    encoder = CLIPTextModelWithProjection(config).eval()
    encoder.resize_token_embeddings(new + 1, mean_resizing=False)
    with torch.no_grad():
        first, second = (encoder(tokens(subject, *place)).text_embeds for place in (snow, beach))
    return (first - second).abs().max().item()


for eos in (2, end):
    known, placeholder = gap(eos, 2368), gap(eos, new)
    print(f"eos_token_id {eos}: two prompts differ by {known:.2f}, with the new token by {placeholder:.2f}")
    assert known > 0.05 and (placeholder == 0 if eos == 2 else placeholder > 0.05)
PY
