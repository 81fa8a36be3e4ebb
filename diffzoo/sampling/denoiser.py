"""The seam between networks and samplers: a denoiser takes z and t and estimates x and eps.

Guidance wraps a denoiser and is one again (`guidance.py`); a sampler sees nothing else.
"""

from copy import copy
from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import nn

from diffzoo.errors import lacks
from diffzoo.process.gaussian import Estimate, GaussianProcess
from diffzoo.typing import Condition, Data, NoiseLevel, Times

__all__ = ["Denoise", "Denoiser", "DenoiserAround", "NetworkLike", "compile_networks", "noise_levels", "rows_of"]

W = TypeVar("W")


@runtime_checkable
class NetworkLike(Protocol):
    """The interface that a denoiser needs of a network; `diffzoo.models.Network` has it."""

    def __call__(self, z: Data, noise_level: NoiseLevel, cond: Condition | None = None) -> Data: ...

    def null_condition(self, cond: Condition | None) -> Condition | None: ...


@runtime_checkable
class Denoise(Protocol):
    """Anything a sampler can use: a `Denoiser`, or guidance around one."""

    @property
    def process(self) -> GaussianProcess: ...

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate: ...

    def null_condition(self, cond: Condition | None) -> Condition | None: ...


class Denoiser:
    """A network and the process it was trained with.

    Args:
        network: reads a noise level, returns the process's prediction.
        process: schedule, path, prediction and reading.
    """

    def __init__(self, network: NetworkLike, process: GaussianProcess):
        self.network, self.process = network, process

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        """Estimate data and noise.

        Args:
            z: noisy data `(b, c, h, w)`.
            t: one time for all, `()`, or one per sample, `(b,)`.
            cond: what to sample.
        """
        output = self.network(z, noise_levels(self.process, z, t), cond)
        return self.process.interpret(output.to(z.dtype), z, t)

    def null_condition(self, cond: Condition | None) -> Condition | None:
        """The condition for "none": the network's null class."""
        return self.network.null_condition(cond)


class DenoiserAround:
    """A denoiser around a denoiser. It passes on all but the estimate, which subclasses define."""

    denoise: Denoise

    @property
    def process(self) -> GaussianProcess:
        """The process of the denoiser inside."""
        return self.denoise.process

    def null_condition(self, cond: Condition | None) -> Condition | None:
        """The condition for "none" of the denoiser inside."""
        return self.denoise.null_condition(cond)

    def rows(self, part: slice) -> Self:
        """The same for a part of the images."""
        other = copy(self)
        other.denoise = rows_of(self.denoise, part)
        return other

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        """The estimate."""
        raise lacks(self, "__call__")


def rows_of(whole: W, part: slice) -> W:
    """A denoiser or sampler for a part of the images: guidance with a scale per image takes those of the part."""
    select = getattr(whole, "rows", None)
    return whole if select is None else select(part)


def noise_levels(process: GaussianProcess, z: Data, t: Times) -> NoiseLevel:
    """The network's input at `t`, one number per row of `z`, float32 on its device.

    It is computed where t lives. Samplers keep times on the CPU, and a device fills a tensor with a number from there
    without waiting for a copy.
    """
    level = process.noise_level(t)
    if level.ndim == 0 and level.device.type == "cpu":
        return z.new_full((len(z),), float(level), dtype=torch.float32)
    return level.to(torch.float32).to(z.device).expand(len(z))


def compile_networks(denoise: Denoise) -> None:
    """Compile the network of a denoiser, and those of the denoisers that guidance holds, in place and once.

    Networks of diffzoo are compiled block by block (`Network.compile_units`), others whole.
    """
    for held in ("denoise", "weak"):
        inner = getattr(denoise, held, None)
        if inner is not None:
            compile_networks(inner)
    network = getattr(denoise, "network", None)
    if isinstance(network, nn.Module) and all(m._compiled_call_impl is None for m in network.modules()):
        getattr(network, "compile_units", network.compile)()
