#!/usr/bin/env bash
# Versions: torch 2.13.0
# Behaviour: a sample whose keys are all masked (an empty caption, a dropped condition) comes out of
#   `torch.nn.MultiheadAttention` and `TransformerEncoderLayer` finite where gradients are recorded, and as NaN under
#   `no_grad` in evaluation mode: the fast path of inference has a softmax of its own. `scaled_dot_product_attention`
#   with the same mask gives zeros.
# Guess: evaluation mode changes dropout, not what a mask means; NaN, if any, would show in training.
# Seen: training and `eval()` with gradients: finite. `eval()` and `no_grad`: NaN in every channel of that sample alone.
# Advice: leave one key unmasked (a null token), or `torch.backends.mha.set_fastpath_enabled(False)`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
x = torch.randn(2, 5, 16)
empty = torch.tensor([[True] * 5, [False] * 5])  # True = masked
attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def nan_samples(out):
    return out.isnan().all(-1).all(-1).tolist()


calls = {
    "MultiheadAttention": lambda: attention(x, x, x, key_padding_mask=empty, need_weights=False)[0],
    "TransformerEncoderLayer": lambda: layer(x, src_key_padding_mask=empty),
}
for name, call in calls.items():
    attention.train(), layer.train()
    trained = nan_samples(call())
    attention.eval(), layer.eval()
    recorded = nan_samples(call())
    with torch.no_grad():
        sampled = nan_samples(call())
        torch.backends.mha.set_fastpath_enabled(False)
        slow = nan_samples(call())
        torch.backends.mha.set_fastpath_enabled(True)
    print(f"{name}: NaN in training {trained}, eval {recorded}, eval and no_grad {sampled}, without fast path {slow}")
    assert trained == recorded == slow == [False, False]
    assert sampled == [True, False]
heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
plain = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=~empty[:, None, None])
print("scaled_dot_product_attention:", plain[0].abs().max().item())
assert plain[0].abs().max() == 0
PY
