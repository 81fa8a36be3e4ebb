"""Networks of diffzoo for samplers of other libraries, and networks of theirs for the samplers here.

    model = KDenoiser(pipe.generator.denoiser)                     # k-diffusion, EDM: D(x; sigma)
    images = sample_heun(model, noise * sigmas[0], sigmas, extra_args={"label": labels})

    network, config = as_diffusers(pipe.generator.denoiser)        # diffusers: model(sample, timestep).sample
    scheduler = DDIMScheduler(**config)

    denoise = from_k_diffusion(model, sigma_min=0.03, sigma_max=80)
    denoise = from_diffusers(unet, scheduler)
    images = sample(denoise, DDIM(steps=50), shape, seeds)

Every Gaussian process is one of noise levels: z / alpha = x + (sigma / alpha) eps, where sigma / alpha =
exp(-logsnr / 2) is the sigma of EDM (arXiv:2206.00364), and z / sqrt(alpha^2 + sigma^2) is the state of DDPM.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.process import (
    X0,
    DiscreteBetas,
    Eps,
    Estimate,
    GaussianProcess,
    LinearLogSNR,
    TimeConditioning,
    V,
    VarianceExploding,
)
from diffzoo.process.gaussian import expand_like
from diffzoo.sampling import Denoise, Denoiser
from diffzoo.typing import Condition, Data, Images, Labels, Mask, NoiseLevel, PerSample, Times, Tokens

__all__ = ["DiffusersModel", "KDenoiser", "as_diffusers", "from_diffusers", "from_k_diffusion"]


def _condition(label: Labels | None, text: Tokens | None, text_mask: Mask | None) -> Condition | None:
    cond = Condition(label, text, text_mask)
    return cond if len(cond) else None


# -- ours for theirs


class KDenoiser(nn.Module):
    """D(x; sigma): clean images from images plus noise of standard deviation sigma, as k-diffusion and EDM call it.

    Args:
        denoise: a denoiser, guided or not.

    `sigma_min` and `sigma_max` are the noise levels that the network was trained on.
    """

    def __init__(self, denoise: Denoise):
        super().__init__()
        self.denoise = denoise
        self.network = getattr(denoise, "network", None)  # so that `.to(device)` and exports see its parameters
        schedule = denoise.process.schedule
        self.levels = schedule.logsnr_min, schedule.logsnr_max
        self.sigma_max, self.sigma_min = (math.exp(-level / 2) for level in self.levels)

    def forward(
        self,
        x: Images,
        sigma: PerSample,
        label: Labels | None = None,
        text: Tokens | None = None,
        text_mask: Mask | None = None,
    ) -> Images:
        """Clean images, where x is clean images plus sigma times standard normal noise."""
        process = self.denoise.process
        # a level beyond those of the schedule would be one that the network never saw
        logsnr = (-2 * torch.log(sigma.double())).clamp(*self.levels)
        t = process.schedule.time(logsnr)
        alpha, _ = process.coefficients_at(logsnr)
        return self.denoise(expand_like(alpha, x) * x, t, _condition(label, text, text_mask)).x


class DiffusersModel:
    """A denoiser as diffusers' schedulers call a network: steps 0 ... N - 1, and the velocity of arXiv:2202.00512.

    Args:
        denoise: a denoiser, guided or not.
        steps: N; step n is time (n + 1) / N.
    """

    def __init__(self, denoise: Denoise, steps: int = 1000):
        self.denoise, self.steps = denoise, steps
        self.config = SimpleNamespace(num_train_timesteps=steps)

    def logsnr(self, timestep: Tensor | int) -> Tensor:
        """Log-SNR at some steps, float64."""
        return self.denoise.process.logsnr((torch.as_tensor(timestep).double() + 1) / self.steps)

    def __call__(
        self,
        sample: Images,
        timestep: Tensor | int,
        encoder_hidden_states: Tokens | None = None,
        class_labels: Labels | None = None,
    ) -> SimpleNamespace:
        """The velocity alpha eps - sigma x of a variance-preserving state, as the field `sample`."""
        t = (torch.as_tensor(timestep).double() + 1) / self.steps
        alpha, sigma = self.denoise.process.coefficients(t)
        norm = (alpha.square() + sigma.square()).sqrt()
        cond = _condition(class_labels, encoder_hidden_states, None)
        x, eps, _ = self.denoise(expand_like(norm, sample) * sample, t, cond)
        # the state is normalised, so (x, eps) fit it with these coefficients
        a, s = torch.sigmoid(self.logsnr(timestep)).sqrt(), torch.sigmoid(-self.logsnr(timestep)).sqrt()
        return SimpleNamespace(sample=expand_like(a, sample) * eps - expand_like(s, sample) * x)


def as_diffusers(denoise: Denoise, steps: int = 1000) -> tuple[DiffusersModel, dict[str, object]]:
    """A network for diffusers' schedulers, and the settings of a scheduler that fits it.

    Args:
        denoise: a denoiser, guided or not.
        steps: of the training schedule that the process is cut into.
    """
    model = DiffusersModel(denoise, steps)
    kept = torch.sigmoid(model.logsnr(torch.arange(steps)))  # alpha^2
    betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    config: dict[str, object] = {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
    }
    return model, config


# -- theirs for ours


class _KModel:
    """A k-diffusion model as a denoiser."""

    def __init__(self, model: Callable[..., Tensor], process: GaussianProcess, null_class: int | None):
        self.model, self.process, self.null_class = model, process, null_class

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        sigma = self.process.coefficients(t)[1].to(z.device, torch.float32).expand(len(z))
        x = self.model(z, sigma, **({"class_cond": cond.label} if cond is not None and cond.label is not None else {}))
        return Estimate(x, (z - x) / expand_like(sigma, z))

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return _null(cond, self.null_class)


def from_k_diffusion(
    model: Callable[..., Tensor], sigma_min: float, sigma_max: float, null_class: int | None = None
) -> Denoise:
    """A denoiser out of a function `model(x, sigma, class_cond=...)` that returns clean images.

    Args:
        model: as k-diffusion's `Denoiser` and `CompVisDenoiser` are called.
        sigma_min, sigma_max: noise levels that it was trained on.
        null_class: index of the class that means "none", for guidance.
    """
    process = GaussianProcess(
        LinearLogSNR(-2 * math.log(sigma_max), -2 * math.log(sigma_min)), VarianceExploding(), X0()
    )
    return _KModel(model, process, null_class)


class _DiffusersNetwork:
    """A network of diffusers as a network of ours: the number it reads is the step."""

    def __init__(self, model: Callable[..., object], null_class: int | None):
        self.model, self.null_class = model, null_class

    def __call__(self, z: Data, noise_level: NoiseLevel, cond: Condition | None = None) -> Data:
        told: dict[str, Tensor] = {}
        if cond is not None and cond.label is not None:
            told["class_labels"] = cond.label
        if cond is not None and cond.text is not None:
            told["encoder_hidden_states"] = cond.text
        output = self.model(z, noise_level, **told)
        return output.sample  # type: ignore[attr-defined]

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return _null(cond, self.null_class)


class _HasConfig(Protocol):
    @property
    def config(self) -> Mapping[str, object]: ...


KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}


def from_diffusers(model: Callable[..., object], scheduler: _HasConfig, null_class: int | None = None) -> Denoiser:
    """A denoiser out of a network of diffusers and the scheduler that it was trained with.

    Args:
        model: called as `model(sample, timestep, class_labels=..., encoder_hidden_states=...).sample`.
        scheduler: of DDPM's kind: betas and a prediction type.
        null_class: index of the class that means "none", for guidance.

    Raises:
        UserError: for a scheduler of another kind.
    """
    config = scheduler.config
    kind, prediction = str(config.get("beta_schedule")), str(config.get("prediction_type", "epsilon"))
    if kind not in KINDS or prediction not in PREDICTIONS or config.get("trained_betas") is not None:
        raise UserError(
            f"expected a scheduler with betas {', '.join(KINDS)} that predicts {', '.join(PREDICTIONS)}, got "
            f"{type(scheduler).__name__} with {kind} and {prediction}"
        )
    steps = int(str(config["num_train_timesteps"]))
    scale = steps / 1000 if kind == "linear" else 1.0  # ours are stated at a thousand steps
    first, last = (scale * float(str(config[name])) for name in ("beta_start", "beta_end"))
    schedule = DiscreteBetas(
        KINDS[kind],  # type: ignore[arg-type]
        steps,
        first,
        last,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
    channels = getattr(model, "config", {})
    learned = channels.get("out_channels") == 2 * int(channels.get("in_channels") or 0)
    process = GaussianProcess(
        schedule,
        prediction=PREDICTIONS[prediction],
        noise_conditioning=TimeConditioning(steps, -1),
        learned_variance=learned,
    )
    return Denoiser(_DiffusersNetwork(model, null_class), process)


def _null(cond: Condition | None, null_class: int | None) -> Condition | None:
    if cond is None or cond.label is None:
        return None
    if null_class is None:
        raise UserError("guidance needs the class that means none: give null_class")
    return Condition(label=torch.full_like(cond.label, null_class))
