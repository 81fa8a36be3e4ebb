"""Respaced samplers, classifier guidance and upsampling against independent formulas and exact oracles."""

import pytest
import torch
from networks import perturbed
from oracles import GaussianOracle, MixtureOracle, Replay
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.adm import TINY, TINY_CLASSIFIER, ADMClassifier, ADMUNet
from diffzoo.process import Cosine, DiscreteBetas, Eps, Estimate, GaussianProcess, TimeConditioning, expand_like
from diffzoo.sampling import (
    DDIM,
    Ancestral,
    ClassifierFree,
    ClassifierGuidance,
    Denoiser,
    Respaced,
    RespacedAncestral,
    RespacedDDIM,
    integrate,
    sample,
    upsample,
)
from diffzoo.sampling.upsample import quantise
from diffzoo.typing import Condition

LINEAR = GaussianProcess(DiscreteBetas("linear"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0))
COSINE = GaussianProcess(DiscreteBetas("cosine"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0))
LEARNED = GaussianProcess(
    DiscreteBetas("linear"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0), learned_variance=True
)


def tiny(**options: object) -> Denoiser:
    return Denoiser(perturbed(ADMUNet(TINY.override(**options)).eval(), 0.05), LEARNED)


# -- grids


def test_the_network_reads_whole_original_indices() -> None:
    for sampler, want in (
        (RespacedAncestral(steps=25), [999, 957, 916]),
        (RespacedDDIM(steps=25), [960, 920, 880]),
        (RespacedAncestral(steps=250, grid=Respaced(respacing="90,60,60,20,20")), [999, 989, 978]),
    ):
        times = sampler.times(LINEAR)
        read = LINEAR.noise_level(times[:-1]).float()
        assert read[:3].tolist() == want
        assert torch.equal(read, read.round())
        assert (read[-1], times[-1]) == (0, 0)
        assert len(times) == sampler.steps + 1


