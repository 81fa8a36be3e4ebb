"""`import diffzoo` is light, and help is instant."""

import resource
import subprocess
import sys

HEAVY = ("torch", "lightning", "datasets", "transformers", "diffusers", "huggingface_hub", "torchmetrics", "timm")


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_package_imports_nothing_heavy() -> None:
    assert loaded_after("import diffzoo") == set()


def test_networks_and_samplers_need_only_torch() -> None:
    assert loaded_after("import diffzoo.models, diffzoo.process, diffzoo.sampling") == {"torch"}


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: other work on the machine is not ours
        done = subprocess.run([sys.executable, "-m", "diffzoo", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout
    assert min(times) < 0.5
