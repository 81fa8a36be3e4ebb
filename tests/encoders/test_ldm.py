"""Autoencoders in latent diffusion's layout, against a second implementation of their architecture."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffzoo.cli.main import main
from diffzoo.encoders import AutoencoderSpec
from diffzoo.errors import UserError
from diffzoo.zoo import manifest

pytest.importorskip("diffusers")

State = dict[str, Tensor]
WIDTHS, DEPTH, CHANNELS = (32, 32, 64), 1, 6  # attention at the last level, as VA-VAE has it


def random_state() -> State:
    """Tensors under the names of arXiv:2112.10752's code."""
    draw = torch.Generator().manual_seed(5)
    state: State = {}

    def add(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=draw) / (shape[1] * shape[2] * shape[3]) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=draw)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=draw)

    def block(name: str, old: int, new: int) -> None:
        norm(f"{name}.norm1", old)
        add(f"{name}.conv1", new, old, 3, 3)
        norm(f"{name}.norm2", new)
        add(f"{name}.conv2", new, new, 3, 3)
        if old != new:
            add(f"{name}.nin_shortcut", new, old, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    def ends(side: str) -> None:
        block(f"{side}.mid.block_1", WIDTHS[-1], WIDTHS[-1])
        attention(f"{side}.mid.attn_1", WIDTHS[-1])
        block(f"{side}.mid.block_2", WIDTHS[-1], WIDTHS[-1])

    add("encoder.conv_in", WIDTHS[0], 3, 3, 3)
    last = len(WIDTHS) - 1
    for i, width in enumerate(WIDTHS):
        block(f"encoder.down.{i}.block.0", WIDTHS[max(i - 1, 0)], width)
        if i < last:
            add(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    attention(f"encoder.down.{last}.attn.0", WIDTHS[-1])
    ends("encoder")
    norm("encoder.norm_out", WIDTHS[-1])
    add("encoder.conv_out", 2 * CHANNELS, WIDTHS[-1], 3, 3)
    add("quant_conv", 2 * CHANNELS, 2 * CHANNELS, 1, 1)
    add("post_quant_conv", CHANNELS, CHANNELS, 1, 1)
    add("decoder.conv_in", WIDTHS[-1], CHANNELS, 3, 3)
    ends("decoder")
    for i in reversed(range(len(WIDTHS))):
        for j in range(DEPTH + 1):
            block(f"decoder.up.{i}.block.{j}", WIDTHS[min(i + 1, last)] if j == 0 else WIDTHS[i], WIDTHS[i])
            if i == last:
                attention(f"decoder.up.{i}.attn.{j}", WIDTHS[i])
        if i:
            add(f"decoder.up.{i}.upsample.conv", WIDTHS[i], WIDTHS[i], 3, 3)
    norm("decoder.norm_out", WIDTHS[0])
    add("decoder.conv_out", 3, WIDTHS[0], 3, 3)
    return state


class Reference:
    """What these tensors compute."""

    def __init__(self, state: State):
        self.state = state

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **options})

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, dim=-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.attention(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv("encoder.conv_in", x)
        for i in range(len(WIDTHS)):
            x = self.block(f"encoder.down.{i}.block.0", x)
            if i == len(WIDTHS) - 1:
                x = self.attention(f"encoder.down.{i}.attn.0", x)
            else:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        mean, logvar = self.conv("quant_conv", self.conv("encoder.conv_out", x)).chunk(2, dim=1)
        return mean, logvar.mul(0.5).exp()

    def decode(self, z: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for i in reversed(range(len(WIDTHS))):
            for j in range(DEPTH + 1):
                x = self.block(f"decoder.up.{i}.block.{j}", x)
                if i == len(WIDTHS) - 1:
                    x = self.attention(f"decoder.up.{i}.attn.{j}", x)
            if i:
                x = self.conv(f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2.0))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


MEAN = torch.linspace(-1, 2, CHANNELS).view(1, -1, 1, 1)
STD = torch.linspace(0.5, 3, CHANNELS).view(1, -1, 1, 1)


def lightning_dit(folder: Path, state: State) -> AutoencoderSpec:
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}}, folder / "vae.pt")
    torch.save({"mean": MEAN, "std": STD}, folder / "latents_stats.pt")
    return AutoencoderSpec(str(folder), 1.0, kind="ldm", file="vae.pt", statistics="latents_stats.pt")


