#!/usr/bin/env bash
# Versions: torch 2.13.0 (its own libgomp), Linux
# Behaviour: the CPU threads of torch wait for each other by spinning. Where other programs share the cores, the
#   threads that wait burn the time that the one they wait for needs, at every small operation.
# Guess: beside as many busy programs as there are cores, a training step takes about twice as long.
# Seen: two cores, two busy programs and other work beside them: 0.3 steps a second against 5 to 23 with passive waiting.
# Advice: OMP_WAIT_POLICY=PASSIVE in the environment before torch is imported, or one thread.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > step.py <<'PY'
import time

import torch

network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 64, 3, padding=1),
    *[m for _ in range(6) for m in (torch.nn.GroupNorm(8, 64), torch.nn.SiLU(), torch.nn.Conv2d(64, 64, 3, padding=1))],
)
images = torch.randn(8, 3, 16, 16)
network(images).sum().backward()
start, steps = time.monotonic(), 0
while time.monotonic() - start < 8:
    network(images).sum().backward()
    steps += 1
print(steps / (time.monotonic() - start))
PY
"$venv/bin/python" - <<'PY'
import os
import subprocess
import sys
from statistics import median

cores = len(os.sched_getaffinity(0))
if cores < 2:
    sys.exit("needs two cores")


def steps(policy):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_NUM_THREADS": str(cores)}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    return float(subprocess.run([sys.executable, "step.py"], env=environment, capture_output=True, check=True).stdout)


busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
try:
    seen = [(steps(None), steps("PASSIVE")) for _ in range(3)]
finally:
    for program in busy:
        program.kill()
print("steps a second, as it is and with passive waiting:", [(round(a, 1), round(b, 1)) for a, b in seen])
assert median(b / a for a, b in seen) > 1.5
PY
