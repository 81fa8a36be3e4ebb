"""Memory that a process frees stays with it: the second step takes no page faults."""

import platform
import subprocess
import sys

SCRIPT = """
import resource, sys
import torch
from diffzoo.training.host_memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(2**20).add_(1) for _ in range(64)]  # 64 tensors of 4 MiB, as activations
    large = torch.zeros(24 * 2**20).add_(1)                 # one of 96 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
steps = [faults_of_a_step() for _ in range(4)]
print(steps[-1])
"""


def faults(mode: str) -> int:
    """Page faults of a fourth step in a process of its own."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_freed_memory_is_kept() -> None:
    assert platform.libc_ver()[0] == "glibc", "the effect is glibc's: elsewhere there is nothing to test"
    pages = (64 * 4 + 96) * 256
    assert faults("keep") < pages / 100
    assert faults("leave") > pages / 10
