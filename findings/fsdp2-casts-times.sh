#!/usr/bin/env bash
# Versions: torch 2.13.0
# Behaviour: `fully_shard` with MixedPrecisionPolicy(param_dtype=bfloat16) casts every floating-point input of the
#   network's forward, the noise level beside the image included: 997, 998, 999 all become 996 or 1000. Integer time
#   steps pass.
# Guess: the policy concerns parameters and activations; a timestep given as float32 arrives as float32.
# Seen: float32 in: torch.bfloat16 [996.0, 1000.0, 1000.0]; int64 in: [997, 998, 999]; with cast_forward_inputs=False
#   float32 arrives untouched.
# Advice: pass integers, or embed the noise level before the sharded module, or turn cast_forward_inputs off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/meeting", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, time):
        self.seen = time.dtype, time.tolist()
        return self.layer(x.to(self.layer.weight.dtype))


def arrives(time, **policy):
    network = Network()
    fully_shard(network, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, **policy))
    network(torch.randn(3, 4), time)
    return network.seen


times = torch.tensor([997, 998, 999])
got = arrives(times.float()), arrives(times), arrives(times.float(), cast_forward_inputs=False)
print(*got, sep="\n")
dist.destroy_process_group()
assert got[0] == (torch.bfloat16, [996.0, 1000.0, 1000.0])
assert got[1] == (torch.int64, [997, 998, 999])
assert got[2] == (torch.float32, [997.0, 998.0, 999.0])
PY
