"""Guidance: a denoiser around a denoiser.

Two estimates at the same z and t, a good one and a bad one, are extrapolated:

    (1)  guided = bad + w (good - bad)

For classifier-free guidance (arXiv:2207.12598) good is conditional and bad unconditional; for autoguidance
(arXiv:2406.02507) bad is a weaker network under the same condition. x_hat and eps_hat are affine in each other at
fixed z, and the two coefficients of (1) add up to 1, so guiding one is guiding the other, and the pair stays consistent
with `z = alpha x + sigma eps`.

Scales are written in two ways, and confusing them is a common reason for images that do not match a paper:

    formula "uncond"   uncond + s (cond - uncond), w = s       1 = none    EDM2, DiT, ADM, Simple Diffusion's "scale"
    formula "cond"     cond + s (cond - uncond),   w = 1 + s   0 = none    U-ViT, DiMR; eta in Simple Diffusion's
                                                                           (1 + eta) cond - eta uncond

A weight of 1 changes nothing and costs one network call.

A large weight makes the network's output larger than it ever was in training, and images too bright. With phi =
`rescale` a part of that is undone (arXiv:2305.08891, Eq. 14-16), image by image, on the output of the network:

    (2)  out = (phi std(good) / std(guided) + 1 - phi) guided

It also drives x_hat out of the range of images. A clamp to [-1, 1] (`Sampler.clip`) saturates such pixels; dynamic
thresholding (arXiv:2205.11487, Section 2.3) clamps each image's x_hat to [-s, s] and divides by s, where s is a high
quantile of its own |x_hat|, at least 1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal, Self, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError, check_choice
from diffzoo.process.gaussian import Estimate, GaussianProcess, expand_like
from diffzoo.sampling.denoiser import Denoise, DenoiserAround, rows_of
from diffzoo.sampling.grids import Unit
from diffzoo.typing import Condition, Data, Times

__all__ = [
    "Autoguidance",
    "ClassifierFree",
    "DynamicThresholding",
    "Formula",
    "Guidance",
    "GuidanceSchedule",
    "Interval",
    "PowerCosine",
]

Formula = Literal["uncond", "cond"]
Per = Literal["image", "class"]


class GuidanceSchedule(ABC):
    """The strength of guidance at a time: a factor in [0, 1] on `w - 1`."""

    @abstractmethod
    def __call__(self, process: GaussianProcess, t: Times) -> Times:
        """The factor at times `t`, of the same shape."""


@dataclass(frozen=True)
class Interval(GuidanceSchedule):
    """Guidance on an interval of noise levels only (arXiv:2404.07724); outside, one network call.

    Args:
        low, high: the ends, both included.
        unit: what they are: "t"; "logsnr"; or "sigma", meaning sigma / alpha, EDM's noise level.
    """

    low: float
    high: float
    unit: Unit = "t"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"expected low < high for the guidance interval, got {self.low} and {self.high}")
        check_choice("unit", self.unit, Unit)

    def __call__(self, process: GaussianProcess, t: Times) -> Times:
        value = t
        if self.unit != "t":
            logsnr = process.logsnr(t)
            value = logsnr if self.unit == "logsnr" else torch.exp(-logsnr / 2)
        return ((value >= self.low) & (value <= self.high)).to(t.dtype)


@dataclass(frozen=True)
class PowerCosine(GuidanceSchedule):
    """DiMR's decay: `(1 - cos(pi (1 - t)^power)) / 2`, none at the noise, all at the data (arXiv:2406.09416)."""

    power: float = 1.0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise UserError(f"the power of the guidance decay must be positive, got {self.power}")

    def __call__(self, process: GaussianProcess, t: Times) -> Times:
        return (1 - torch.cos(math.pi * (1 - t) ** self.power)) / 2


class Extrapolating(TypedDict, total=False):
    """Options of both kinds of guidance.

    per: what a vector of scales counts, "image" (the default) or "class".
    interval: where guidance acts.
    decay: how it fades.
    channels: guide the first so many channels and leave the others conditional; None = all. The published numbers of
        DiT, SiT and LightningDiT were drawn with 3 of 4 or of 32 latent channels guided.
    rescale: phi in (2); 0 = none, 0.7 in the paper.
    """

    per: Per
    interval: GuidanceSchedule | None
    decay: GuidanceSchedule | None
    channels: int | None
    rescale: float


class _Scales:
    """One scale for all images, or a vector: one per image or per class."""

    def __init__(self, values: float | Tensor, per: Per):
        check_choice("guidance.per", per, Per)
        self.values, self.per = torch.as_tensor(values, dtype=torch.float64).cpu(), per
        if self.values.ndim > 1:
            raise UserError(f"expected one guidance scale or a vector, got shape {tuple(self.values.shape)}")
        self._last: tuple[Tensor | None, Tensor] = None, self.values

    def rows(self, part: slice) -> "_Scales":
        """Those for a part of the images."""
        return _Scales(self.values[part], self.per) if self.values.ndim and self.per == "image" else self

    def of(self, cond: Condition | None) -> Float[Tensor, "*images"]:
        """The scale of each image, `()` or `(b,)`, float64 on the CPU."""
        if self.values.ndim == 0 or self.per == "image":
            return self.values
        if cond is None or cond.label is None:
            raise UserError("a guidance scale per class needs class labels")
        if self._last[0] is not cond.label:  # one copy from the device per batch, not one per call
            self._last = cond.label, self.values[cond.label.cpu()]
        return self._last[1]


