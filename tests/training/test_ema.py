"""EMAs of weights: closed forms, other implementations, and what must not disturb them."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from data.stand_ins import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.models import entry
from diffzoo.models.simple_uvit import TINY
from diffzoo.runs import find_resume
from diffzoo.tensors import write_tensors
from diffzoo.training import ema, snapshots
from diffzoo.training.ema import EMA, averaged
from diffzoo.training.lora import LoRA, inject
from diffzoo.training.reconstruction import (
    REACHED,
    coefficients,
    mismatch,
    power_gamma,
    power_std,
    reconstruct,
)
from diffzoo.training.snapshots import list_snapshots

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")


class Net(nn.Module):
    """A network with a frozen part, a float buffer, an integer one and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.first(x).tanh())) * self.scale


class Module(L.LightningModule):
    """Trains `Net` on data that depend on the step alone; keeps the weights after every optimizer step."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = Net() if net is None else net
        self.encoder = nn.Linear(4, 4)
        self.trajectory: list[dict[str, torch.Tensor]] = []
        self.seen_in_validation: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = torch.randn(batch.shape, generator=torch.Generator().manual_seed(self.global_step), dtype=batch.dtype)
        return (self.network(x) - x).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if batch_idx < 0:
            raise AssertionError

    def on_validation_epoch_end(self) -> None:
        self.seen_in_validation.append(self.network.last.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=1e-2)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trajectory.append({n: p.detach().double().clone() for n, p in self.network.named_parameters()})


def data(n: int = 64) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)


def fit(folder: Path, callback: EMA, steps: int = 12, module: Module | None = None, **options) -> Module:
    module = module or Module()
    validation = options.pop("validation", None)
    callbacks = [callback, *options.pop("callbacks", [])]
    saves, ckpt_path = any(isinstance(c, ModelCheckpoint) for c in callbacks), options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=callbacks, enable_checkpointing=saves, **options)
    trainer.fit(module, data(), validation, ckpt_path=ckpt_path)
    return module


def exact_power_average(trajectory: list[torch.Tensor], std: float) -> torch.Tensor:
    """The integral (1) of `profiles.py` over a trajectory that is constant between updates."""
    g, t = power_gamma(std) + 1, len(trajectory)
    return sum(((i + 1) ** g - i**g) / t**g * w for i, w in enumerate(trajectory))


# -- profiles


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.2886])
def test_gamma_inverts_std(std: float) -> None:
    assert power_std(power_gamma(std)) == pytest.approx(std, rel=1e-9)


def test_gamma_of_the_paper() -> None:
    """EDM2, Section 3.1: widths 0.05 and 0.10 have exponents 16.97 and 6.94."""
    assert power_gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert power_gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    assert power_gamma(12**-0.5) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3, float("nan")])
def test_impossible_width(std: float) -> None:
    with pytest.raises(UserError, match="relative width"):
        power_gamma(std)


@pytest.mark.parametrize("std", [0.03, 0.1, 0.28])
def test_std_is_that_of_the_profile(std: float) -> None:
    """By quadrature over p(τ) = (γ + 1) τ^γ on [0, 1]."""
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = (power_gamma(std) + 1) * tau ** power_gamma(std)
    mean = (p * tau).mean()
    assert float(((p * (tau - mean) ** 2).mean()).sqrt()) == pytest.approx(std, rel=1e-6)


def test_coefficients_reproduce_what_was_kept() -> None:
    profiles = [(t, s) for t in (250, 500, 750, 1000) for s in (0.05, 0.1)]
    for i, (t, s) in enumerate(profiles):
        if t == 1000:
            expected = torch.zeros(len(profiles), dtype=torch.float64)
            expected[i] = 1
            torch.testing.assert_close(coefficients(profiles, t, s), expected, atol=1e-6, rtol=0)
    assert mismatch(profiles, 1000, 0.05) < 1e-6


@pytest.mark.parametrize("std", [0.02, 0.07, 0.15, 0.2, 0.25, 12**-0.5])
def test_weights_that_never_changed_stay_what_they_are(std: float) -> None:
    profiles = [(t, s) for t in range(125, 1001, 125) for s in (0.05, 0.1)]
    assert float(coefficients(profiles, 1000, std).sum()) == pytest.approx(1, abs=1e-12)
    assert float(coefficients(profiles[:5], 1000, std).sum()) == pytest.approx(1, abs=1e-12)
    off = mismatch(profiles, 1000, std)
    assert (off > REACHED) == (std not in (0.07, 0.15)), off


def test_more_snapshots_fit_better() -> None:
    sparse = [(t, s) for t in (500, 1000) for s in (0.05, 0.1)]
    dense = [(t, s) for t in range(50, 1001, 50) for s in (0.05, 0.1)]
    for std in (0.03, 0.07, 0.15, 0.2):
        assert mismatch(dense, 1000, std) < mismatch(sparse, 1000, std)
    assert mismatch(dense, 1000, 0.07) < 0.01


# -- EMAs in training


def test_power_ema_is_the_closed_form(tmp_path: Path) -> None:
    callback = EMA(decays=[], stds=[0.05, 0.1, 0.2])
    module = fit(tmp_path, callback, 16)
    for std in (0.05, 0.1, 0.2):
        for name in ("first.weight", "last.bias"):
            exact = exact_power_average([w[name] for w in module.trajectory], std)
            ours = callback.averages[f"power_{std:.3f}"][name].double()
            torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-5)


def test_exponential_ema_is_the_closed_form(tmp_path: Path) -> None:
    start = {n: p.detach().double().clone() for n, p in Module().network.named_parameters()}
    callback = EMA(decays=[0.9], warm_start=False)
    module = fit(tmp_path, callback, 12)
    weights = [w["first.weight"] for w in module.trajectory]
    exact = 0.9**12 * start["first.weight"] + sum(0.1 * 0.9 ** (11 - i) * w for i, w in enumerate(weights))
    torch.testing.assert_close(callback.averages["ema_0.9"]["first.weight"].double(), exact, atol=1e-6, rtol=1e-5)


def test_warm_start_forgets_the_initialisation_and_reaches_the_decay() -> None:
    callback = EMA(decays=[0.9999])
    kept = [callback.decay("ema_0.9999", n) for n in range(1, 200_001)]
    assert kept[0] == pytest.approx(0.1)  # (1 + n) / (10 + n) after n = 0 updates
    assert kept[1499] == pytest.approx(1500 / 1509)
    assert kept[-1] == 0.9999
    assert math.prod(kept[:1500]) < 1e-15  # share of the initial weights after a run of 1,500 steps
    age = sum((1 - kept[i]) * math.prod(kept[i + 1 : 1500]) * (1500 - i) for i in range(1200, 1500))
    assert age < 150


def test_same_as_lightning(tmp_path: Path) -> None:
    """A constant decay against Lightning's own callback, on the network's weights."""
    from lightning.pytorch.callbacks import WeightAveraging
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    ours = EMA(decays=[0.9], warm_start=False)
    theirs = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    module = fit(tmp_path, ours, 12, callbacks=[theirs])  # after the fit the module holds their EMA
    # theirs starts from the weights after the first update, ours from those before it
    first = module.trajectory[0]["first.weight"]
    start = dict(Module().network.named_parameters())["first.weight"].double()
    shift = 0.9**12 * (start - first)
    theirs_weight = module.network.first.weight.detach().double()
    torch.testing.assert_close(
        ours.averages["ema_0.9"]["first.weight"].double() - shift, theirs_weight, atol=2e-6, rtol=1e-5
    )


def test_only_what_trains_is_averaged(tmp_path: Path) -> None:
    callback = EMA()
    fit(tmp_path, callback, 2)
    assert set(callback.averages["ema_0.9999"]) == {"first.weight", "first.bias", "last.weight", "last.bias", "scale"}


def test_once_per_optimizer_step(tmp_path: Path) -> None:
    callback = EMA(decays=[0.5], stds=[0.1])
    module = fit(tmp_path, callback, 4, accumulate_grad_batches=4)
    assert callback.updates == {"ema_0.5": 4, "power_0.100": 4}
    exact = exact_power_average([w["last.weight"] for w in module.trajectory], 0.1)
    torch.testing.assert_close(callback.averages["power_0.100"]["last.weight"].double(), exact, atol=1e-6, rtol=1e-5)


def test_emas_stay_float32_for_bfloat16_weights(tmp_path: Path) -> None:
    module = Module(Net().bfloat16())
    callback = EMA(decays=[0.999], stds=[0.1])
    fit(tmp_path, callback, 8, module=module, precision="bf16-true")
    exact = exact_power_average([w["last.weight"] for w in module.trajectory], 0.1)
    average = callback.averages["power_0.100"]["last.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), exact, atol=1e-6, rtol=1e-5)  # bfloat16 would miss by 1e-3
    with callback.averaged(module, "power_0.100"):
        torch.testing.assert_close(module.network.last.weight, average.bfloat16())


def test_a_slow_ema_of_bfloat16_weights_moves(tmp_path: Path) -> None:
    """An EMA that is bfloat16 itself, as in most libraries, loses most steps of 0.1 %."""
    module = Module(Net().bfloat16())
    start = module.network.last.weight.detach().double().clone()
    callback = EMA(decays=[0.999], warm_start=False)
    fit(tmp_path, callback, 8, module=module, precision="bf16-true")
    expected, rounded = start, start.bfloat16()
    for weights in module.trajectory:
        expected = 0.999 * expected + 0.001 * weights["last.weight"].double()
        rounded = rounded.lerp(weights["last.weight"].bfloat16(), 0.001)
    average = callback.averages["ema_0.999"]["last.weight"].double()
    torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-6)
    gone = (expected - start).norm()
    assert (average - start).norm() > 0.99 * gone
    assert (rounded.double() - start).norm() < 0.5 * gone  # so this test tells them apart


def test_compiled_blocks_keep_their_names_and_see_the_ema(tmp_path: Path) -> None:
    """`_orig_mod.` does not reach the names; a compiled network computes with what `averaged` puts in."""
    module = Module(torch.compile(Net(), backend="eager"))
    callback = EMA(decays=[0.5])
    fit(tmp_path, callback, 6, module=module)
    assert set(callback.averages["ema_0.5"]) == {"first.weight", "first.bias", "last.weight", "last.bias", "scale"}
    x = torch.randn(3, 4)
    plain = Net()
    plain.load_state_dict(callback.network_state(module, "ema_0.5"))
    with callback.averaged(module), torch.no_grad():
        torch.testing.assert_close(module.network(x), plain(x))


# -- putting an EMA in and out


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_weights_come_back(tmp_path: Path, error: type[BaseException] | None) -> None:
    callback = EMA(decays=[0.9, 0.99])
    module = fit(tmp_path, callback, 6)
    before = {n: p.clone() for n, p in module.network.state_dict().items()}
    places = [p.data_ptr() for p in module.network.parameters()]

    def use() -> None:
        with callback.averaged(module, "ema_0.99"):
            assert torch.equal(module.network.last.weight, callback.averages["ema_0.99"]["last.weight"])
            assert not torch.equal(module.network.last.weight, before["last.weight"])
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert all(torch.equal(v, before[n]) for n, v in module.network.state_dict().items())
    assert [p.data_ptr() for p in module.network.parameters()] == places


def test_nested_blocks(tmp_path: Path) -> None:
    callback = EMA(decays=[0.9, 0.99])
    module = fit(tmp_path, callback, 6)
    raw = module.network.last.weight.detach().clone()
    with callback.averaged(module, "ema_0.9"):
        with callback.averaged(module, "ema_0.9"), callback.averaged(module, "ema_0.99"):
            assert torch.equal(module.network.last.weight, callback.averages["ema_0.99"]["last.weight"])
        assert torch.equal(module.network.last.weight, callback.averages["ema_0.9"]["last.weight"])
    assert torch.equal(module.network.last.weight, raw)


def test_validation_and_its_end_see_the_ema(tmp_path: Path) -> None:
    callback = EMA(decays=[0.9])
    module = fit(tmp_path, callback, 16, validation=data(8), val_check_interval=16)
    average = callback.averages["ema_0.9"]["last.weight"]
    assert [torch.equal(w, average) for w in module.seen_in_validation] == [True]
    torch.testing.assert_close(module.network.last.weight.double(), module.trajectory[-1]["last.weight"])


def test_interrupted_validation_leaves_the_weights(tmp_path: Path) -> None:
    class Interrupts(Module):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            raise KeyboardInterrupt

    module = Interrupts()
    with pytest.raises(SystemExit):
        fit(tmp_path, EMA(decays=[0.9]), 16, module=module, validation=data(8), val_check_interval=16)
    torch.testing.assert_close(module.network.last.weight.double(), module.trajectory[-1]["last.weight"])


def test_function_without_emas(tmp_path: Path) -> None:
    module = Module()
    before = module.network.last.weight.detach().clone()
    with averaged(module):
        assert torch.equal(module.network.last.weight, before)


def test_function_finds_the_callback(tmp_path: Path) -> None:
    callback = EMA(decays=[0.9])
    module = fit(tmp_path, callback, 4)
    with averaged(module):
        assert torch.equal(module.network.last.weight, callback.averages["ema_0.9"]["last.weight"])
    with pytest.raises(UserError, match=r"did you mean 'ema_0\.9'"), averaged(module, "ema_0.99"):
        pass


# -- checkpoints


def checkpointed(folder: Path, steps: int, every: int, **options) -> tuple[EMA, Module]:
    callback = EMA(decays=[0.9, 0.99], stds=[0.1], snapshot_every=every)
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    module = fit(folder, callback, steps, callbacks=[save], **options)
    return callback, module


def test_resume_is_exact(tmp_path: Path) -> None:
    whole, _ = checkpointed(tmp_path / "a", 12, 6)
    checkpointed(tmp_path / "b", 6, 6)
    resumed, _ = checkpointed(tmp_path / "b", 12, 6, ckpt_path=str(tmp_path / "b" / "step=6.ckpt"))
    assert resumed.updates == whole.updates == {"ema_0.9": 12, "ema_0.99": 12, "power_0.100": 12}
    for label, average in whole.averages.items():
        for name, value in average.items():
            assert torch.equal(resumed.averages[label][name], value), (label, name)


def test_checkpoint_holds_emas_and_raw_weights(tmp_path: Path) -> None:
    callback, module = checkpointed(tmp_path, 6, 6)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    held = checkpoint[ema.CHECKPOINT_KEY]["averages"]
    assert torch.equal(held["ema_0.9"]["last.weight"], callback.averages["ema_0.9"]["last.weight"])
    assert torch.equal(held["power_0.100"]["scale"], torch.ones(1))
    assert torch.equal(checkpoint["state_dict"]["network.last.weight"], module.network.last.weight)


def test_checkpoint_inside_a_block_holds_the_raw_weights(tmp_path: Path) -> None:
    callback, module = checkpointed(tmp_path, 6, 6)
    with callback.averaged(module):
        module.trainer.save_checkpoint(tmp_path / "inside.ckpt")
    inside = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(inside["network.last.weight"], module.network.last.weight)
    assert torch.equal(inside["network.frozen.weight"], module.network.frozen.weight)


def test_recipe_adds_and_drops_emas(tmp_path: Path) -> None:
    checkpointed(tmp_path, 6, 6)
    callback = EMA(decays=[0.5, 0.99])
    with pytest.warns(UserWarning, match=r"no EMA ema_0\.5"):
        fit(tmp_path, callback, 8, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert callback.updates == {"ema_0.5": 2, "ema_0.99": 8}
    with pytest.raises(UserError, match="was not kept from the start"):
        fit(tmp_path, EMA(decays=[], stds=[0.1, 0.2]), 8, ckpt_path=str(tmp_path / "step=6.ckpt"))


def test_ema_of_another_network(tmp_path: Path) -> None:
    checkpointed(tmp_path, 6, 6)
    held = torch.load(tmp_path / "step=6.ckpt", weights_only=True)[ema.CHECKPOINT_KEY]
    held["averages"]["ema_0.9"]["other"] = held["averages"]["ema_0.9"].pop("scale")
    callback = EMA(decays=[0.9])
    callback._loaded = held
    with pytest.raises(UserError, match="another architecture"):
        callback.prepare(Module())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decays": [1.0]}, "decay"),
        ({"decays": [-0.1]}, "decay"),
        ({"decays": [0.9, 0.9]}, "twice"),
        ({"decays": []}, "nothing to do"),
        ({"stds": [0.5]}, "relative width"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"snapshot_dtype": "int8"}, "snapshot_dtype"),
        ({"validate_with": "ema_0.99"}, "did you mean 'ema_0.9999'"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EMA(**options)


# -- reconstruction


def test_snapshots_reconstruct_a_profile_that_was_kept_but_not_stored(tmp_path: Path) -> None:
    """Train with three widths, store two, and rebuild the third."""
    kept = EMA(decays=[], stds=[0.07], folder=str(tmp_path / "unused"))
    stored = EMA(decays=[], stds=[0.05, 0.1], snapshot_every=16)
    module = fit(tmp_path, stored, 256, callbacks=[kept])
    snapshots = list_snapshots(tmp_path)
    assert [s.updates for s in snapshots] == [t for t in range(16, 257, 16) for _ in range(2)]
    rebuilt = reconstruct(snapshots, 0.07)
    name = "first.weight"
    exact = exact_power_average([w[name] for w in module.trajectory], 0.07)
    torch.testing.assert_close(kept.averages["power_0.070"][name].double(), exact, atol=1e-5, rtol=1e-5)
    spread = float(torch.stack([w[name] for w in module.trajectory]).std(0).max())
    assert float((rebuilt[name].double() - exact).abs().max()) < 0.01 * spread
    torch.testing.assert_close(reconstruct(snapshots, 0.05)[name], stored.averages["power_0.050"][name])
    early = exact_power_average([w[name] for w in module.trajectory[:128]], 0.1)
    torch.testing.assert_close(reconstruct(snapshots, 0.1, updates=128)[name].double(), early, atol=1e-5, rtol=1e-5)


def test_reconstruction_of_a_known_trajectory(tmp_path: Path) -> None:
    """θ(τ) = τ: the profile's mean is t (γ + 1) / (γ + 2), so any width has a closed form."""
    for t in range(100, 2001, 100):
        for std in (0.05, 0.1):
            value = torch.tensor([t * (power_gamma(std) + 1) / (power_gamma(std) + 2)])
            path = tmp_path / f"step_{t:08d}_power_{std:.3f}.safetensors"
            write_tensors(path, {"w": value}, {"updates": str(t), "std": str(std), "step": str(t)})
    for std in (0.03, 0.07, 0.12, 0.2):
        g = power_gamma(std)
        value = float(reconstruct(list_snapshots(tmp_path), std)["w"])
        assert value == pytest.approx(2000 * (g + 1) / (g + 2), rel=2e-3)


