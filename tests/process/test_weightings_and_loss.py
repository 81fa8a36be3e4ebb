"""Weightings, and the loss that converts them to every prediction."""

import math

import pytest
import torch
from process_parts import EVERY_PATH, PREDICTIONS, SCHEDULES, WEIGHTINGS

from diffzoo.errors import UserError
from diffzoo.process import (
    EDM,
    ELBO,
    X0,
    Cosine,
    Eps,
    GaussianProcess,
    LinearTime,
    MinSNR,
    Path,
    Prediction,
    Shifted,
    Sigmoid,
    Straight,
    UniformEps,
    UniformFlow,
    UniformV,
    V,
    Weighting,
    denoising_loss,
    pool_target,
    weight,
    weightings,
)

LOGSNR = torch.linspace(-10, 10, 41, dtype=torch.float64)


def example(process: GaussianProcess) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x, eps, error = (torch.randn(5, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    return x, eps, error, t, process.add_noise(x, eps, t)


def test_every_class_is_listed() -> None:
    classes = {getattr(weightings, n) for n in weightings.__all__} - {Weighting}
    assert classes == {type(w) for w in WEIGHTINGS.values()}


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_weights_are_positive_and_finite(weighting: Weighting) -> None:
    w = weighting(LOGSNR)
    assert w.shape == LOGSNR.shape
    assert (w > 0).all()
    assert torch.isfinite(w).all()


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_uniform_flow_is_the_mean_squared_error_of_the_velocity(noise: float) -> None:
    """JiT's loss, written out: prediction and data are both turned into a velocity by max(1 - t, 0.05)."""
    process = GaussianProcess(LinearTime(-20, 20), Straight(noise), X0())
    x, eps, error, t, _ = example(process)
    t = torch.tensor([0.01, 0.04, 0.3, 0.7, 0.95], dtype=torch.float64)
    z = process.add_noise(x, eps, t)
    u = process.coefficients(t)[1].reshape(-1, 1, 1, 1) / noise
    velocity, target = ((data - z) / u.clamp_min(0.05) for data in (x + error, x))
    loss = denoising_loss(process, UniformFlow(0.05, noise), (x + error,), x, eps, t)
    torch.testing.assert_close(loss, (velocity - target).square().flatten(1).mean(1))


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("path", EVERY_PATH.values(), ids=EVERY_PATH)
def test_loss_of_one_estimate_is_the_same_for_every_prediction(weighting: Weighting, path: Path) -> None:
    losses = []
    for prediction in PREDICTIONS.values():
        process = GaussianProcess(Cosine(-12, 12), path, prediction)
        x, eps, error, t, z = example(process)
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in process.coefficients(t))
        eps_hat = eps + 0.3 * error
        output = process.target((z - sigma * eps_hat) / alpha, eps_hat, t)
        losses.append(denoising_loss(process, weighting, (output,), x, eps, t))
        # written out: w(logsnr) times the measure times the mean squared error of eps
        measure = -process.schedule.derivative(t) if weighting.measure == "logsnr" else 1.0
        want = weighting(process.logsnr(t)) * measure * (0.3 * error).square().mean((1, 2, 3))
        torch.testing.assert_close(losses[-1], want)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


# -- each weighting in the form in which its paper states it


def plain_mse(prediction: Prediction, weighting: Weighting) -> tuple[torch.Tensor, torch.Tensor, GaussianProcess]:
    process = GaussianProcess(Cosine(-12, 12), prediction=prediction)
    x, eps, error, t, _ = example(process)
    out = process.target(x, eps, t) + 0.3 * error
    return denoising_loss(process, weighting, (out,), x, eps, t), (0.3 * error).square().mean((1, 2, 3)), process


def test_uniform_weights_are_the_mean_squared_error_of_their_type() -> None:
    for prediction, weighting in ((Eps(), UniformEps()), (V(), UniformV())):
        loss, mse, _ = plain_mse(prediction, weighting)
        torch.testing.assert_close(loss, mse)


def test_min_snr_on_x0() -> None:
    loss, mse, process = plain_mse(X0(), MinSNR(5.0))
    snr = process.logsnr(torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)).exp()
    torch.testing.assert_close(loss, snr.clamp_max(5.0) * mse)


def test_sigmoid_on_x0_is_the_other_published_form() -> None:
    loss, mse, process = plain_mse(X0(), Sigmoid(2.0))
    t = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    logsnr = process.logsnr(t)
    want = -process.schedule.derivative(t) * math.e**2 * torch.sigmoid(logsnr - 2.0) * mse
    torch.testing.assert_close(loss, want)


