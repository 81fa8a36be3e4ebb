"""Bad steps: not taken, counted, explained; the same with and without the device's own skipping."""

from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from data.stand_ins import quiet_trainer
from torch import nn

from diffzoo.errors import UserError
from diffzoo.runs import list_checkpoints
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.guards import GradientGuard, gradient_norm
from diffzoo.training.optimizers import FusedAdam, FusedAdamW


class Module(L.LightningModule):
    """A loss that is what `bad` says at the steps it names."""

    def __init__(self, bad: dict[int, float], fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.bad, self.fused = nn.Linear(4, 4), bad, fused
        self.weights: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.last_ids = [100 * batch_idx + i for i in range(len(batch))]
        x = torch.randn(batch.shape, generator=torch.Generator().manual_seed(batch_idx))
        return (self.network(x) - x).square().mean() * self.bad.get(batch_idx, 1.0)

    def on_train_batch_end(self, *args) -> None:
        self.weights.append(self.network.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2, fused=self.fused)


def fit(folder: Path, guard: GradientGuard, bad: dict[int, float], fused: bool = True, **options) -> Module:
    module = Module(bad, fused)
    options = {"max_steps": options.pop("steps", 12), "enable_checkpointing": True, **options}
    trainer = quiet_trainer(folder, callbacks=[guard, Checkpointing(0, 0)], **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(400, 4), batch_size=4))
    return module


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_bad_step_leaves_no_trace(tmp_path: Path, fused: bool, value: float, clip: float | None) -> None:
    """The weights are those of a run in which the bad batch never was: moments and step counter too."""
    guard = GradientGuard(spike_after=3)
    with pytest.warns(UserWarning, match=r"step 6 was skipped.*samples 500, 501, 502, 503; 1 skipped so far"):
        module = fit(tmp_path, guard, {5: value}, fused, gradient_clip_val=clip)
    assert torch.equal(module.weights[5], module.weights[4])
    assert guard.skipped == 1
    batches = [i for i in range(12) if i != 5]
    network = Module({}, fused)
    optimizer = network.configure_optimizers()
    for i in batches:
        optimizer.zero_grad()
        network.training_step(torch.zeros(4, 4), i).backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
    torch.testing.assert_close(module.network.weight, network.network.weight)


def test_good_run_is_untouched(tmp_path: Path) -> None:
    guard = GradientGuard()
    module = fit(tmp_path, guard, {})
    assert guard.skipped == 0
    assert len({w.sum().item() for w in module.weights}) == 12


def test_stop_names_the_samples_and_saves_the_last_good_weights(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"stopped at step 8.* was nan; the last good weights are in .*700, 701"
    ) as caught:
        fit(tmp_path, GradientGuard("stop"), {7: float("nan")})
    saved = list_checkpoints(tmp_path)[0]
    assert str(saved) in str(caught.value)
    weights = torch.load(saved, weights_only=True)["state_dict"]["network.weight"]
    assert torch.equal(weights, fit(tmp_path / "good", GradientGuard(), {}, steps=7).network.weight)


def test_stops_after_many_in_a_row(tmp_path: Path) -> None:
    guard = GradientGuard(max_in_a_row=3)
    with pytest.warns(UserWarning, match="was skipped"), pytest.raises(UserError, match="number 3 in a row"):
        fit(tmp_path, guard, dict.fromkeys(range(4, 20), float("nan")))
    assert guard.skipped == 3


def test_accumulated_batches_are_all_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"step 3 was skipped.*samples 400, .*403, 500, .*503;"):
        fit(tmp_path, GradientGuard(), {5: float("nan")}, steps=4, accumulate_grad_batches=2)


@pytest.mark.parametrize("optimizer", [FusedAdamW, FusedAdam, partial(torch.optim.AdamW, fused=True)])
def test_device_skips_before_the_host_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer) -> None:
    """The host looks every 5 steps only, as on a GPU, and reads nothing between; yet the bad step is not taken."""

    class Late(GradientGuard):
        looks: list[int] = []  # noqa: RUF012

        def on_before_optimizer_step(self, *args) -> None:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("__bool__", "__float__", "item", "tolist", "cpu"):
                    patch.setattr(torch.Tensor, name, lambda *_, n=name: pytest.fail(f"the host waits for {n}"))
                super().on_before_optimizer_step(*args)

        def look(self, trainer: L.Trainer) -> None:
            if trainer.global_step % 5 == 0:
                self.looks.append(trainer.global_step)
                super().look(trainer)

    monkeypatch.setattr(Module, "configure_optimizers", lambda self: optimizer(self.network.parameters(), lr=1e-2))
    with pytest.warns(UserWarning, match="step 7 was skipped"):
        module = fit(tmp_path, Late(), {6: float("nan")}, steps=10)
    assert Late.looks[:2] == [5, 10]
    assert torch.equal(module.weights[6], module.weights[5])
    assert not torch.equal(module.weights[7], module.weights[6])


@pytest.mark.parametrize("optimizer", [FusedAdamW, FusedAdam])
def test_ours_keep_moments_and_step_counter_too(optimizer) -> None:
    parameter = nn.Parameter(torch.ones(3))
    ours = optimizer([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    ours.step()
    before = {k: v.clone() for k, v in ours.state[parameter].items()}
    parameter.grad, ours.found_inf = torch.full((3,), float("nan")), torch.tensor(1.0)
    ours.step()
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(v, ours.state[parameter][k]) for k, v in before.items())


def test_state_survives(tmp_path: Path) -> None:
    guard = GradientGuard(spike_after=2)
    with pytest.warns(UserWarning, match="was skipped"):
        fit(tmp_path, guard, {5: float("nan")})
    other = GradientGuard()
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    assert other.skipped == 1


def test_norm_is_that_of_all_gradients() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    assert gradient_norm(optimizer) is None
    net(torch.randn(4, 3)).sum().backward()
    flat = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    torch.testing.assert_close(gradient_norm(optimizer), flat.norm())


@pytest.mark.parametrize("settings", [{"on_bad": "ignore"}, {"spike": 0.5}, {"max_in_a_row": 0}, {"check_every": 0}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(UserError):
        GradientGuard(**settings)
