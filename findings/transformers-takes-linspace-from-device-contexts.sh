#!/usr/bin/env bash
# Versions: torch 2.13.0, transformers 5.24.0
# Behaviour: torch collects the functions that `with torch.device(...)` reaches at the first call inside such a block. The
#   first one of many programs is in `from_pretrained`, which replaces `torch.linspace` meanwhile: the list then holds the
#   replacement, and for the rest of the process `torch.linspace` ignores every device block.
# Guess: a device block reaches all factory functions, whatever was loaded before.
# Seen: after `from_pretrained`, under `torch.device("meta")`: arange on meta, linspace on cpu. With one device block
#   before it: both on meta.
# Advice: use any factory function in a device block once before transformers does, or name the device of `linspace`;
#   rotary embeddings built "on the GPU" or "on meta" are otherwise on the CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13-transformers
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$folder"
cat > look.py <<'PY'
import sys

import torch
from transformers import CLIPTextConfig, CLIPTextModel

if "before" in sys.argv:
    with torch.device("meta"):
        torch.zeros(1)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
CLIPTextModel(CLIPTextConfig(**sizes)).save_pretrained("clip")
CLIPTextModel.from_pretrained("clip")
with torch.device("meta"):
    print(torch.arange(4).device.type, torch.linspace(0, 1, 4).device.type)
PY
plain=$(OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore look.py 2>/dev/null)
before=$(OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore look.py before 2>/dev/null)
echo "arange and linspace after from_pretrained: $plain; with a device block before it: $before"
[ "$plain" = "meta cpu" ] && [ "$before" = "meta meta" ]
