"""Exports that need no diffzoo: ONNX, torch.export and diffusers give what the network gives here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import perturbed

from diffzoo import GaussianProcess, pipeline
from diffzoo.cli.main import main
from diffzoo.encoders.autoencoder import AutoencoderSpec
from diffzoo.interop import KDenoiser
from diffzoo.models import dit
from diffzoo.process import DiscreteBetas, Eps, TimeConditioning
from diffzoo.rng import ImageNoise
from diffzoo.zoo import save_pretrained

SHIPPED = "simple_uvit_xs_32.emoji"


def inputs(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    sigma = torch.logspace(-1.5, 1.5, count)
    x = torch.randn(count, 3, 32, 32, generator=generator) * (1 + sigma)[:, None, None, None]
    return {"x": x, "sigma": sigma, "label": torch.arange(count) % 10}


@pytest.mark.slow
def test_onnx_says_what_the_network_says_for_any_batch(tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert main(["export", SHIPPED, str(path), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["diffzoo"])
    assert (about["shape"], about["licence"], about["classes"]) == ([3, 32, 32], "MIT", 10)
    model = KDenoiser(pipeline(SHIPPED, "cpu").generator.denoiser)
    for count in (1, 3, 8):
        given = inputs(count)
        with torch.no_grad():
            want = model(**given).numpy()
        got = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
        np.testing.assert_allclose(got, want, atol=1e-4)
    page = (Path(__file__).parents[1] / "docs" / "other-libraries.md").read_text(encoding="utf-8")
    code = page.split("```py\n")[1].split("```")[0].replace("emoji.onnx", str(path)).replace("0.02, 30", "0.02, 8")
    found: dict[str, np.ndarray] = {}
    exec(code, found)
    assert 0.3 < float(found["x"].std()) < 1.2  # images lie in [-1, 1], noise would be of size 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "loading"),
    [([], "torch.export.load({!r}).module()"), (["--compiled"], "torch._inductor.aoti_load_package({!r})")],
    ids=["exported", "compiled"],
)
def test_an_archive_of_torch_needs_no_diffzoo(options: list[str], loading: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt2")
    assert main(["export", SHIPPED, path, "--format", "pt2", *options]) == 0
    given = {count: inputs(count) for count in (1, 3)}
    torch.save(given, tmp_path / "in.pt")
    script = (
        "import sys, torch; sys.modules['diffzoo'] = None\n"
        f"model = {loading.format(path)}\n"
        "given = torch.load('in.pt')\n"
        "torch.save({count: model(**inputs) for count, inputs in given.items()}, 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    model = KDenoiser(pipeline(SHIPPED, "cpu").generator.denoiser)
    for count, got in torch.load(tmp_path / "out.pt").items():
        with torch.no_grad():
            torch.testing.assert_close(got, model(**given[count]), atol=1e-4, rtol=0)


def test_diffusers_samples_the_images_of_a_dit(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DiTPipeline

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, scaling_factor=0.18215
    )
    autoencoder.save_pretrained(tmp_path / "vae")
    config = dit.DiTConfig(
        image_size=8, in_channels=4, num_classes=3, width=32, depth=2, heads=2, learned_variance=True
    )
    network = perturbed(dit.DiT(config), 0.05)
    process = GaussianProcess(
        DiscreteBetas(), prediction=Eps(), noise_conditioning=TimeConditioning(1000, -1), learned_variance=True
    )
    spec = AutoencoderSpec(str(tmp_path / "vae"), 0.18215)
    save_pretrained(network, tmp_path / "dit", process=process, autoencoder=spec, name="dit_s_2_256", licence="mit")
    assert main(["export", str(tmp_path / "dit"), str(tmp_path / "theirs"), "--format", "diffusers"]) == 0
    theirs = DiTPipeline.from_pretrained(tmp_path / "theirs")
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, timestep_spacing="trailing")
    ours = pipeline(tmp_path / "dit", "cpu")
    start = ImageNoise([4]).normal((4, 8, 8))
    want = ours([1], [4], steps=5, sampler="DDIM", guidance=2.0).pixels[0]
    theirs.transformer.config.sample_size = 8
    latents = start.clone()
    got = _sampled_by_their_loop(theirs, latents, 1, 5, 2.0)
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


def _sampled_by_their_loop(theirs: "DiTPipeline", x: torch.Tensor, label: int, steps: int, scale: float) -> np.ndarray:  # type: ignore[name-defined]
    """What `DiTPipeline` does, from a given start and with the guidance on all channels."""
    theirs.scheduler.set_timesteps(steps)
    null = theirs.transformer.config.num_embeds_ada_norm
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            pair = torch.tensor([label, null])
            output = theirs.transformer(torch.cat([x, x]), timestep=t.expand(2), class_labels=pair).sample[:, :4]
            eps = output[1:] + scale * (output[:1] - output[1:])
            x = theirs.scheduler.step(eps, t, x).prev_sample
        image = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample
    return (image.clamp(-1, 1) * 127.5 + 127.5).round().byte()[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["m.onnx", "--format", "pt2"], "expected a file that ends in .pt2, got m.onnx"),
        (["m", "--format", "diffusers"], "diffusers has the layers of DiT alone"),
        (["m.onnx", "--format", "onnx", "--dtype", "bf16"], "--dtype, --guidance and --licence belong to safetensors"),
    ],
)
def test_bad_input_is_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", SHIPPED, *arguments]) == 2
    assert sentence in capsys.readouterr().err