def test_edm_is_its_loss_weight_times_its_density() -> None:
    """Sampled as in the paper, ln sigma normal and weight (sigma^2 + s^2) / (sigma s)^2 on x, by quadrature."""
    mean, std, s = -1.2, 1.2, 0.5
    log_sigma = torch.linspace(mean - 9 * std, mean + 9 * std, 4001, dtype=torch.float64)
    sigma = log_sigma.exp()
    density = torch.exp(-0.5 * ((log_sigma - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    x_error = sigma**2 / (1 + sigma**2)  # any function of the noise level will do
    want = torch.trapezoid(density * (sigma**2 + s**2) / (sigma * s) ** 2 * x_error, log_sigma)
    logsnr = -2 * log_sigma
    eps_error = x_error / sigma**2
    got = torch.trapezoid((EDM(mean, std, s)(logsnr) * eps_error).flip(0), logsnr.flip(0))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("weighting", [ELBO(), Sigmoid(0.0), EDM()], ids=["elbo", "sigmoid", "edm"])
def test_the_logsnr_measure_makes_the_schedule_irrelevant(weighting: Weighting) -> None:
    """The integral over t of w m f(logsnr) is the same for schedules with the same ends, and not for "time"."""

    def integral(name: str, w: Weighting) -> float:
        process = GaussianProcess(SCHEDULES[name])
        t = torch.linspace(0, 1, 200001, dtype=torch.float64)
        eps_error = torch.sigmoid(process.logsnr(t)) * torch.sigmoid(-process.logsnr(t))
        return float(torch.trapezoid(weight(process, w, t) * eps_error, t))

    assert integral("cosine", weighting) == pytest.approx(integral("linear time", weighting), rel=1e-3)
    timed = Sigmoid(0.0, "time")
    assert integral("cosine", timed) != pytest.approx(integral("linear time", timed), rel=1e-2)


def test_unknown_measure() -> None:
    with pytest.raises(UserError, match="'time', 'logsnr'"):
        Sigmoid(0.0, "lambda")  # type: ignore[arg-type]


# -- several resolutions


@pytest.mark.parametrize("prediction", [Eps(), V()], ids=["eps", "v"])
def test_multiscale_loss_restated(prediction: Prediction) -> None:
    process = GaussianProcess(Shifted(Cosine(-12, 12), 32, 64), prediction=prediction)
    x, eps, error, t, z = example(process)
    out = process.target(x, eps, t) + 0.3 * error
    loss = denoising_loss(process, UniformEps(), (out,), x, eps, t, resolutions=(4, 8, 16))
    eps_hat = process.interpret(out, z, t).eps
    want = torch.zeros(5, dtype=torch.float64)
    for b in range(5):
        for s in (4, 8, 16):
            r = 16 // s
            total = 0.0
            for c in range(3):
                for i in range(s):
                    for j in range(s):
                        block = slice(i * r, i * r + r), slice(j * r, j * r + r)
                        total += float(eps[b, c][block].mean() - eps_hat[b, c][block].mean()) ** 2
            want[b] += total / (3 * s * s) / s
    torch.testing.assert_close(loss, want)


def test_multiscale_loss_at_full_resolution_alone_is_the_plain_one_over_the_size() -> None:
    process = GaussianProcess(LinearTime())
    x, eps, error, t, _ = example(process)
    plain = denoising_loss(process, UniformEps(), (error,), x, eps, t)
    torch.testing.assert_close(
        denoising_loss(process, UniformEps(), (error,), x, eps, t, resolutions=(16,)), plain / 16
    )


def test_pooled_targets_keep_unit_variance_noise_and_blocks() -> None:
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(pool_target(noise, 4).std()) == pytest.approx(1, abs=0.03)
    assert pool_target(noise, 1) is noise
    torch.testing.assert_close(pool_target(noise, 2)[0, 0, 0, 0], noise[0, 0, :2, :2].sum() / 2)


def test_several_outputs_have_pooled_targets() -> None:
    process = GaussianProcess(prediction=Eps())
    x, eps, _, t, _ = example(process)
    outputs = [torch.zeros(5, 3, 8, 8, dtype=torch.float64), torch.zeros(5, 3, 16, 16, dtype=torch.float64)]
    coarse, fine = pool_target(eps, 2).square().mean((1, 2, 3)), eps.square().mean((1, 2, 3))
    loss = denoising_loss(process, UniformEps(), outputs, x, eps, t)
    torch.testing.assert_close(loss, coarse / 4 + fine)
    loss = denoising_loss(process, UniformEps(), outputs, x, eps, t, coefficients=(1.0, 0.0))
    torch.testing.assert_close(loss, coarse)
    perfect = denoising_loss(process, UniformEps(), [pool_target(eps, 2), eps], x, eps, t)
    assert float(perfect.abs().max()) == 0


def test_misfits_are_named() -> None:
    process = GaussianProcess()
    x, eps, out, t, _ = example(process)
    for bad, arguments, words in [
        ([out], {"resolutions": (5,)}, "resolution 5 does not divide"),
        ([out[..., :13, :]], {"resolutions": (8,)}, r"resolution 8 does not divide the image size 13 x 16"),
        ([out], {"resolutions": (32,)}, "resolution 32 does not divide"),
        ([out, out], {"resolutions": (8,)}, "one output, this network has 2"),
        ([out], {"coefficients": (1.0, 2.0)}, "expected 1 loss coefficients"),
        ([out[..., :7, :7]], {}, r"\(5, 3, 7, 7\) does not fit"),
        ([out[:, :2]], {}, r"\(5, 2, 16, 16\) does not fit"),
        ([out[..., ::2, ::2]], {}, r"\(5, 3, 8, 8\), its input \(5, 3, 16, 16\)"),
    ]:
        h = bad[0].shape[2] if "resolutions" in arguments else 16
        with pytest.raises(ValueError, match=words):
            denoising_loss(process, UniformEps(), bad, x[:, :, :h], eps[:, :, :h], t, **arguments)  # type: ignore[arg-type]
