"""Terms of the loss beside the denoising loss: what a step of training gives is what the papers write."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models import dit, edm2
from diffzoo.models.base import Network
from diffzoo.models.dit import DiT
from diffzoo.models.edm2 import EDM2UNet
from diffzoo.process import (
    EDMWeight,
    Flow,
    GaussianProcess,
    LinearLogSNR,
    LinearTime,
    LogNormalSigma,
    LogSNRConditioning,
    Straight,
    UniformFlow,
    V,
)
from diffzoo.training import Alignment, CosineDirection, DiffusionModule, LearnedUncertainty, TimmEncoder
from diffzoo.training.extra_losses import ImageEncoder
from diffzoo.typing import Condition

FLOW = GaussianProcess(LinearTime(-20, 20), Straight(), Flow())
T = torch.tensor([0.2, 0.7])


def data(network: Network) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(2)
    shape = (2, network.config.in_channels, network.config.image_size, network.config.image_size)
    x, eps = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, eps, Condition(label=torch.tensor([1, 3]))


class Average(ImageEncoder):
    """A frozen encoder in miniature: the mean colour of a grid of 8 x 8 cells, in five channels."""

    width = 5

    def __init__(self) -> None:
        self.matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))

    def to(self, device: torch.device) -> "Average":
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 8).flatten(2).mT @ self.matrix.T


def test_cosine_direction_is_added() -> None:
    network = perturbed(DiT(dit.TINY))
    x, eps, cond = data(network)
    common: dict[str, Any] = {"process": FLOW, "weighting": UniformFlow()}
    plain = DiffusionModule(network, **common).losses(x, eps, T, cond)
    with_term = DiffusionModule(network, **common, extra_losses=[CosineDirection(0.5)]).losses(x, eps, T, cond)
    z = FLOW.add_noise(x, eps, T)
    output, target = network(z, FLOW.noise_level(T), cond), eps - x
    unit = [v / v.square().sum(1, keepdim=True).sqrt() for v in (output, target)]
    cosine = (unit[0] * unit[1]).sum(1).mean((1, 2))
    torch.testing.assert_close(with_term, plain + 0.5 * (1 - cosine))
    torch.testing.assert_close(plain, (output - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_alignment_compares_with_a_frozen_encoder_of_the_clean_images_and_trains_the_projector() -> None:
    network = perturbed(DiT(dit.TINY.override(projector_width=5, projector_depth=2, projector_hidden=16)))
    x, eps, cond = data(network)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    common: dict[str, Any] = {"process": FLOW, "weighting": UniformFlow()}
    module = DiffusionModule(network, **common, extra_losses=[Alignment(Average(), 0.5)])
    loss = module.losses(x, eps, T, cond, images)
    plain = DiffusionModule(network, **common).losses(x, eps, T, cond)
    _, tokens = network.aligned(FLOW.add_noise(x, eps, T), FLOW.noise_level(T), cond)
    want = Average()(images)
    cosine = (tokens * want).sum(-1) / (tokens.norm(dim=-1) * want.norm(dim=-1))
    torch.testing.assert_close(loss, plain - 0.5 * cosine.mean(1))
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.projector.parameters())
    with pytest.raises(UserError, match="gives latents alone"):
        module.losses(x, eps, T, cond)


def test_learned_uncertainty_weighs_the_plain_error_of_the_output() -> None:
    network = perturbed(EDM2UNet(replace(edm2.TINY, uncertainty=True))).eval()
    process = GaussianProcess(
        LinearLogSNR(-10, 10), prediction=V(), noise_conditioning=LogSNRConditioning(-1 / 8), data_scale=0.5,
        output_sign=-1,
    )  # fmt: skip
    x, eps, cond = data(network)
    x = 0.5 * x
    module = DiffusionModule(
        network, process=process, weighting=EDMWeight(), time_density=LogNormalSigma(-0.8, 1.6),
        extra_losses=[LearnedUncertainty()],
    )  # fmt: skip
    module.eval()
    loss = module.losses(x, eps, T, cond)
    sigma = torch.exp(-process.logsnr(T) / 2).reshape(-1, 1, 1, 1)  # EDM's own coordinates and formulas from here on
    noisy, spread = x + sigma * eps, (sigma**2 + 0.25).sqrt()
    level = sigma.flatten().log() / 4
    output = network(noisy / spread, level, cond)
    denoised = 0.25 / spread**2 * noisy + sigma * 0.5 / spread * output
    error = ((spread / (0.5 * sigma)) ** 2 * (denoised - x) ** 2).mean((1, 2, 3))
    u = network.log_variance(level)
    torch.testing.assert_close(loss, error / u.exp() + u, rtol=1e-3, atol=1e-5)
    loss.sum().backward()
    assert network.uncertainty.weight.grad.any()


def test_timm_gives_the_normalised_tokens_of_patches_row_by_row() -> None:
    encoder = TimmEncoder("test_vit", size=64, pretrained=False)
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    tokens = encoder(images)
    assert tokens.shape == (2, 16, encoder.width)
    small = F.interpolate(images, (64, 64), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(encoder.model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        whole = encoder.model.forward_features((small / 2 + 0.5 - mean) / std)
    torch.testing.assert_close(tokens, whole[:, -16:])
    assert not any(p.requires_grad for p in encoder.model.parameters())


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        (Alignment(Average()), r"needs a projector to the 5 channels .*projector_width: 5"),
        (LearnedUncertainty(), r"needs a network that learns its uncertainty, EDM2"),
    ],
)
def test_a_network_that_does_not_fit_is_a_sentence(term: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DiffusionModule(DiT(dit.TINY), extra_losses=[term])
