"""A run does not import all of torchmetrics; who asks for more of it gets all."""

import subprocess
import sys

PROBE = """
import sys
from diffzoo.recipe.imports import postpone_torchmetrics
postpone_torchmetrics()
import lightning.pytorch
heavy = {"transformers", "torchvision", "scipy.signal", "torchmetrics.image"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import torchmetrics
from torchmetrics import MeanMetric
assert issubclass(MeanMetric, torchmetrics.Metric) and torchmetrics.Metric is lightning.pytorch.core.module.Metric
try:
    torchmetrics.NoSuchMetric
except AttributeError:
    print("whole")
"""


def test_torchmetrics_is_whole_when_more_is_asked_for():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.stdout.strip().endswith("whole"), done.stderr
