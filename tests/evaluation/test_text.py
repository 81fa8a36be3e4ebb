"""Text to image, and latents: from captions to CLIPScore and CMMD, against transformers' own way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.stand_ins import smooth_images
from networks import perturbed
from torch import Tensor

from diffzoo.encoders import AutoencoderSpec
from diffzoo.evaluation import EvalProtocol, Reference, RunOptions, evaluate
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.generation import Generator
from diffzoo.generation.plan import default_plan
from diffzoo.images import to_uint8, write_npz
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.process import GaussianProcess
from diffzoo.sampling import DDIM
from diffzoo.zoo import load_any, save_pretrained

CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue", "pale") for thing in ("cat", "house", "tree", "moon")]


class Words:
    """A text encoder that turns a caption into noise of its own."""

    width, max_tokens = 8, 5

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        seeds = [int.from_bytes(c.encode()[-6:], "big") for c in captions]
        rows = [torch.randn(5, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows), torch.ones(len(captions), 5, dtype=torch.bool)

    def null(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(count, 5, 8), torch.ones(count, 5, dtype=torch.bool)

    def to(self, device: Any) -> "Words":
        return self


class Doubling:
    """An autoencoder that draws every latent pixel as four."""

    id, ratio, channels = "doubling", 2, 3

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def to(self, device: Any) -> "Doubling":
        return self


def clip_folder(folder: Path, size: int) -> Path:
    """A small CLIP with random weights in transformers' layout; its tokens are bytes."""
    from transformers import CLIPConfig, CLIPModel

    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 256) if c != 173]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_factor": 3.0,
    }
    end = len(vocabulary) - 1
    torch.manual_seed(size + 3)
    config = CLIPConfig(
        text_config={**small, "vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end},
        vision_config={**small, "image_size": size, "patch_size": 56},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("clip")
    return {
        "clip-vitl14": str(clip_folder(folder / "224", 224)),
        "clip-vitl14-336": str(clip_folder(folder / "336", 336)),
    }


def source(folder: Path, latent: bool = False) -> ModelImages:
    torch.manual_seed(0)
    config = UViTBaoConfig(
        image_size=8, in_channels=3, patch=4, width=32, depth=3, heads=2, text_width=8, text_tokens=5
    )
    save_pretrained(perturbed(UViTBao(config), 0.05), folder / "model", process=GaussianProcess())
    loaded = load_any(folder / "model")
    if latent:
        loaded = replace(loaded, metadata=replace(loaded.metadata, autoencoder=AutoencoderSpec("doubling", 1.0)))
    generator = Generator.of(loaded, "cpu", Doubling() if latent else None, Words())
    plan = default_plan(str(folder / "model"), loaded.metadata, sampler=DDIM(2), guidance={"scale": 3.0})
    return ModelImages(plan, "cpu", CAPTIONS, generator)


def reference(folder: Path, size: int) -> Reference:
    return Reference.open(write_npz(folder / "r.npz", [to_uint8(smooth_images(range(20), size))], 20))


def in_transformers(weights: str, pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Normalised embeddings of images and captions, with transformers' own preparation."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    images = processor([p.permute(1, 2, 0).numpy() for p in pixels], return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(weights)(CAPTIONS[: len(pixels)], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(weights).eval()(pixel_values=images, **tokens)
    return out.image_embeds, out.text_embeds


def test_captions_to_scores(tmp_path: Path, weights: dict[str, str]) -> None:
    p = EvalProtocol("text", "images", 12, ("clip_score", "cmmd"), image_size=8)
    settings = RunOptions(tmp_path, block_size=5, weights=weights, groups=3, keep_images=True)
    result = evaluate(source(tmp_path), p, reference(tmp_path, 8), settings)
    assert result.plan.labels == "captions"
    assert len(result.plan.captions_sha256) == 64
    with np.load(tmp_path / "samples.npz") as archive:
        pixels = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2)
    images, texts = in_transformers(weights["clip-vitl14"], pixels, 224)
    want = 100 * (images * texts).sum(1).clamp(min=0).mean()
    assert result.values["clip_score"].value == pytest.approx(float(want), abs=0.8)  # transformers resizes in 8 bits
    wrong = [100 * (images * texts.roll(k, 0)).sum(1).clamp(min=0).mean() for k in range(1, 12)]
    assert max(abs(float(w - want)) for w in wrong) > 2  # the check can fail: captions matter
    x, _ = in_transformers(weights["clip-vitl14-336"], pixels, 336)
    y, _ = in_transformers(weights["clip-vitl14-336"], to_uint8(smooth_images(range(12), 8)), 336)
    more, _ = in_transformers(weights["clip-vitl14-336"], to_uint8(smooth_images(range(12, 20), 8)), 336)
    y = torch.cat([y, more])
    kernels = [
        torch.exp(-torch.cdist(a.double(), b.double()).square() / 200).mean() for a, b in ((x, x), (y, y), (x, y))
    ]
    assert result.values["cmmd"].value == pytest.approx(
        1000 * float(kernels[0] + kernels[1] - 2 * kernels[2]), rel=0.05
    )
    assert result.values["cmmd"].standard_error > 0


def test_latents_are_decoded_before_they_are_measured(tmp_path: Path) -> None:
    made = source(tmp_path, latent=True)
    plain = source(tmp_path / "plain")
    assert made.image_size == 16
    assert torch.equal(made.images(3, 4), Doubling().decode(plain.images(3, 4)))
    p = EvalProtocol("latent", "images", 12, ("precision:random-conv",), image_size=16)
    result = evaluate(made, p, reference(tmp_path, 16), RunOptions(tmp_path, groups=0))
    assert result.plan.autoencoder == "doubling"
    assert result.plan.sha256 != plain.plan().sha256