@pytest.mark.parametrize(
    ("sampler", "process", "message"),
    [
        (RespacedDDIM(steps=37), LINEAR, "'ddim36' or 'ddim38'"),
        (RespacedAncestral(steps=2000), LINEAR, "cannot keep 2000 of 1000"),
        (RespacedAncestral(steps=250, grid=Respaced(respacing="100")), LINEAR, "keeps 100 steps, got steps=250"),
        (RespacedAncestral(steps=5), GaussianProcess(Cosine()), "DiscreteBetas"),
    ],
)
def test_grids_that_do_not_fit(sampler: RespacedAncestral, process: GaussianProcess, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler.times(process)


def test_an_unknown_variance_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'fixed_large'"):
        RespacedAncestral(variance="fixed_larg")  # type: ignore[arg-type]


# -- samplers


@pytest.mark.parametrize("process", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize(("variance", "gamma"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_fixed_variances_are_ancestral_sampling_in_logsnr(
    process: GaussianProcess, variance: str, gamma: float
) -> None:
    grid, steps = Respaced(), 12
    z, draws = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.randn(steps, 3, 1, 2, 2, dtype=torch.float64)
    oracle = GaussianOracle(process)
    ours = RespacedAncestral(steps, grid, clip=None, variance=variance)  # type: ignore[arg-type]
    theirs = Ancestral(steps, grid, clip=None, final="x_hat", gamma=gamma)
    got, want = (integrate(oracle, sampler, z, Replay(draws)) for sampler in (ours, theirs))
    # the other formulas go through a log-SNR, which is capped at 20; the cosine table ends at 19.84
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_learned_variance_draws_between_the_bounds() -> None:
    class Learned(GaussianOracle):
        v = -1.0

        def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
            return super().__call__(z, t, cond)._replace(variance=torch.full_like(z, self.v))

    oracle, z, draws = Learned(LINEAR), torch.randn(2, 1, 2, 2), torch.randn(6, 2, 1, 2, 2)
    for v, kind in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        oracle.v = v
        want = integrate(oracle, RespacedAncestral(6, clip=None, variance=kind), z, Replay(draws))  # type: ignore[arg-type]
        torch.testing.assert_close(integrate(oracle, RespacedAncestral(6, clip=None), z, Replay(draws)), want)


def test_ddim_ends_at_what_it_believes() -> None:
    oracle, z = GaussianOracle(LINEAR), torch.randn(2, 1, 2, 2)
    plain = integrate(oracle, DDIM(25, Respaced(respacing="ddim")), z, Replay(torch.empty(0)))
    assert torch.equal(integrate(oracle, RespacedDDIM(25, clip=None), z, Replay(torch.empty(0))), plain)
    # clipping acts: the oracle's data reach beyond 0.5
    assert integrate(oracle, RespacedDDIM(25, clip=0.5), z, Replay(torch.empty(0))).abs().max() <= 0.5


@pytest.mark.parametrize("sampler", [RespacedAncestral(6), RespacedDDIM(10), RespacedDDIM(10, eta=1.0)], ids=str)
def test_images_depend_on_their_own_seed(sampler: RespacedAncestral) -> None:
    denoise, cond = tiny(), Condition(label=torch.tensor([1, 2, 3]))
    together = sample(denoise, sampler, (3, 16, 16), [7, 8, 9], cond)
    alone = sample(denoise, sampler, (3, 16, 16), [9], cond[2:])
    assert together.shape == (3, 3, 16, 16)
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-4)


# -- classifier guidance


class Bayes(nn.Module):
    """The exact p(y | z, t) of a mixture."""

    def __init__(self, oracle: MixtureOracle):
        super().__init__()
        self.oracle, self.calls = oracle, 0

    def forward(self, z: Tensor, noise_level: Tensor) -> Tensor:
        self.calls += 1
        o = self.oracle
        alpha, sigma = (c[:, None] for c in o.process.coefficients((noise_level.double() + 1) / 1000))
        variance = alpha**2 * o.stds**2 + sigma**2
        square = (z.flatten(1).double()[:, None] - alpha[:, :, None] * o.means).square().sum(2)
        return o.weights.log() - square / (2 * variance) - z[0].numel() / 2 * variance.log()


def mixture(process: GaussianProcess = LINEAR) -> MixtureOracle:
    means = torch.tensor([[0.5, 0.5, 0.0, 0.2], [-0.5, 0.1, 0.3, 0.0], [0.0, -0.6, 0.2, -0.4]])
    return MixtureOracle(process, torch.tensor([0.5, 0.3, 0.2]), means, torch.tensor([0.3, 0.2, 0.4]))


def test_an_exact_classifier_turns_the_marginal_into_the_conditional() -> None:
    oracle = mixture()
    guided = ClassifierGuidance(oracle, Bayes(oracle), 1.0, conditional=False)
    cond = Condition(label=torch.tensor([0, 1, 2, 1]))
    for t in (0.05, 0.4, 0.9):
        z, time = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
        want = oracle(z, time, cond)
        for name, got in guided(z, time, cond)._asdict().items():
            if name != "variance":
                torch.testing.assert_close(got, getattr(want, name), rtol=1e-4, atol=1e-5)
    # scale 2 is the same distance again
    far = ClassifierGuidance(oracle, Bayes(oracle), 2.0, conditional=False)(z, time, cond)
    torch.testing.assert_close(far.eps - want.eps, want.eps - oracle(z, time).eps, rtol=1e-3, atol=1e-5)


def test_ancestral_guidance_moves_the_mean_by_variance_times_score() -> None:
    oracle, z, cond = mixture(), torch.randn(2, 1, 2, 2), Condition(label=torch.tensor([0, 2]))
    guided = ClassifierGuidance(oracle, Bayes(oracle), 3.0, conditional=False)
    sampler = RespacedAncestral(10, clip=0.1, variance="fixed_large")

    class Settled:
        process = LINEAR

        def parts(self, z: Tensor, t: Tensor) -> tuple[Estimate, Tensor | None]:
            return guided.parts(z, t, cond)

        def __call__(self, z: Tensor, t: Tensor) -> Estimate:
            return oracle(z, t)

    t, s = sampler.times(LINEAR)[3:5]
    draw = torch.randn(1, 2, 1, 2, 2)
    plain = RespacedAncestral(10, variance="fixed_large").step(oracle, z, t, s, None, Replay(draw))[0]
    moved = sampler.step(Settled(), z, t, s, None, Replay(draw))[0]
    abar_t, abar_s = (LINEAR.coefficients(v)[0] ** 2 for v in (t, s))
    torch.testing.assert_close(moved - plain, ((1 - abar_t / abar_s) * guided.score(z, t, cond)).float())


def test_guidance_acts_after_clipping() -> None:
    oracle, cond = mixture(), Condition(label=torch.tensor([0, 1]))
    guided = ClassifierGuidance(oracle, Bayes(oracle), 50.0, conditional=False)
    z = torch.randn(2, 1, 2, 2)
    out = integrate(guided, RespacedDDIM(1, clip=1e-3), z, Replay(torch.empty(0)), cond)
    t = torch.tensor(1 / 1000, dtype=torch.float64)
    alpha, sigma = (expand_like(c, z) for c in LINEAR.coefficients(t))
    clipped = oracle(z, t).x.clamp(-1e-3, 1e-3)
    torch.testing.assert_close(out, clipped + sigma**2 / alpha * guided.score(z, t, cond))
    assert out.abs().max() > 1e-3


def test_scale_zero_asks_no_classifier() -> None:
    oracle = mixture()
    classifier = Bayes(oracle)
    z, t = torch.randn(2, 1, 2, 2), torch.tensor(0.5, dtype=torch.float64)
    got = ClassifierGuidance(oracle, classifier, 0.0)(z, t, None)
    assert torch.equal(got.x, oracle(z, t).x)
    assert classifier.calls == 0


def test_guidance_around_classifier_free_guidance_keeps_rows() -> None:
    oracle, label = mixture(), torch.tensor([0, 1, 2])
    inner = ClassifierFree(oracle, torch.tensor([1.5, 2.0, 3.0]))
    guided = ClassifierGuidance(inner, Bayes(oracle), 1.0)
    z, t = torch.randn(3, 1, 2, 2), torch.tensor(0.5, dtype=torch.float64)
    whole = guided(z, t, Condition(label=label))
    part = guided.rows(slice(1, 3))(z[1:], t, Condition(label=label[1:]))
    torch.testing.assert_close(whole.x[1:], part.x)


def test_guidance_of_real_networks() -> None:
    classifier = ADMClassifier(TINY_CLASSIFIER).eval()
    cond = Condition(label=torch.tensor([1, 2]))
    for conditional in (True, False):
        denoise = tiny(num_classes=10 if conditional else 0)
        guided = ClassifierGuidance(denoise, classifier, 2.0, conditional=conditional)
        out = sample(guided, RespacedAncestral(3), (3, 16, 16), [1, 2], cond)
        plain = sample(denoise, RespacedAncestral(3), (3, 16, 16), [1, 2], cond if conditional else None)
        assert out.isfinite().all()
        assert not torch.equal(out, plain)
    assert all(p.grad is None for p in classifier.parameters())


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, "needs class labels"),
        (Condition(text=torch.zeros(2, 1, 1)), "needs class labels"),
        (Condition(label=torch.tensor([0, 10])), "class 10 is out of range: the classifier knows classes 0 to 9"),
        (Condition(label=torch.tensor([-1, 1])), "class -1 is out of range"),
    ],
)
def test_classes_that_do_not_fit(cond: Condition | None, message: str) -> None:
    guided = ClassifierGuidance(mixture(), ADMClassifier(TINY_CLASSIFIER), 1.0, conditional=False)
    with pytest.raises(UserError, match=message):
        guided.score(torch.zeros(2, 3, 16, 16), torch.tensor(0.5), cond)


