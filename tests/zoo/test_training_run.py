"""A checkpoint of a real training run is a source: network, EMA, process, sampler, frozen encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data.stand_ins import quiet_trainer

from diffzoo import GaussianProcess, load_any, pipeline
from diffzoo.encoders import AutoencoderSpec, Identity, KLAutoencoder
from diffzoo.models import uvit_bao
from diffzoo.process import V
from diffzoo.sampling import DDIM

CONFIG = uvit_bao.UViTBaoConfig(image_size=8, in_channels=3, num_classes=3, width=32, depth=3, heads=4)


class Rows(torch.utils.data.Dataset):
    """Eight random images with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return {
            "image": image,
            "label": torch.tensor(index % 3),
            "index": torch.tensor(index),
            "id": torch.tensor(index),
        }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    from diffzoo.training.ema import EMA
    from diffzoo.training.module import DiffusionModule

    module = DiffusionModule(
        uvit_bao.UViTBao(CONFIG), process=GaussianProcess(prediction=V()), sampler=DDIM(steps=3, clip=1.0)
    )
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[EMA(decays=[0.5])])
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=4))
    object.__setattr__(module, "autoencoder", KLAutoencoder("a/vae", 0.2, subfolder="vae"))
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


# Lightning's own: few workers, deprecated parts of torch
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_run_is_loaded_and_sampled_from(run: Path) -> None:
    loaded = load_any(run)
    raw = load_any(run, weights="raw").network.state_dict()
    average = loaded.network.state_dict()
    assert loaded.network.config == CONFIG
    assert loaded.process == GaussianProcess(prediction=V())
    assert loaded.metadata.default_sampler == DDIM(steps=3, clip=1.0)
    assert loaded.metadata.autoencoder == AutoencoderSpec("a/vae", 0.2, subfolder="vae")
    assert any(not torch.equal(average[k], raw[k]) for k in raw)
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(raw[k], held[f"network.{k}"]) for k in raw)
    assert pipeline(run, "cpu", autoencoder=Identity())([0, 2], seeds=[1]).pixels.shape == (2, 8, 8, 3)
