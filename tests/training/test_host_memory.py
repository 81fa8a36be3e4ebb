"""Memory that a process frees stays with it: later steps take no page faults."""

import json
import platform
import subprocess
import sys

SCRIPT = """
import json, resource
import torch
from diffzoo.training.host_memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(2**20).add_(1) for _ in range(64)]  # 64 tensors of 4 MiB, as activations
    large = torch.zeros(24 * 2**20).add_(1)                 # one of 96 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = [faults_of_a_step() for _ in range(3)]
assert keep_freed_memory()
print(json.dumps([usual[-1], [faults_of_a_step() for _ in range(3)][-1]]))
"""


def test_freed_memory_is_kept() -> None:
    """In a process of its own: the setting stays."""
    assert platform.libc_ver()[0] == "glibc", "the effect is glibc's: elsewhere there is nothing to test"
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    usual, kept = json.loads(done.stdout)
    pages = (64 * 4 + 96) * 256
    assert usual > pages / 10
    assert kept < pages / 100