# -- upsampling


def test_quantised_images_are_image_files() -> None:
    pixels = torch.arange(256)
    assert torch.equal(((quantise(pixels / 127.5 - 1) + 1) * 127.5).round().long(), pixels)
    assert quantise(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]
    # cut down, not rounded: the value of 200.9 becomes that of 200
    assert float(quantise(torch.tensor(200.9 / 127.5 - 1))) == pytest.approx(200 / 127.5 - 1)


def test_a_chain_of_two_models() -> None:
    small, large = tiny(), tiny(upsampler=True, image_size=32)
    label, seeds = torch.tensor([1, 2]), [3, 4]
    images = sample(small, RespacedAncestral(3), (3, 16, 16), seeds, Condition(label=label))
    out = upsample(large, RespacedAncestral(3), images, (3, 32, 32), seeds, label)
    assert out.shape == (2, 3, 32, 32)
    # it looks at the small image
    other = upsample(large, RespacedAncestral(3), -images, (3, 32, 32), seeds, label)
    assert not torch.allclose(out, other)
    alone = upsample(large, RespacedAncestral(3), images[1:], (3, 32, 32), seeds[1:], label[1:])
    torch.testing.assert_close(out[1:], alone, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match=r"\(n, 3, h, w\), got \(2, 1, 16, 16\)"):
        upsample(large, RespacedAncestral(3), images[:, :1], (3, 32, 32), seeds, label)