def _rescaled(process: GaussianProcess, guided: Estimate, good: Estimate, z: Data, t: Times, phi: float) -> Estimate:
    """(2)."""
    process = replace(process, learned_variance=False) if process.learned_variance else process
    output, usual = (process.target(e.x, e.eps, t) for e in (guided, good))
    ratio = usual.flatten(1).std(1) / output.flatten(1).std(1)
    output = output * expand_like(phi * ratio + 1 - phi, z)
    return process.interpret(output, z, t)._replace(variance=guided.variance)


class _Extrapolation(DenoiserAround, ABC):
    """(1): what the two kinds of guidance share."""

    def __init__(
        self,
        denoise: Denoise,
        scale: float | Tensor,
        formula: Formula,
        per: Per = "image",
        interval: GuidanceSchedule | None = None,
        decay: GuidanceSchedule | None = None,
        channels: int | None = None,
        rescale: float = 0.0,
    ):
        check_choice("guidance.formula", formula, Formula)
        self.denoise, self.formula, self.scales = denoise, formula, _Scales(scale, per)
        if not 0 <= rescale <= 1:
            raise UserError(f"expected a rescale of guidance in [0, 1], got {rescale}")
        self.interval, self.decay, self.channels, self.rescale = interval, decay, channels, rescale

    def rows(self, part: slice) -> Self:
        """The same guidance for a part of the images."""
        other = super().rows(part)
        other.scales = self.scales.rows(part)
        return other

    def weight(self, t: Times, cond: Condition | None) -> Float[Tensor, "*images"]:
        """w in (1) at times `t`, `()` or `(b,)`, float64 on the CPU."""
        t = t.cpu()
        excess = self.scales.of(cond) - (1 if self.formula == "uncond" else 0)
        for fade in (self.interval, self.decay):
            if fade is not None:
                excess = excess * fade(self.process, t.double())
        return 1 + excess

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        """The guided estimate; one network call where the weight is 1 for all images."""
        w = self.weight(t, cond)
        if w.ndim == 1 and len(w) != len(z):
            raise UserError(f"expected {len(z)} guidance scales, one per image, got {len(w)}")
        if bool((w == 1).all()):
            return self.denoise(z, t, cond)
        good, bad = self._pair(z, t, cond)
        w = expand_like(w, z)
        x, eps = bad.x + w * (good.x - bad.x), bad.eps + w * (good.eps - bad.eps)
        if self.channels is not None:
            x, eps = (
                torch.cat([guided[:, : self.channels], plain[:, self.channels :]], dim=1)
                for guided, plain in ((x, good.x), (eps, good.eps))
            )
        guided = Estimate(x, eps, good.variance)
        return _rescaled(self.process, guided, good, z, t, self.rescale) if self.rescale else guided

    @abstractmethod
    def _pair(self, z: Data, t: Times, cond: Condition | None) -> tuple[Estimate, Estimate]:
        """The good and the bad estimate."""


class ClassifierFree(_Extrapolation):
    """Classifier-free guidance: away from what the network samples without a condition (arXiv:2207.12598).

    Args:
        denoise: a denoiser whose network knows a null condition.
        scale: one number; or a vector, one number per image or per class.
        formula: which of the two conventions above `scale` follows.
        batched: conditional and unconditional in one call of twice the batch, or in two calls; equal results. Always
            two around a denoiser that is itself guided.
        null: one row that stands for "none" in place of the network's null condition, such as the embedding of an
            empty or of a negative caption.
        how: see `Extrapolating`.
    """

    def __init__(
        self,
        denoise: Denoise,
        scale: float | Tensor,
        formula: Formula = "uncond",
        *,
        batched: bool = True,
        null: Condition | None = None,
        **how: Unpack[Extrapolating],
    ):
        super().__init__(denoise, scale, formula, **how)
        self.batched, self.null = batched, null

    def null_condition(self, cond: Condition | None) -> Condition | None:
        """The condition for "none": the given one, else the network's."""
        if self.null is None or cond is None:
            return self.denoise.null_condition(cond)
        return self.null[torch.zeros(len(cond), dtype=torch.long)]

    def _pair(self, z: Data, t: Times, cond: Condition | None) -> tuple[Estimate, Estimate]:
        if cond is None:
            raise UserError("classifier-free guidance needs a condition to guide towards: give it classes or captions")
        null = self.null_condition(cond)
        # guidance inside may have a scale per image, which fits one batch and not two
        if not self.batched or null is None or hasattr(self.denoise, "rows"):
            return self.denoise(z, t, cond), self.denoise(z, t, null)
        both = self.denoise(torch.cat([z, z]), t if t.ndim == 0 else torch.cat([t, t]), Condition.cat(cond, null))
        return _half(both, slice(None, len(z))), _half(both, slice(len(z), None))


