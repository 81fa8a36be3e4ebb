#!/usr/bin/env bash
# Versions: torch 2.13.0, peft 0.21.2
# Behaviour: nn.TransformerEncoderLayer with ReLU or GELU has a fast path for eval(), which hands the weights of its
#   linear layers to one kernel and never calls the layers. The `weight` of a layer that peft has wrapped is the base
#   weight: adapters train and then do nothing in eval(). The path asks for gradients, but the base weights that it asks
#   are frozen, so it is taken outside of no_grad too. LoRA, DoRA, LoHa, LoKr and IA3 alike.
# Guess: in eval() the network answers as in train() without dropout, as it does after merging.
# Seen: LoRA brings the loss from 1 to 0.04; in eval() it is 1 again, and the output is that of the base network up to
#   1e-6. Another activation, merging or the fast path switched off give 0.04.
# Advice: torch.backends.mha.set_fastpath_enabled(False), or merge before sampling.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

layers = ["linear1", "linear2"]
torch.manual_seed(0)
x, y = torch.randn(2, 16, 10, 32)


def adapted(config, activation="gelu"):
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation=activation, batch_first=True)
    return get_peft_model(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), config)


def loss(net):
    return (net(x) - y).square().mean() / (base - y).square().mean()


def train(net):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss(net.train()).backward()
        optimizer.step()
    return net


seen = {}
for activation in ("relu", "gelu", torch.nn.functional.silu):
    net = adapted(LoraConfig(r=16, target_modules=layers), activation)
    with net.disable_adapter():
        base = net(x).detach()
    train(net)
    name = getattr(activation, "__name__", activation)
    trained, evaluated = loss(net.train()).item(), loss(net.eval()).item()
    torch.backends.mha.set_fastpath_enabled(False)
    switched = loss(net.eval()).item()
    torch.backends.mha.set_fastpath_enabled(True)
    gap = (net(x) - base).abs().max().item()
    merged = loss(net.merge_and_unload().eval()).item()
    print(f"{name}: loss in train() {trained:.3f}, in eval() {evaluated:.3f}, there from the base by {gap:.1g}")
    print(f"  fast path off {switched:.3f}, merged {merged:.3f}")
    seen[name] = trained, evaluated
    assert trained < 0.3 and abs(switched - trained) < 1e-4 and abs(merged - trained) < 1e-4
assert seen["relu"][1] > 0.999 and seen["gelu"][1] > 0.999
assert abs(seen["silu"][1] - seen["silu"][0]) < 1e-4
configs = (
    LoraConfig(target_modules=layers, use_dora=True),
    LoHaConfig(target_modules=layers),
    LoKrConfig(target_modules=layers),
    IA3Config(target_modules=layers, feedforward_modules=["linear2"]),
)
for config in configs:
    net = adapted(config)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p) * p.requires_grad
    with torch.no_grad():
        trained = net.train()(x)
        with net.disable_adapter():
            base = net(x)
        change, gap = (trained - base).abs().max().item(), (net.eval()(x) - base).abs().max().item()
    print(f"{config.peft_type.value}: moves the output by {change:.2f} in train(), by {gap:.1g} in eval()")
    assert change > 0.1 and gap < 1e-5
PY
