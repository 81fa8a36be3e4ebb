"""One norm per step: the guard's verdict and clipping share it, and the weights are those of a plain loop."""

from functools import partial
from pathlib import Path

import pytest
import torch
from data.stand_ins import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from diffzoo.models.base import Config, Network
from diffzoo.training import DiffusionModule, FusedAdam, FusedAdamW, GradientGuard


class Tiny(Network):
    def __init__(self, config: Config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z, noise_level, cond=None):
        return self.conv(z)


BATCHES = [
    {"image": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)),
     "index": torch.arange(4 * i, 4 * i + 4)} for i in range(6)
]  # fmt: skip


def made(optimizer) -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(Tiny(Config(image_size=8)), optimizer=optimizer)


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize(
    "optimizer", [FusedAdamW, FusedAdam, partial(torch.optim.AdamW, fused=True), torch.optim.AdamW, torch.optim.SGD]
)
@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipped_steps_are_those_of_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer, guarded: bool, limit: float
) -> None:
    optimizer = partial(optimizer, lr=1e-2)
    expected = made(optimizer)
    plain = optimizer([*expected.network.parameters()])
    for i, batch in enumerate(BATCHES):
        plain.zero_grad()
        expected.training_step({**batch}, i).backward()
        nn.utils.clip_grad_norm_(expected.network.parameters(), limit)
        plain.step()

    norms = []
    total_norm = nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda *a: norms.append(total_norm(*a)) or norms[-1])
    module = made(optimizer)
    callbacks = [GradientGuard()] if guarded else []
    trainer = quiet_trainer(tmp_path, max_steps=len(BATCHES), gradient_clip_val=limit, callbacks=callbacks)
    trainer.fit(module, DataLoader(BATCHES, batch_size=None))
    assert len(norms) == len(BATCHES)
    if limit > 1:
        assert torch.equal(module.network.conv.weight, expected.network.conv.weight)
    torch.testing.assert_close(module.network.conv.weight, expected.network.conv.weight)
    assert not torch.equal(module.network.conv.weight, made(optimizer).network.conv.weight)
