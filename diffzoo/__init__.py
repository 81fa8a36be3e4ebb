"""A model zoo and trainer for image diffusion.

    pipe = diffzoo.pipeline("simple_uvit_xs_32.emoji")  # from the name of weights, a run or a file to images
    pipe("Flags", seeds=range(8)).save_png("images")

    network = diffzoo.create_model("simple_uvit_xs_32", num_classes=10)  # a network alone
    diffzoo.list_models("simple_*"), diffzoo.list_pretrained(), diffzoo.describe("simple_uvit_xs_32")

The parts are in `diffzoo.process` (noise schedules, predictions, weightings), `diffzoo.models`, `diffzoo.sampling`,
`diffzoo.training`, `diffzoo.data` and `diffzoo.evaluation`. The command `diffzoo --help` trains, samples and evaluates.
Importing this package is light. `__init__.pyi` lists its names.
"""

from diffzoo.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)
