"""The autoencoder of latent models: diffusers' own, with unit-variance latents, a pinned revision and a hash."""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub

from diffzoo.encoders import Autoencoder, AutoencoderSpec, Identity, KLAutoencoder, RepresentationAutoencoder
from diffzoo.errors import MissingExtraError, UserError

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised autoencoder of Stable Diffusion's architecture, narrower, on disk."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=256,
    ).save_pretrained(path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 48) * 2 - 1


def test_moments_and_images_are_those_of_diffusers(folder: Path, images: torch.Tensor) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder).eval()
    ours = KLAutoencoder(str(folder), scaling_factor=0.18215, batch_size=2)
    assert isinstance(ours, Autoencoder)
    assert (ours.ratio, ours.channels) == (8, 4)
    mean, std = ours.encode(images)
    with torch.no_grad():
        expected = theirs.encode(images).latent_dist
        decoded = theirs.decode(expected.mean).sample
    assert mean.shape == (3, 4, 4, 6)
    torch.testing.assert_close(mean, expected.mean * 0.18215, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(std, expected.std * 0.18215, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.decode(mean), decoded, rtol=1e-4, atol=1e-5)
    assert not torch.is_grad_enabled() or not ours.decode(mean).requires_grad


def test_an_image_does_not_depend_on_its_batch(folder: Path, images: torch.Tensor) -> None:
    alone, together = KLAutoencoder(str(folder), batch_size=1), KLAutoencoder(str(folder), batch_size=8)
    torch.testing.assert_close(alone.encode(images)[0], together.encode(images)[0], rtol=1e-4, atol=1e-6)


def test_half_precision_gives_float32_results(folder: Path, images: torch.Tensor) -> None:
    mean, _ = KLAutoencoder(str(folder), dtype="bfloat16").encode(images)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, KLAutoencoder(str(folder)).encode(images)[0], rtol=0.1, atol=0.02)


def test_the_hash_follows_weights_and_scaling_factor(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    first = KLAutoencoder(str(folder), scaling_factor=0.18215)
    assert len(first.hash) == 64
    assert first.hash == KLAutoencoder(str(folder), scaling_factor=0.18215, dtype="bfloat16").hash
    assert first.hash != KLAutoencoder(str(folder), scaling_factor=0.2301).hash
    other = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    other.save_pretrained(tmp_path)
    assert first.hash != KLAutoencoder(str(tmp_path), scaling_factor=0.18215).hash


def test_latents_are_normalised_channel_by_channel_and_images_in_another_range(
    folder: Path, images: torch.Tensor
) -> None:
    """EDM2's numbers: z = (own - m) 0.5 / r of images in [0, 1]; what comes back is the plain autoencoder's image."""
    m, r = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
    spec = AutoencoderSpec(str(folder), 0.5, mean=m, std=r, pixels="[0, 1]")
    ours, plain = spec.build(), KLAutoencoder(str(folder), scaling_factor=1.0)
    assert ours.spec == spec
    own, spread = plain.encode((images + 1) / 2)
    mean, std = ours.encode(images)
    for c in range(4):
        torch.testing.assert_close(mean[:, c], (own[:, c] - m[c]) * 0.5 / r[c], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std[:, c], spread[:, c] * 0.5 / r[c], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.decode(mean), 2 * plain.decode(own) - 1, rtol=1e-4, atol=1e-5)
    plain_half = KLAutoencoder(str(folder), scaling_factor=0.5)
    assert len({ours.hash, plain_half.hash, AutoencoderSpec(str(folder), 0.5, mean=m, std=r).build().hash}) == 3
    assert "mean [5.81" in ours.id
    assert plain_half.id.endswith("x0.5")
    with pytest.raises(UserError, match="has 4 channels: give mean and std of each"):
        KLAutoencoder(str(folder), std=[1.0, 2.0]).decode(mean)


def test_rae_is_diffusers_own(tmp_path: Path) -> None:
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    theirs = AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=2, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=64, encoder_input_size=56, patch_size=16,
        latents_mean=torch.randn(64, 4, 4), latents_std=torch.rand(64, 4, 4) + 0.5,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    spec = AutoencoderSpec(str(tmp_path), 1.0, kind="rae")
    ours = spec.build()
    assert isinstance(ours, RepresentationAutoencoder)
    assert (ours.ratio, ours.channels, ours.spec) == (16, 64, spec)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        want = theirs.encode((images + 1) / 2).latent
        decoded = 2 * theirs.decode(want).sample - 1
    mean, std = ours.encode(images)
    torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-5)
    assert not std.any()
    torch.testing.assert_close(ours.decode(mean), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 4, 32, 32)])
