"""The text-to-image recipes, end to end on the demo's captions: small networks, and small encoders of the real kinds.

Captions are encoded by CLIP or T5 with random weights, some are dropped in the training step, a checkpoint is written,
and the run samples for captions it never saw, through the encoder that the checkpoint names.
"""

from pathlib import Path

import pytest
import torch
from encoders import test_text

from diffzoo import load_any, pipeline
from diffzoo.cli.main import main
from diffzoo.encoders import AutoencoderSpec
from diffzoo.models import registry
from diffzoo.models.simple_uvit import TINY_TEXT, SimpleUViT
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig

clip_folder, t5_folder = test_text.clip_folder, test_text.t5_folder  # fixtures
# Lightning's own: few workers, deprecated parts of torch
pytestmark = [
    pytest.mark.usefixtures("without_report"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

CALLBACKS = (
    "[{class_path: EMA, init_args: {decays: [0.5]}}, "
    "{class_path: SampleGrid, init_args: {every_n_steps: 2, guidance: 2.0}}]"
)
SMALL = {
    "trainer.max_steps": "2",
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.limit_val_batches": "0",
    "trainer.callbacks": CALLBACKS,
    "data": "DemoData",
    "data.init_args.batch_size": "8",
    "data.init_args.num_workers": "0",
    "model.lr_scheduler.init_args.warmup_steps": "1",
    "model.optimizer.init_args.lr": "0.01",  # text enters through layers that begin at zero
    "model.condition_dropout": "0.5",
}


def fit(recipe: str, run: Path, **changes: str) -> Path:
    options = {**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}}
    assert main(["fit", "-c", recipe, "--run", str(run), *(f"--{k}={v}" for k, v in options.items())]) == 0
    assert list((run / "samples").glob("*.png"))  # previews show captions
    return run


def check(run: Path, encoder: str, folder: Path, size: int, tmp_path: Path) -> None:
    loaded = load_any(run)
    assert loaded.metadata.text_encoder is not None
    assert (loaded.metadata.text_encoder.encoder, loaded.metadata.text_encoder.source) == (encoder, str(folder))
    pipe = pipeline(run, "cpu")
    assert pipe.generator.kind == "caption"
    captions = ["a cat on a bench", "a red dog"]
    images = pipe(captions, seeds=[0, 1], steps=2, guidance=4.0)
    assert images.pixels.shape == (4, size, size, 3)
    assert images.labels[::2] == captions
    assert images.records[0]["text_encoder"]["source"] == str(folder)
    # each caption has its say, and an image does not depend on the captions beside it
    denoise, rows = pipe.generator.denoiser, pipe.generator.captions(captions)
    config = pipe.network.config
    z = torch.randn(1, config.in_channels, config.image_size, config.image_size).expand(2, -1, -1, -1)
    eps = denoise(z, torch.tensor(0.5), rows).eps.detach()
    assert not torch.allclose(eps[0], eps[1], atol=1e-6)
    one = denoise(z[:1], torch.tensor(0.5), pipe.generator.captions(captions[1:])).eps.detach()
    torch.testing.assert_close(one[0], eps[1], rtol=1e-4, atol=1e-5)
    options = ["--classes", *captions, "--seeds", "0", "--steps", "2", "--device", "cpu", "--quiet"]
    assert main(["sample", str(run), *options, "--out", str(tmp_path / "grid.png")]) == 0


@pytest.mark.parametrize("size", [256, 512])
def test_pixels_with_t5(size: int, t5_folder: Path, tmp_path: Path, own_registry: None) -> None:
    del registry._REGISTRY[f"simple_uvit_t2i_{size}"]
    registry.register_model(f"simple_uvit_t2i_{size}", SimpleUViT, TINY_TEXT.override(text_width=16))
    coarse = {"model__loss_resolutions": f"[{TINY_TEXT.image_size // 2},{TINY_TEXT.image_size}]"} if size == 512 else {}
    run = fit(
        f"coco{size}/simple_uvit_t2i",
        tmp_path / "run",
        **coarse,
        trainer__strategy="auto",  # the recipe's shards a network of 3 B parameters
        model__text_encoder__init_args__source=str(t5_folder),
        model__text_encoder__init_args__max_tokens="6",
        model__sampler__init_args__steps="2",
        data__init_args__image_size=str(TINY_TEXT.image_size),
    )
    check(run, "T5Encoder", t5_folder, TINY_TEXT.image_size, tmp_path)


def test_latents_with_clip(clip_folder: Path, tmp_path: Path, own_registry: None) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(tmp_path / "vae")
    del registry._REGISTRY["uvit_bao_t2i_s_256"]
    config = UViTBaoConfig(image_size=8, in_channels=4, width=32, depth=3, heads=4, text_width=16, text_tokens=16)
    registry.register_model("uvit_bao_t2i_s_256", UViTBao, config)
    run = fit(
        "coco256/uvit_bao_s",
        tmp_path / "run",
        model__text_encoder__init_args__source=str(clip_folder),
        model__autoencoder__init_args__repo=str(tmp_path / "vae"),
        model__sampler__init_args__steps="2",
        data__init_args__image_size="64",
    )
    check(run, "CLIPEncoder", clip_folder, 64, tmp_path)
    assert load_any(run).metadata.autoencoder == AutoencoderSpec(str(tmp_path / "vae"), 0.2301)