@pytest.mark.parity
def test_coefficients_as_in_ema_pytorch() -> None:
    post_hoc = pytest.importorskip("ema_pytorch.post_hoc_ema")
    profiles = [(t, s) for t in range(100, 1001, 100) for s in (0.05, 0.1)]
    t, gamma = (
        torch.tensor(v, dtype=torch.float64) for v in zip(*((t, power_gamma(s)) for t, s in profiles), strict=True)
    )
    for std in (0.04, 0.07, 0.15):
        assert post_hoc.sigma_rel_to_gamma(std) == pytest.approx(power_gamma(std), rel=1e-9)
        theirs = post_hoc.solve_weights(t, gamma, torch.tensor([900.0]), torch.tensor([power_gamma(std)]))[:, 0]
        # it leaves out the division by the sum, which NVlabs' code has
        torch.testing.assert_close(coefficients(profiles, 900, std), theirs / theirs.sum(), atol=1e-5, rtol=1e-4)


@pytest.mark.parity
def test_emas_as_in_ema_pytorch(tmp_path: Path) -> None:
    """The same trajectory through lucidrains' PostHocEMA: kept profiles and reconstruction.

    Its counter is one ahead: it takes in the first weights twice and its snapshots name the time before. We do the
    same here, so that the two must agree to rounding.
    """
    ema_pytorch = pytest.importorskip("ema_pytorch")
    net = nn.Linear(3, 3)
    theirs = ema_pytorch.PostHocEMA(
        net,
        sigma_rels=(0.05, 0.1),
        update_every=1,
        checkpoint_every_num_steps=20,
        checkpoint_folder=str(tmp_path / "theirs"),
        checkpoint_dtype=torch.float32,
    )
    ours = EMA(decays=[], stds=[0.05, 0.1])
    ours.prepare(Module(net))
    for step in range(1, 201):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn(p.shape))
        for _ in range(2 if step == 1 else 1):
            ours.update()
        theirs.update()
        for label, std in ours.stds.items() if step % 20 == 0 else []:
            path = tmp_path / "ours" / f"step_{step:08d}_{label}.safetensors"
            write_tensors(path, ours.averages[label], {"updates": str(step), "std": str(std), "step": str(step)})
    for label, kept in zip(ours.labels, theirs.ema_models, strict=True):
        torch.testing.assert_close(ours.averages[label]["weight"], kept.ema_model.weight, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        state = theirs.synthesize_ema_model(sigma_rel=0.07).ema_model.state_dict()
    kept = [(s.updates, s.std) for s in list_snapshots(tmp_path / "ours")]
    t, gamma = (torch.tensor(v, dtype=torch.float64) for v in zip(*((t, power_gamma(s)) for t, s in kept), strict=True))
    solve = ema_pytorch.post_hoc_ema.solve_weights
    total = float(solve(t, gamma, t[-1:], torch.tensor([power_gamma(0.07)])).sum())  # theirs are not divided by it
    for name, value in reconstruct(list_snapshots(tmp_path / "ours"), 0.07).items():
        torch.testing.assert_close(value * total, state[name].float(), atol=1e-5, rtol=1e-5)


def test_snapshot_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no snapshots"):
        list_snapshots(tmp_path)
    (tmp_path / "0.1000.pt").touch()
    with pytest.raises(UserError, match=r"ema-pytorch, such as 0.1000.pt: .* every 100th step"):
        list_snapshots(tmp_path)
    (tmp_path / "step_00000001_power_0.100.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged"):
        list_snapshots(tmp_path)


def test_full_disk_leaves_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_tensors", full)
    callback = EMA(decays=[], stds=[0.1], snapshot_every=4)
    with pytest.warns(UserWarning, match="training goes on without it"):
        fit(tmp_path, callback, 6)
    assert callback.updates["power_0.100"] == 6


def test_snapshots_of_another_course_are_set_aside(tmp_path: Path) -> None:
    checkpointed(tmp_path, 12, 4)
    checkpointed(tmp_path, 6, 4, ckpt_path=str(tmp_path / "step=4.ckpt"))
    names = {p.name for p in (tmp_path / "averages").glob("*.safetensors")}
    assert names == {f"step_{s:08d}_power_0.100.safetensors" for s in (4, 6)}
    assert {p.name for p in (tmp_path / "averages" / "stale").iterdir()} == {
        f"step_{s:08d}_power_0.100.safetensors" for s in (8, 12)
    }


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ema_follows_weights_that_double(dtype: torch.dtype, adapters: bool) -> None:
    """A hundred updates of 0.1 %, each of which vanishes in 16 bits; of all weights, or of adapters alone."""
    module = L.LightningModule()
    module.network = network = entry("simple_uvit_xs_32").network(TINY)
    if adapters:
        inject(network, LoRA(rank=2))
    network.to(dtype)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(1)  # one matrix of an adapter is zero at first
    callback = EMA(decays=[0.999], warm_start=False)
    callback.prepare(module)
    before = {n: p.detach().double() for n, p in trained.items()}
    with torch.no_grad():
        for p in trained.values():
            p.mul_(2)
    for _ in range(100):
        callback.update()
    assert set(before) <= set(callback.averages["ema_0.999"])
    for name, start in before.items():
        expected = start * (2 - 0.999**100)
        torch.testing.assert_close(callback.averages["ema_0.999"][name].double(), expected, rtol=1e-5, atol=1e-6)


# -- several processes


def two_processes(folder: Path, kind: str, steps: int, checkpoint: Path | None = None) -> list[dict]:
    script = Path(__file__).with_name("run_distributed_ema.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [str(folder), kind, str(steps), *([str(checkpoint)] if checkpoint else [])]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.slow
def test_ddp_and_fsdp_hold_the_same_emas(tmp_path: Path) -> None:
    """Identical on the ranks under DDP; shards under FSDP2; both equal, in snapshots, checkpoints and resumes too."""
    ddp, fsdp = two_processes(tmp_path / "ddp", "ddp", 10), two_processes(tmp_path / "fsdp", "fsdp", 10)
    for label in ("ema_0.9", "power_0.100"):
        for name, value in ddp[0]["local"][label].items():
            assert torch.equal(value, ddp[1]["local"][label][name])
            torch.testing.assert_close(fsdp[0]["states"][label][name], value, atol=1e-5, rtol=1e-4)
            shards = [rank["local"][label][name] for rank in fsdp]
            torch.testing.assert_close(torch.cat(shards), fsdp[0]["states"][label][name])
    assert fsdp[0]["local"]["ema_0.9"]["0.weight"].shape == (4, 8)  # of 7 rows
    for rank in (*ddp, *fsdp):  # an update of 0.1 %, a hundred times
        for dtype, (average, weights) in rank["doubled"].items():
            want = weights.double() / 2 * (2 - 0.999**100)
            torch.testing.assert_close(average.double(), want, rtol=1e-5, atol=1e-6, msg=dtype)
    for run in (*ddp, *fsdp):
        for name, value in run["raw"].items():
            assert torch.equal(run["after"][name], value)
            torch.testing.assert_close(run["inside"][name], ddp[0]["local"]["ema_0.9"][name], atol=1e-5, rtol=1e-4)
            assert not torch.equal(run["inside"][name], value)
    last = [list_snapshots(tmp_path / kind)[-1] for kind in ("ddp", "fsdp")]
    for name, value in reconstruct(last[:1], 0.1).items():
        torch.testing.assert_close(reconstruct(last[1:], 0.1)[name], value, atol=1e-5, rtol=1e-4)
    for kind, whole in (("ddp", ddp), ("fsdp", fsdp)):
        newest = tmp_path / kind / "checkpoints" / "step_00000005.ckpt"
        assert newest.is_dir() == (kind == "fsdp")
        assert find_resume(tmp_path / kind, pytest.fail).name == "step_00000010.ckpt"
        resumed = two_processes(tmp_path / kind / "again", kind, 10, newest)
        assert resumed[0]["updates"] == {"ema_0.9": 10, "power_0.100": 10}
        for label in ("ema_0.9", "power_0.100"):
            for name, value in whole[0]["states"][label].items():
                assert torch.equal(resumed[0]["states"][label][name], value), (kind, label, name)


# -- command line


def test_ema_reconstruct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, _ = checkpointed(tmp_path, 12, 4)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    assert main(["ema", "reconstruct", str(tmp_path), "--std", "0.1", "0.12", "-o", str(tmp_path / "out")]) == 0
    held = load_file(tmp_path / "out" / "power_0.100_00000012.safetensors")
    torch.testing.assert_close(held["last.weight"], callback.averages["power_0.100"]["last.weight"])
    assert (tmp_path / "out" / "power_0.120_00000012.safetensors").exists()
    assert "3 snapshots" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reconstruct", "RUN", "--std", "0.1"], "no snapshots"),
        (["reconstruct", "RUN", "--std", "0.5"], "no snapshots"),
        (["sweep", "RUN"], "no config.yaml"),
    ],
)
def test_ema_bad_input(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", *[str(tmp_path) if a == "RUN" else a for a in arguments]]) == 2
    assert message in capsys.readouterr().err


def test_ema_before_the_first_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointed(tmp_path, 4, 4)
    assert main(["ema", "reconstruct", str(tmp_path), "--std", "0.1", "--updates", "2"]) == 2
    assert "the first is at 4" in capsys.readouterr().err


@pytest.mark.slow
def test_ema_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train from a recipe, reconstruct into a file that loads by itself, sweep; in a process of its own each."""
    over = tmp_path / "over.yaml"
    over.write_text(
        "trainer:\n  max_steps: 4\n  val_check_interval: 4\n  limit_val_batches: 2\n  log_every_n_steps: 4\n"
        "  callbacks:\n"
        "    - {class_path: EMA, init_args: {decays: [0.5], stds: [0.05, 0.1], snapshot_every: 2}}\n"
    )
    run = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["fit", "-c", "emoji/simple_uvit_xs_32", "-c", str(over), "--run", str(run)],
        ["ema", "reconstruct", str(run), "--std", "0.07"],
        ["ema", "sweep", str(run), "--std", "0.05", "0.1", "--batches", "2"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "diffzoo", *arguments], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "best: width" in done.stdout
    with next(run.rglob("metrics.csv")).open() as file:
        validated = [row["val/loss"] for row in csv.DictReader(file) if row.get("val/loss")]
    assert f"ema_0.5      loss {float(validated[-1]):.6f}" in done.stdout  # validation in training measures this EMA
    assert "raw          loss" in done.stdout
    from diffzoo.factory import create_model

    path = run / "averages" / "reconstructed" / "power_0.070_00000004.safetensors"
    network = create_model(str(path))
    for name, value in reconstruct(list_snapshots(run), 0.07).items():
        assert torch.equal(network.state_dict()[name], value)