def test_images_that_do_not_fit_are_named(folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected images .* multiples of 8, got"):
        KLAutoencoder(str(folder)).encode(torch.zeros(shape))


def test_latents_that_do_not_fit_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="expected latents of 4 channels"):
        KLAutoencoder(str(folder)).decode(torch.zeros(1, 3, 4, 4))


def test_a_missing_extra_is_named_and_only_on_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    autoencoder = KLAutoencoder(str(folder))
    with pytest.raises(MissingExtraError, match=r"diffzoo\[latent\]"):
        autoencoder.decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "sentence"), [({"scaling_factor": 0.0}, "must be positive"), ({"dtype": "int8"}, "expected dtype")]
)
def test_bad_arguments_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        KLAutoencoder("a/b", **arguments)


def test_a_folder_that_is_no_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not hold an autoencoder in diffusers' layout"):
        _ = KLAutoencoder(str(tmp_path)).model
    with pytest.raises(UserError, match="there is no folder"):
        _ = KLAutoencoder("nowhere").model


def test_pixel_space_changes_nothing(images: torch.Tensor) -> None:
    identity = Identity()
    mean, std = identity.encode(images)
    assert isinstance(identity, Autoencoder)
    assert torch.equal(identity.decode(mean), images)
    assert float(std.abs().max()) == 0


# -- the Hub


@pytest.fixture
def unpinned() -> Iterator[None]:
    """The loud warning on first use, expected and silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a/vae is unpinned")
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub() as server:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + p.name: p.read_bytes() for p in folder.iterdir()}


def other_tool_fetches(hub: FakeHub, repo: str, home: Path) -> str:
    """What any program that uses the same cache does: the client's note of the branch moves."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, cache_dir=home / "hub", endpoint=hub.url)).name


def test_the_first_revision_is_kept_and_named(folder: Path, hub: FakeHub, images: torch.Tensor, tmp_path: Path) -> None:
    first = hub.add_repo("a/vae", files(folder))
    with pytest.warns(UserWarning, match=f"a/vae is unpinned .* recorded on first download as revision {first}"):
        expected = KLAutoencoder("a/vae").encode(images)[0]
    second = hub.add_repo("a/vae", {"config.json": b"{}"})  # the repository moves on
    assert other_tool_fetches(hub, "a/vae", tmp_path / "home") == second
    later = KLAutoencoder("a/vae")  # a second warning would be an error here
    assert torch.equal(later.encode(images)[0], expected)
    assert later.id == f"a/vae@{first} x0.18215"
    record = json.loads((tmp_path / "home" / "diffzoo" / "companions" / "a--vae.json").read_text())
    weights = "diffusion_pytorch_model.safetensors"
    sha = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
    assert record == {"revision": first, "files": {weights: sha}}


def test_weights_that_changed_under_their_revision_are_refused(
    folder: Path, hub: FakeHub, unpinned: None, tmp_path: Path
) -> None:
    hub.add_repo("a/vae", files(folder))
    _ = KLAutoencoder("a/vae").model
    file = next((tmp_path / "home" / "hub").rglob("diffusion_pytorch_model.safetensors")).resolve()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not the file that was recorded on first download: expected sha256"):
        _ = KLAutoencoder("a/vae").model


def test_a_damaged_record_is_named(folder: Path, hub: FakeHub, unpinned: None, tmp_path: Path) -> None:
    hub.add_repo("a/vae", files(folder))
    _ = KLAutoencoder("a/vae").model
    record = tmp_path / "home" / "diffzoo" / "companions" / "a--vae.json"
    record.write_text('{"revision": 3}')
    with pytest.raises(UserError, match=r"a--vae\.json is damaged: delete it to record what is there anew"):
        _ = KLAutoencoder("a/vae").model


def test_a_pinned_revision_is_fetched(folder: Path, hub: FakeHub) -> None:
    first = hub.add_repo("a/vae", files(folder, "vae/"))
    hub.add_repo("a/vae", {"vae/config.json": b"{}"})
    autoencoder = KLAutoencoder("a/vae", revision=first, subfolder="vae")
    assert autoencoder.id == f"a/vae/vae@{first} x0.18215"


def test_warm_and_offline_works_and_cold_says_what_is_missing(
    folder: Path, hub: FakeHub, images: torch.Tensor, unpinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("a/vae", files(folder))
    expected = KLAutoencoder("a/vae").encode(images)[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.log.clear()
    assert torch.equal(KLAutoencoder("a/vae").encode(images)[0], expected)
    assert not hub.log
    with pytest.raises(UserError, match=r"offline .* the autoencoder a/other is not in the cache"):
        _ = KLAutoencoder("a/other").model


def test_a_gated_autoencoder_is_said(folder: Path, hub: FakeHub) -> None:
    hub.add_repo("a/vae", files(folder), gated=True)
    with pytest.raises(UserError, match="a/vae is gated: accept its conditions"):
        _ = KLAutoencoder("a/vae").model
