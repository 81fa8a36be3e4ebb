"""Imports that a run can do without come when they are asked for, and the packages are then whole."""

import subprocess
import sys

PROBE = """
import sys
from diffzoo.recipe.imports import postpone_imports
postpone_imports()
import lightning.pytorch
from timm.optim import list_optimizers
heavy = {"transformers", "torchvision", "scipy.signal", "timm.models.vision_transformer", "torchmetrics.image"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "muon" in list_optimizers()
import timm, torchmetrics
from torchmetrics import MeanMetric
from timm.models import VisionTransformer
assert issubclass(MeanMetric, torchmetrics.Metric) and torchmetrics.Metric is lightning.pytorch.core.module.Metric
assert timm.create_model("vit_tiny_patch16_224").num_features == 192 and isinstance(timm.layers.Mlp, type)
try:
    torchmetrics.NoSuchMetric
except AttributeError:
    print("whole")
"""


def test_postponed_packages_are_whole_when_more_is_asked_for():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.stdout.strip().endswith("whole"), done.stderr