class Autoguidance(_Extrapolation):
    """Away from a weaker version of the network under the same condition (arXiv:2406.02507).

    Args:
        denoise: the good denoiser.
        weak: a smaller or less trained one of the same process; one without classes does not see the labels.
        scale: one number; or a vector, one number per image or per class.
        formula: "uncond" reads as weak + s (good - weak), 1 = none; "cond" as good + s (good - weak), 0 = none.
        how: see `Extrapolating`.
    """

    def __init__(
        self,
        denoise: Denoise,
        weak: Denoise,
        scale: float | Tensor,
        formula: Formula = "uncond",
        **how: Unpack[Extrapolating],
    ):
        super().__init__(denoise, scale, formula, **how)
        self.weak = weak
        if (weak.process.schedule, weak.process.path) != (denoise.process.schedule, denoise.process.path):
            raise UserError("autoguidance needs two networks of the same schedule and path")

    def rows(self, part: slice) -> Self:
        """The same guidance for a part of the images."""
        other = super().rows(part)
        other.weak = rows_of(self.weak, part)
        return other

    def _pair(self, z: Data, t: Times, cond: Condition | None) -> tuple[Estimate, Estimate]:
        reads = getattr(getattr(self.weak, "network", None), "conditional", True)
        return self.denoise(z, t, cond), self.weak(z, t, cond if reads else None)


class DynamicThresholding(DenoiserAround):
    """Keeps x_hat in [-1, 1] by its own quantile, with eps recomputed to fit z.

    Args:
        denoise: a denoiser of images, guided or not. Latents have no range to keep.
        quantile: of |x_hat|, in (0, 1); 0.995 in the public code after Imagen.
    """

    def __init__(self, denoise: Denoise, quantile: float = 0.995):
        if not 0 < quantile < 1:
            raise UserError(f"expected a quantile in (0, 1), got {quantile}")
        self.denoise, self.quantile = denoise, quantile

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        """The thresholded estimate."""
        estimate = self.denoise(z, t, cond)
        sizes = estimate.x.flatten(1).abs()
        s = expand_like(torch.quantile(sizes.float(), self.quantile, dim=1).clamp_min(1), z)
        alpha, sigma = (expand_like(c, z) for c in self.process.coefficients(t))
        x = torch.maximum(torch.minimum(estimate.x, s), -s) / s
        return estimate._replace(x=x, eps=(z - alpha * x) / sigma)


@dataclass(frozen=True)
class Guidance:
    """The guidance of a set of weights, as a record: the arguments of `ClassifierFree`.

    Args:
        scale: one number, or one per class.
        formula: the convention of the scale, which is a fact of the weights; in files also spelt out, as
            "cond + s * (cond - uncond)".
        interval: where guidance acts; None = everywhere.
        decay: how it fades; None = not at all.
        channels: only the first so many are guided; None = all.
        rescale: phi in (2); 0 = none.
        threshold: quantile of dynamic thresholding, for images in [-1, 1], such as 0.995; None = none.
    """

    scale: float | tuple[float, ...]
    formula: Formula = "uncond"
    interval: GuidanceSchedule | None = field(default=None, metadata={"usual": Interval})
    decay: GuidanceSchedule | None = field(default=None, metadata={"usual": PowerCosine})
    channels: int | None = None
    rescale: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        for scale in self.scale if isinstance(self.scale, tuple) else (self.scale,):
            if not math.isfinite(scale):
                raise UserError(f"guidance needs a finite scale, got {scale}")

    @property
    def acts(self) -> bool:
        """Whether this guidance changes anything."""
        return self.scale != (1 if self.formula == "uncond" else 0)

    def around(self, denoise: Denoise, null: Condition | None = None, weak: Denoise | None = None) -> Denoise:
        """The guided denoiser.

        Args:
            denoise: without guidance.
            null: the row that stands for "no caption", for text models.
            weak: the weaker model of autoguidance; None = classifier-free guidance.
        """
        scale = torch.tensor(self.scale, dtype=torch.float64)
        how: Extrapolating = {"interval": self.interval, "decay": self.decay, "rescale": self.rescale}
        how["per"] = "class" if isinstance(self.scale, tuple) else "image"
        guided: Denoise
        if weak is not None:
            guided = Autoguidance(denoise, weak, scale, self.formula, **how)
        else:
            how["channels"] = self.channels
            guided = ClassifierFree(denoise, scale, self.formula, null=null, **how)
        return guided if self.threshold is None else DynamicThresholding(guided, self.threshold)


def _half(estimate: Estimate, part: slice) -> Estimate:
    variance = None if estimate.variance is None else estimate.variance[part]
    return Estimate(estimate.x[part], estimate.eps[part], variance)
