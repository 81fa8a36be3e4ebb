"""The loop: image i depends on seed i and condition i alone; memory, precision, progress, trajectories."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle, Replay
from torch import Tensor, nn

from diffzoo import images
from diffzoo.errors import UserError
from diffzoo.images import LINE
from diffzoo.process import Cosine, Estimate, GaussianProcess, LogSNRConditioning, Straight, V, VarianceExploding
from diffzoo.rng import ImageNoise
from diffzoo.sampling import (
    DDIM,
    DEIS,
    LMS,
    AdjustedDDIM,
    Ancestral,
    Autoguidance,
    ClassifierFree,
    Denoiser,
    DPMSolver,
    DPMSolverAncestral,
    DPMSolverMultistep,
    DPMSolverSDE,
    EulerMaruyama,
    Heun,
    Interval,
    Moment,
    Sampler,
    Trajectory,
    UniformLogSNR,
    UniformTime,
    UniPC,
    integrate,
    sample,
)
from diffzoo.typing import Condition

SHAPE = (2, 4, 4)
SEEDS = [3, 14, 15, 92, 65, 3, 2**40]
SAMPLERS: dict[str, Sampler] = {
    "ancestral": Ancestral(6),
    "DDIM": DDIM(6),
    "DDIM, eta 1": DDIM(6, eta=1.0),
    "aDDIM": AdjustedDDIM(6),
    "fast": DPMSolver(7),
    "2M": DPMSolverMultistep(6),
    "SDE 2M": DPMSolverMultistep(6, eta=1.0),
    "DEIS": DEIS(6),
    "UniPC": UniPC(6),
    "LMS": LMS(6),
    "DPM++ SDE": DPMSolverSDE(6),
    "2S, ancestral": DPMSolverAncestral(6),
    "Heun with churn": Heun(6, churn=3.0),
    "Euler-Maruyama": EulerMaruyama(6, UniformTime(0.95), diffusion="sigma"),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def test_noise_does_not_follow_the_default_dtype() -> None:
    want = ImageNoise([1, 2]).normal((3, 4))
    torch.set_default_dtype(torch.float64)
    try:
        got, none = ImageNoise([1, 2]).normal((3, 4)), ImageNoise([]).normal((3, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert (none.shape, none.dtype) == ((0, 3, 4), torch.float32)


class TinyNetwork(nn.Module):
    """Classes, a convolution, and the noise level: enough to mix up images, conditions or levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.table = nn.Embedding(4, 2)
        self.batches: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, z: Tensor, noise_level: Tensor, cond: Condition | None = None) -> Tensor:
        assert noise_level.shape == (len(z),)
        self.batches.append(len(z))
        out = torch.tanh(self.conv(z))
        self.dtypes.add(self.conv(z).dtype)
        if cond is not None and cond.label is not None:
            out = out + self.table(cond.label)[:, :, None, None] + 0.01 * noise_level[:, None, None, None]
        return out

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return None if cond is None or cond.label is None else Condition(label=torch.full_like(cond.label, 3))


def denoiser() -> Denoiser:
    return Denoiser(
        TinyNetwork(), GaussianProcess(Cosine(-9, 9), prediction=V(), noise_conditioning=LogSNRConditioning())
    )


def labels() -> Condition:
    return Condition(label=torch.tensor([0, 1, 2, 0, 1, 2, 0]))


# -- invariance


@every_sampler
def test_images_do_not_depend_on_batch_size_order_or_company(sampler: Sampler) -> None:
    whole = sample(denoiser(), sampler, SHAPE, SEEDS, labels())
    parts = sample(denoiser(), sampler, SHAPE, SEEDS, labels(), batch_size=4)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
    order = torch.tensor([4, 0, 6, 2])
    some = sample(denoiser(), sampler, SHAPE, [SEEDS[i] for i in order], labels()[order])
    torch.testing.assert_close(some, whole[order], rtol=0, atol=2e-5)


@every_sampler
def test_images_do_not_depend_on_the_number_of_devices(sampler: Sampler) -> None:
    """Ranks take turns, as a distributed run deals out seeds; what they drew before plays no part."""
    whole = sample(denoiser(), sampler, SHAPE, SEEDS, labels())
    got, ranks = torch.empty_like(whole), 3
    for rank in range(ranks):
        torch.manual_seed(1000 + rank)
        torch.randn(rank + 1)
        mine = torch.arange(rank, len(SEEDS), ranks)
        got[mine] = sample(denoiser(), sampler, SHAPE, [SEEDS[i] for i in mine], labels()[mine], batch_size=2)
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-5)


