"""Paths, predictions, and the process that joins them with a schedule."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_parts import EVERY_PATH, PREDICTIONS, SCHEDULES

from diffzoo.errors import UserError
from diffzoo.process import (
    X0,
    BoundaryV,
    Cosine,
    Eps,
    Flow,
    GaussianProcess,
    LinearLogSNR,
    LinearTime,
    LogSNRConditioning,
    Path,
    Prediction,
    TimeConditioning,
    V,
    expand_like,
    paths,
    predictions,
)

every_path = pytest.mark.parametrize("path", EVERY_PATH.values(), ids=EVERY_PATH)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
logsnrs = st.floats(-15, 15)
times = st.floats(0, 1)
FLOAT32_EPS = torch.finfo(torch.float32).eps


def process_of(path: Path, prediction: Prediction) -> GaussianProcess:
    return GaussianProcess(Cosine(-12, 12), path, prediction)


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(6, 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    return x, eps, torch.tensor([0.0, 0.02, 0.3, 0.5, 0.97, 1.0], dtype=dtype)


def test_every_class_is_listed() -> None:
    assert {getattr(paths, n) for n in paths.__all__} - {Path} == {type(p) for p in EVERY_PATH.values()}
    assert {getattr(predictions, n) for n in predictions.__all__} - {Prediction} == {
        type(p) for p in PREDICTIONS.values()
    }


# -- paths


@every_path
@given(value=logsnrs)
def test_coefficients_mean_this_logsnr_in_float32(path: Path, value: float) -> None:
    logsnr = torch.tensor(value, dtype=torch.float32)
    alpha, sigma = path.coefficients(logsnr)
    assert alpha.dtype == sigma.dtype == torch.float32
    exact = logsnr.double()
    error = 2 * torch.log(alpha.double() / sigma.double()) - exact
    # a relative error of d in alpha or sigma is an error of 2 d in log-SNR; the argument's own ulp counts too
    assert abs(float(error)) <= FLOAT32_EPS * (16 + 2 * abs(value))


@given(value=logsnrs)
def test_sums_that_define_the_paths(value: float) -> None:
    logsnr = torch.tensor(value, dtype=torch.float32)
    alpha, sigma = EVERY_PATH["preserving"].coefficients(logsnr)
    assert float(alpha.double() ** 2 + sigma.double() ** 2) == pytest.approx(1, abs=4 * FLOAT32_EPS)
    for name, noise in (("straight", 1), ("straight, twice the noise", 2)):
        alpha, sigma = EVERY_PATH[name].coefficients(logsnr)
        assert float(alpha.double() + sigma.double() / noise) == pytest.approx(1, abs=4 * FLOAT32_EPS)
    assert float(EVERY_PATH["exploding"].coefficients(logsnr)[0]) == 1


@every_path
@given(value=logsnrs)
def test_derivatives_are_autograd_s(path: Path, value: float) -> None:
    logsnr = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    for coefficient, derivative in zip(path.coefficients(logsnr), path.derivatives(logsnr), strict=True):
        grad = (
            torch.zeros(())
            if not coefficient.requires_grad
            else torch.autograd.grad(coefficient, logsnr, retain_graph=True)[0]
        )
        assert float(derivative.detach()) == pytest.approx(float(grad), rel=1e-9, abs=1e-15)


# -- predictions


@every_path
@every_prediction
def test_interpret_inverts_target(path: Path, prediction: Prediction) -> None:
    process, (x, eps, t) = process_of(path, prediction), data()
    estimate = process.interpret(process.target(x, eps, t), process.add_noise(x, eps, t), t)
    torch.testing.assert_close(estimate.x, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-9)


@every_path
@every_prediction
@pytest.mark.parametrize("other", PREDICTIONS.values(), ids=PREDICTIONS)
def test_converting_there_and_back_is_the_identity(path: Path, prediction: Prediction, other: Prediction) -> None:
    """For any output, right or wrong: an estimate is stated in another type and read back."""
    ours, theirs, (x, eps, t) = process_of(path, prediction), process_of(path, other), data()
    z = ours.add_noise(x, eps, t)
    output = ours.target(x, eps, t) + 0.1 * torch.randn_like(x)
    middle = theirs.target(*ours.interpret(output, z, t)[:2], t)
    back = ours.target(*theirs.interpret(middle, z, t)[:2], t)
    # the middle type may divide by alpha or sigma, down to 2.5e-3: digits go with them, float64 has plenty
    torch.testing.assert_close(back, output, rtol=0, atol=1e-8)
    if not isinstance(prediction, type(other)) and not isinstance(other, type(prediction)):
        wrong = theirs.interpret(output, z, t)
        assert not torch.allclose(wrong.x, ours.interpret(output, z, t).x, atol=1e-2), "types must differ"


@every_path
@every_prediction
@given(value=st.floats(-10, 10))
def test_estimates_always_explain_z(path: Path, prediction: Prediction, value: float) -> None:
    """Whatever the network says, alpha x_hat + sigma eps_hat = z."""
    process = process_of(path, prediction)
    t = process.schedule.time(torch.tensor([value], dtype=torch.float64))
    z, output = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64).unbind()
    estimate = process.interpret(output, z, t)
    torch.testing.assert_close(process.add_noise(estimate.x, estimate.eps, t), z, rtol=1e-9, atol=1e-9)


def test_determinants_are_the_documented_ones() -> None:
    logsnr = torch.linspace(-10, 10, 21, dtype=torch.float64)
    for path in EVERY_PATH.values():
        alpha, sigma = path.coefficients(logsnr)
        ratio = sigma / alpha
        boundary = BoundaryV(1e-4)
        table = {
            Eps(): alpha,
            X0(): -sigma,
            V(): alpha**2 + sigma**2,
            Flow(): alpha + sigma,
            boundary: sigma * (ratio**2 + 1).sqrt() / (ratio - boundary.ratio_min),
        }
        for prediction, want in table.items():
            torch.testing.assert_close(prediction.determinant(alpha, sigma), want)


def test_v_is_the_derivative_in_the_angle_and_flow_the_one_in_time() -> None:
    x, eps, _ = data()
    phi = torch.tensor(0.7, dtype=torch.float64)
    a, b = V().coefficients(phi.cos(), phi.sin())
    torch.testing.assert_close(a * x + b * eps, -phi.sin() * x + phi.cos() * eps)
    process = GaussianProcess(LinearTime(), EVERY_PATH["straight"], Flow())
    t, h = torch.tensor(0.4, dtype=torch.float64), 1e-6
    slope = (process.add_noise(x, eps, t + h) - process.add_noise(x, eps, t - h)) / (2 * h)
    # time is rescaled to the bounds, by two parts in 5e-4
    torch.testing.assert_close(process.target(x, eps, t), slope, rtol=3e-3, atol=3e-3)


# -- the process


EDM_PROCESS = GaussianProcess(
    LinearLogSNR(), prediction=V(), noise_conditioning=LogSNRConditioning(-1 / 8), data_scale=0.5, output_sign=-1
)


@given(log_sigma=st.floats(-6, 4.3))
def test_edm_is_v_on_scaled_data_with_the_sign_turned(log_sigma: float) -> None:
    """Preconditioning of arXiv:2206.00364, Table 1, written out."""
    x, eps, _ = data()
    sigma, d = torch.tensor(log_sigma, dtype=torch.float64).exp(), 0.5
    root = (sigma**2 + d**2).sqrt()
    c_skip, c_out, c_in, c_noise = d**2 / root**2, sigma * d / root, 1 / root, sigma.log() / 4
    t = EDM_PROCESS.schedule.time(-2 * sigma.log())
    noisy, output = x + sigma * eps, torch.randn_like(x)
    z = EDM_PROCESS.add_noise(x, eps, t)
    torch.testing.assert_close(z, c_in * noisy)
    torch.testing.assert_close(EDM_PROCESS.noise_level(t), c_noise)
    torch.testing.assert_close(EDM_PROCESS.interpret(output, z, t).x, c_skip * noisy + c_out * output)
    torch.testing.assert_close(EDM_PROCESS.target(x, eps, t), (x - c_skip * noisy) / c_out)


@given(log_sigma=st.floats(-6.2, 4.3))
def test_consistency_models_return_their_input_at_the_boundary(log_sigma: float) -> None:
    """The scalings of arXiv:2303.01469, appendix C, with sigma_min = 0.002."""
    process = replace(EDM_PROCESS, prediction=BoundaryV(0.002 / 0.5), schedule=LinearLogSNR(-9, 13))
    x, eps, _ = data()
    d, least = 0.5, 0.002
    sigma = torch.tensor(log_sigma, dtype=torch.float64).exp()
    c_skip = d**2 / ((sigma - least) ** 2 + d**2)
    c_out = (sigma - least) * d / (sigma**2 + d**2).sqrt()
    for level, skip, out in ((sigma, c_skip, c_out), (torch.tensor(least, dtype=torch.float64), 1.0, 0.0)):
        t = process.schedule.time(-2 * level.log())
        z, output = process.add_noise(x, eps, t), torch.randn_like(x)
        estimate = process.interpret(output, z, t)
        torch.testing.assert_close(estimate.x, skip * (x + level * eps) + out * output)
        torch.testing.assert_close(process.add_noise(estimate.x, estimate.eps, t), z)


@every_path
@every_prediction
@pytest.mark.parametrize(("scale", "sign"), [(0.5, -1), (3.0, 1)])
def test_scale_and_sign_are_those_of_the_data_and_the_output(
    path: Path, prediction: Prediction, scale: float, sign: Literal[1, -1]
) -> None:
    """The same as the plain process on data divided by the scale, at the log-SNR that this data has."""
    process = GaussianProcess(Cosine(-12, 12), path, prediction, data_scale=scale, output_sign=sign)
    x, eps, t = data()
    logsnr = process.logsnr(t) + 2 * math.log(scale)
    plain = process_of(path, prediction)
    plain = replace(plain, schedule=Cosine(float(logsnr[-1]), float(logsnr[0])))
    u = plain.schedule.time(logsnr)
    torch.testing.assert_close(process.add_noise(x, eps, t), plain.add_noise(x / scale, eps, u), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(process.target(x, eps, t), sign * plain.target(x / scale, eps, u), rtol=1e-6, atol=1e-8)
    estimate = process.interpret(process.target(x, eps, t), process.add_noise(x, eps, t), t)
    torch.testing.assert_close(estimate.x, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-9)
    slope = process.derivatives_at(process.logsnr(t))
    h = 1e-5
    ahead, behind = process.coefficients_at(process.logsnr(t) + h), process.coefficients_at(process.logsnr(t) - h)
    for ours, plus, minus in zip(slope, ahead, behind, strict=True):
        torch.testing.assert_close(ours, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-9)


def test_bad_arguments_of_scale_and_sign() -> None:
    for wrong in ({"data_scale": 0.0}, {"output_sign": 2}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GaussianProcess(**wrong)  # type: ignore[arg-type]


def test_float32_interpretation_of_v_is_precise_at_both_ends() -> None:
    process = GaussianProcess(Cosine(-15, 15), prediction=V())
    x, eps, t = data(torch.float32)
    estimate = process.interpret(process.target(x, eps, t), process.add_noise(x, eps, t), t)
    torch.testing.assert_close(estimate.x, x, rtol=0, atol=2e-6)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=2e-6)


@every_prediction
def test_learned_variance_is_split_off(prediction: Prediction) -> None:
    x, eps, t = data()
    plain = process_of(EVERY_PATH["preserving"], prediction)
    learned = GaussianProcess(plain.schedule, plain.path, prediction, learned_variance=True)
    z, out, extra = plain.add_noise(x, eps, t), torch.randn_like(x), torch.randn_like(x)
    estimate = learned.interpret(torch.cat([out, extra], 1), z, t)
    assert estimate.variance is not None
    torch.testing.assert_close(estimate.variance, extra)
    torch.testing.assert_close(estimate.x, plain.interpret(out, z, t).x)


def test_clip_keeps_the_estimate_consistent() -> None:
    process, (x, eps, t) = process_of(EVERY_PATH["preserving"], V()), data()
    z = process.add_noise(x, eps, t)
    clipped = process.clip(process.interpret(process.target(x, eps, t), z, t), z, t, 0.5)
    assert float(clipped.x.abs().max()) == 0.5
    torch.testing.assert_close(process.add_noise(clipped.x, clipped.eps, t), z)


@given(u=times)
def test_readings(u: float) -> None:
    t = torch.tensor([u], dtype=torch.float64)
    process = GaussianProcess(Cosine(), noise_conditioning=LogSNRConditioning())
    torch.testing.assert_close(process.noise_level(t), process.logsnr(t))
    torch.testing.assert_close(
        GaussianProcess(noise_conditioning=TimeConditioning(8.0, -4.0)).noise_level(t), 8 * t - 4
    )


def test_one_time_for_all_or_one_each() -> None:
    process, (x, eps, _) = process_of(EVERY_PATH["straight"], V()), data()
    t = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(process.add_noise(x, eps, t), process.add_noise(x, eps, t.expand(len(x))))
    assert expand_like(t, x).shape == ()  # a kernel takes it as an argument
    assert expand_like(t.expand(len(x)), x).shape == (len(x), 1, 1, 1)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and \(1, 3, 8, 8\)"):
        GaussianProcess().add_noise(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8), torch.zeros(1))


def test_predictions_that_divide_by_zero_are_refused() -> None:
    with pytest.raises(UserError, match="divides by zero"):
        GaussianProcess(Cosine(-15, 40), prediction=X0())
    for schedule in SCHEDULES.values():
        for prediction in PREDICTIONS.values():
            GaussianProcess(schedule, prediction=prediction)
