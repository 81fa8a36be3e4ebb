"""A model zoo and trainer for image diffusion.

    pipe = diffzoo.pipeline("simple_uvit_xs_32.emoji")  # from the name of weights, a run or a file to images
    pipe("Flags", seeds=range(8)).save_png("images")

    network = diffzoo.create_model("simple_uvit_xs_32", num_classes=10)  # a network alone
    diffzoo.list_models("simple_*"), diffzoo.list_pretrained(), diffzoo.describe("simple_uvit_xs_32")

The parts are in `diffzoo.process` (noise schedules, predictions, weightings), `diffzoo.models`, `diffzoo.sampling`,
`diffzoo.training`, `diffzoo.data` and `diffzoo.evaluation`. The command `diffzoo --help` trains, samples and evaluates.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# resolved on first use, so that `import diffzoo` stays light
_PUBLIC = {
    "create_model": "diffzoo.factory",
    "load_any": "diffzoo.zoo",
    "pipeline": "diffzoo.generation.pipeline",
    "pull": "diffzoo.zoo.publish",
    "push_to_hub": "diffzoo.zoo.publish",
    "save_pretrained": "diffzoo.zoo",
    "list_pretrained": "diffzoo.zoo",
    "describe": "diffzoo.models.summary",
    "list_models": "diffzoo.factory",
    "is_model": "diffzoo.models",
    "get_pretrained_cfg": "diffzoo.factory",
    "register_model": "diffzoo.models",
    "GaussianProcess": "diffzoo.process",
    "Condition": "diffzoo.typing",
    "UserError": "diffzoo.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'diffzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