def repa_e(folder: Path, state: State) -> AutoencoderSpec:
    torch.save(state, folder / "vae.pt")
    torch.save({"latents_bias": MEAN, "latents_scale": 1 / STD}, folder / "vae-latents-stats.pt")
    return AutoencoderSpec(str(folder), 1.0, kind="ldm", file="vae.pt", statistics="vae-latents-stats.pt")


def repa_e_training(folder: Path, state: State) -> AutoencoderSpec:
    ema = {"bn.running_mean": MEAN.flatten(), "bn.running_var": STD.flatten() ** 2}
    torch.save({"ema": ema, "vae": state, "steps": 400_000}, folder / "0400000.pt")
    return AutoencoderSpec(str(folder), 1.0, kind="ldm", file="0400000.pt")


@pytest.mark.parametrize("written", [lightning_dit, repa_e, repa_e_training])
def test_latents_and_images_are_those_of_the_architecture(
    tmp_path: Path, written: Callable[[Path, State], AutoencoderSpec]
) -> None:
    state = random_state()
    spec, reference = written(tmp_path, state), Reference(state)
    ours = spec.build()
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = ours.encode(images)
    own_mean, own_std = reference.encode(images)
    assert (ours.ratio, ours.channels, mean.shape) == (4, CHANNELS, (2, CHANNELS, 4, 6))
    torch.testing.assert_close(mean, (own_mean - MEAN) / STD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, own_std / STD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.decode(mean), reference.decode(own_mean), rtol=1e-4, atol=1e-4)
    assert getattr(ours, "spec", None) == spec
    assert ours.hash == spec.build().hash
    assert ours.id == f"{tmp_path}/{spec.file}@local" + (
        f", normalised by {spec.statistics}" if spec.statistics else ""
    )


def test_latents_are_cached_with_the_autoencoder_of_published_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, item = lightning_dit(tmp_path, random_state()), manifest.find_pretrained("lightningdit_xl_256")
    stated = replace(item, metadata=replace(item.metadata, autoencoder=spec))
    monkeypatch.setattr(
        manifest, "find_pretrained", {item.name: stated, "adm_64": manifest.find_pretrained("adm_64")}.get
    )
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in "xy":
        Image.new("RGB", (16, 16), "teal").save(tmp_path / "images" / "a" / f"{name}.png")
    encode = ["data", "encode", str(tmp_path / "images"), "--size", "16", "--workers", "0", "--no-flips"]
    assert main([*encode, "--out", str(tmp_path / "cache"), "--autoencoder", item.name]) == 0
    assert spec.build().hash in (tmp_path / "cache" / "train" / "passport.json").read_text()
    assert main([*encode, "--out", str(tmp_path / "none"), "--autoencoder", "adm_64"]) == 2
    assert "adm_64 samples pixels and has no autoencoder" in capsys.readouterr().err


def test_files_that_hold_no_such_autoencoder_are_named(tmp_path: Path) -> None:
    state = random_state()
    spec = lightning_dit(tmp_path, {k: v for k, v in state.items() if k != "decoder.mid.attn_1.q.bias"})
    with pytest.raises(UserError, match=r"vae\.pt: missing decoder\.mid\.attn_1\.q\.bias"):
        _ = spec.build().channels
    torch.save({"weight": torch.zeros(2)}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}/vae\.pt does not hold an autoencoder"):
        _ = spec.build().channels