@every_sampler
def test_seeds_and_conditions_matter(sampler: Sampler) -> None:
    whole = sample(denoiser(), sampler, SHAPE, SEEDS, labels())
    assert not torch.allclose(whole[0], whole[3], atol=1e-2), "another seed, the same class"
    same = sample(denoiser(), sampler, SHAPE, [7] * 7, labels())
    torch.testing.assert_close(same[0], same[3], rtol=0, atol=2e-5)
    assert not torch.allclose(same[0], same[1], atol=1e-3), "another class, the same seed"


@every_sampler
def test_exactly_equal_where_the_denoiser_is(sampler: Sampler) -> None:
    """With a denoiser that works pixel by pixel not one bit depends on the batch."""
    oracle = GaussianOracle(GaussianProcess(Cosine(-9, 9)))
    whole = sample(oracle, sampler, SHAPE, SEEDS)
    assert torch.equal(sample(oracle, sampler, SHAPE, SEEDS, batch_size=1), whole)
    assert torch.equal(sample(oracle, sampler, SHAPE, SEEDS), whole), "and nothing is drawn from global randomness"


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_and_no_images(sampler: Sampler, steps: int) -> None:
    x = sample(denoiser(), replace(sampler, steps=steps), SHAPE, SEEDS, labels())
    assert x.shape == (len(SEEDS), *SHAPE)
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"
    assert torch.isfinite(x).all()
    assert sample(denoiser(), sampler, SHAPE, []).shape == (0, *SHAPE)


# -- start and end


@pytest.mark.parametrize("path", [Straight(), VarianceExploding()], ids=["straight", "exploding"])
def test_start_has_the_scale_of_the_path(path: object) -> None:
    oracle = GaussianOracle(GaussianProcess(Cosine(-9, 9), path), mean=0.0, std=1.0)  # type: ignore[arg-type]
    seen: list[Moment] = []
    sample(oracle, DDIM(2), (1, 16, 16), range(40), trajectory=seen.append)
    alpha, sigma = oracle.process.coefficients(torch.tensor(1.0))
    assert float(seen[0].z.std()) == pytest.approx(float((alpha**2 + sigma**2).sqrt()), rel=0.03)


def test_given_start_is_used() -> None:
    start = torch.randn(7, *SHAPE)
    first: list[Moment] = []
    a = sample(denoiser(), DDIM(4), SHAPE, SEEDS, labels(), start=start, trajectory=first.append)
    assert torch.equal(first[0].z, start)
    b = sample(denoiser(), DDIM(4), SHAPE, range(7), labels(), start=start, batch_size=3)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_three_ways_to_end() -> None:
    oracle = GaussianOracle(GaussianProcess(Cosine(-9, 6)))
    z = torch.randn(5, 1, 4, 4)
    calls, ends = {}, {}
    for final in ("state", "x_hat", "denoise"):
        oracle.calls = 0
        ends[final] = integrate(oracle, DDIM(20, UniformLogSNR(), final=final), z, Replay(z[:0]))  # type: ignore[arg-type]
        calls[final] = oracle.calls
    assert calls == {"state": 20, "x_hat": 20, "denoise": 21}
    torch.testing.assert_close(ends["denoise"], oracle(ends["state"], torch.tensor(0.0).double()).x)
    assert not torch.allclose(ends["x_hat"], ends["state"])


def test_network_calls_of_each_sampler() -> None:
    for sampler, want in [
        (DDIM(10), 10),
        (DPMSolverMultistep(10, order=3), 10),
        (DPMSolver(10), 10),
        (DPMSolver(11), 11),
        (DPMSolver(12), 12),
        (DPMSolver(11, order=2, method="singlestep"), 10),
        (Heun(10), 21),
        (Heun(10, final="state"), 20),
        (Heun(10, final="x_hat"), 19),
        (DPMSolver(10, final="denoise"), 11),
        (Ancestral(5, final="denoise"), 6),
    ]:
        oracle = GaussianOracle(GaussianProcess(Cosine(-9, 9)))
        sample(oracle, sampler, SHAPE, [0])
        assert oracle.calls == sampler.calls == want, sampler


# -- clipping


def test_clipping_bounds_x_and_recomputes_eps() -> None:
    oracle = GaussianOracle(GaussianProcess(Cosine(-9, 9)), mean=1.5, std=0.3)
    seen: list[Estimate] = []

    class Watch(DDIM):
        def step(self, denoise, z, t, s, memory, noise):  # type: ignore[no-untyped-def]
            estimate = denoise(z, t)
            alpha, sigma = denoise.process.coefficients(t)
            torch.testing.assert_close(alpha * estimate.x + sigma * estimate.eps, z.double(), check_dtype=False)
            seen.append(estimate)
            return super().step(denoise, z, t, s, memory, noise)

    x = sample(oracle, Watch(10, clip=1.0), SHAPE, range(4))
    assert all(float(e.x.abs().max()) <= 1 for e in seen)
    assert float(x.max()) == 1
    assert float(sample(oracle, DDIM(10), SHAPE, range(4)).max()) > 1.2


# -- memory


class Hungry(GaussianOracle):
    """Runs out of memory above a batch size, in the middle of a batch."""

    limit = 2
    error: RuntimeError = torch.OutOfMemoryError("pretend")

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        if len(z) > self.limit and t < 0.7:
            raise self.error
        return super().__call__(z, t, cond)


@every_sampler
def test_out_of_memory_halves_the_batch_and_keeps_the_images(sampler: Sampler) -> None:
    process = GaussianProcess(Cosine(-9, 9))
    want = sample(GaussianOracle(process), sampler, SHAPE, SEEDS)
    assert torch.equal(sample(Hungry(process), sampler, SHAPE, SEEDS), want)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 9.00 GB)",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_out_of_memory_in_other_words(words: str) -> None:
    process = GaussianProcess(Cosine(-9, 9))
    hungry = Hungry(process)
    hungry.error = RuntimeError(words)
    assert torch.equal(sample(hungry, DDIM(5), SHAPE, SEEDS), sample(GaussianOracle(process), DDIM(5), SHAPE, SEEDS))
    hungry.error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        sample(hungry, DDIM(5), SHAPE, SEEDS)


def test_a_batch_beyond_the_memory_of_this_machine() -> None:
    class Real(GaussianOracle):
        def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
            if len(z) > 2:
                torch.empty(2**60)
            return super().__call__(z, t, cond)

    process = GaussianProcess(Cosine(-9, 9))
    assert torch.equal(
        sample(Real(process), DDIM(5), SHAPE, SEEDS), sample(GaussianOracle(process), DDIM(5), SHAPE, SEEDS)
    )


def test_out_of_memory_with_one_image_is_a_sentence() -> None:
    hungry = Hungry(GaussianProcess())
    hungry.limit = 0
    with pytest.raises(UserError, match="out of memory with a single image"):
        sample(hungry, DDIM(5), SHAPE, SEEDS)


def test_batch_size_bounds_the_network_s_batch() -> None:
    d = denoiser()
    sample(d, DDIM(3), SHAPE, SEEDS, labels(), batch_size=3)
    assert d.network.batches == [3] * 6 + [1] * 3  # type: ignore[attr-defined]


# -- precision and gradients


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast(precision: str, dtype: torch.dtype) -> None:
    d = denoiser()
    x = sample(d, DDIM(5), SHAPE, SEEDS, labels(), precision=precision)  # type: ignore[arg-type]
    assert d.network.dtypes == {dtype}  # type: ignore[attr-defined]
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, sample(denoiser(), DDIM(5), SHAPE, SEEDS, labels()), rtol=0, atol=0.1)


def test_compile_reaches_every_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def fake(call: object, **options: object) -> object:
        compiled.append(call.__self__)  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(torch, "compile", fake)
    good, weak = denoiser(), denoiser()
    guided = ClassifierFree(Autoguidance(good, weak, 2.0), 1.5)
    x = sample(guided, DDIM(3), SHAPE, SEEDS, labels(), compile=True)
    assert compiled == [good.network, weak.network]
    sample(guided, DDIM(3), SHAPE, SEEDS, labels(), compile=True)
    assert len(compiled) == 2
    torch.testing.assert_close(x, sample(guided, DDIM(3), SHAPE, SEEDS, labels()))
    sample(oracle := GaussianOracle(GaussianProcess()), DDIM(3), SHAPE, [1], compile=True)
    assert len(compiled) == 2, oracle


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_samples_the_same_images() -> None:
    from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig

    torch.manual_seed(0)
    config = UViTBaoConfig(image_size=4, in_channels=2, num_classes=3, patch=2, width=32, depth=3, heads=2)
    d = ClassifierFree(Denoiser(UViTBao(config).eval(), GaussianProcess()), 2.0, interval=Interval(0.2, 0.8))
    want = sample(d, DDIM(4), SHAPE, SEEDS, labels(), batch_size=3)
    got = sample(d, DDIM(4), SHAPE, SEEDS, labels(), batch_size=3, compile=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_no_graph_is_kept_but_guidance_may_differentiate() -> None:
    class Differentiates(GaussianOracle):
        def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                point = z.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(point.square().sum(), point)
            estimate = super().__call__(z, t, cond)
            return estimate._replace(x=estimate.x + 0 * gradient)

    assert not sample(Differentiates(GaussianProcess()), DDIM(3), SHAPE, SEEDS).requires_grad
    assert not sample(denoiser(), DDIM(3), SHAPE, SEEDS, labels()).requires_grad


# -- progress and trajectory


def test_progress_bar_counts_images(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffzoo.progress.LINE_EVERY", 0.0)
    sample(denoiser(), DDIM(3), SHAPE, SEEDS, labels(), batch_size=2, progress=True)
    assert "100%" in capsys.readouterr().err
    sample(denoiser(), DDIM(3), SHAPE, SEEDS, labels())
    assert capsys.readouterr().err == ""


def test_moments_tell_the_story() -> None:
    seen: list[Moment] = []
    x = sample(denoiser(), Heun(4), SHAPE, SEEDS, labels(), batch_size=4, trajectory=seen.append)
    assert [m.step for m in seen] == [0, 1, 2, 3, -1] * 2
    assert [list(m.rows) for m in seen[::5]] == [[0, 1, 2, 3], [4, 5, 6]]
    times = [m.t for m in seen[:5]]
    assert times == sorted(times, reverse=True)
    assert torch.equal(torch.cat([seen[4].x_hat, seen[9].x_hat]), x)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_trajectory_images(tmp_path: Path, batch_size: int | None) -> None:
    oracle = GaussianOracle(GaussianProcess(Cosine(-9, 9)), mean=0.0, std=0.3)
    trajectory = Trajectory(every=2, images=3)
    x = sample(oracle, DDIM(7), (3, 8, 8), range(5), batch_size=batch_size, trajectory=trajectory)
    frames = trajectory.frames()
    assert len(frames) == 5, "steps 0, 2, 4, 6 and the finished image"
    assert torch.equal(frames[-1], images.to_uint8(x[:3]))
    # the first belief of an exact denoiser is the mean of the data: grey
    assert int((frames[0].int() - 128).abs().max()) <= 3
    assert trajectory.contact_sheet().shape == (3, 3 * 34 + 2 + LINE, 5 * 34 + 2)
    path = trajectory.save_gif(tmp_path / "new" / "walk.gif", columns=2)
    from PIL import Image

    with Image.open(path) as gif:
        assert gif.size == (2 * 34 + 2, 2 * 34 + 2)
        assert gif.n_frames >= 4  # type: ignore[attr-defined]


def test_trajectory_after_running_out_of_memory_is_the_same() -> None:
    process, kept = GaussianProcess(Cosine(-9, 9)), []
    for oracle in (GaussianOracle(process), Hungry(process)):
        kept.append(Trajectory())
        sample(oracle, DDIM(6), SHAPE, SEEDS, trajectory=kept[-1])
    for ours, theirs in zip(kept[0].frames(), kept[1].frames(), strict=True):
        assert torch.equal(ours, theirs)


def test_trajectory_decodes_latents_and_complains_when_empty() -> None:
    oracle = GaussianOracle(GaussianProcess())
    trajectory = Trajectory(decode=lambda z: z.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :1])
    sample(oracle, DDIM(2), SHAPE, [0, 1], trajectory=trajectory)
    assert trajectory.frames()[0].shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="empty"):
        Trajectory().frames()


# -- bad input


def test_guided_sampling_is_invariant_with_a_scale_per_image() -> None:
    scales = torch.tensor([1.0, 2.0, 3.0, 1.5, 1.0, 4.0, 0.0])
    whole = sample(ClassifierFree(denoiser(), scales), DDIM(4), SHAPE, SEEDS, labels())
    parts = sample(ClassifierFree(denoiser(), scales), DDIM(4), SHAPE, SEEDS, labels(), batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
    alone = sample(ClassifierFree(denoiser(), 3.0), DDIM(4), SHAPE, SEEDS[2:3], labels()[2:3])
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": [-1] * 7}, "seeds must be"),
        ({"shape": (4, 4)}, r"\(c, h, w\), got \(4, 4\)"),
        ({"cond": Condition(label=torch.zeros(3, dtype=torch.long))}, "3 conditions for 7 seeds"),
        ({"start": torch.zeros(7, 1, 4, 4)}, r"expected a start of shape \(7, 2, 4, 4\), got \(7, 1, 4, 4\)"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"precision": "int8"}, "got 'int8'"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    keyword = {"shape": SHAPE, "seeds": SEEDS, "cond": None} | arguments
    with pytest.raises(UserError, match=words):
        sample(denoiser(), DDIM(2), **keyword)


def test_mixture_of_conditions_reaches_each_image() -> None:
    """Every image gets its own condition, in every batch."""
    oracle = MixtureOracle(
        GaussianProcess(Cosine(-9, 9)), torch.ones(3) / 3, torch.tensor([[0.0], [2.0], [-2.0]]), torch.full((3,), 0.1)
    )
    label = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    x = sample(oracle, DPMSolverMultistep(10), (1, 1, 1), SEEDS, Condition(label=label), batch_size=3)
    assert torch.equal(oracle.component(x), label)
