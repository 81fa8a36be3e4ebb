"""Several sources of one entry: whichever answers, the converted weights are the same, and are compared."""

import io
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiTTransformer2DModel
from hub_server import FakeHub
from networks import perturbed
from safetensors.torch import save
from torch import Tensor
from zoo_entry import ENTRY

from diffzoo import create_model
from diffzoo.cache import cache_dir
from diffzoo.errors import UserError
from diffzoo.models import dit, registry
from diffzoo.models.dit import DiT, DiTConfig
from diffzoo.tensors import state_sha256
from diffzoo.typing import Condition
from diffzoo.zoo import load_any, manifest, verify
from diffzoo.zoo.converters import dit as authors
from diffzoo.zoo.converters import dit_diffusers
from diffzoo.zoo.converters import guided_diffusion as adm_layout
from diffzoo.zoo.fetch import HashMismatchError

CONFIG = dit.TINY.override(num_classes=1000, learned_variance=True)
PROCESS = {"prediction": "Eps", "noise_conditioning": {"class": "TimeConditioning", "scale": 1000.0, "offset": -1.0}}


@pytest.fixture
def state(own_registry: None) -> dict[str, Tensor]:
    """Weights of a small DiT, which is registered as `dit_tiny`."""
    registry.register_model("dit_tiny", DiT, CONFIG)
    torch.manual_seed(0)
    return {k: torch.randn_like(v) * 0.1 for k, v in DiT(CONFIG).state_dict().items()}


@pytest.fixture
def sources(hub: FakeHub, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An entry whose authors give a pickle and whose mirror gives diffusers' layout in safetensors."""
    buffer = io.BytesIO()
    torch.save({"ema": authors.to_official(state, CONFIG)}, buffer)
    hub.files["w.pt"] = buffer.getvalue()
    hub.files["m.safetensors"] = save(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in dit_diffusers.to_official(state, CONFIG).items()}
    )
    entry = {
        **ENTRY, "model": "dit_tiny", "converter": "dit", "process": PROCESS, "class_names": "imagenet-1k",
        "source": {"url": f"{hub.url}/files/w.pt"},
        "mirrors": [{"url": f"{hub.url}/files/m.safetensors", "converter": "dit_diffusers"}],
    }  # fmt: skip
    entries = manifest.parse_manifest(yaml.safe_dump({"dit_tiny.test": entry}))
    monkeypatch.setattr(manifest, "_load", lambda path: entries)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dit_tiny.test is")
        yield hub


def forget(*, pins: bool = False) -> None:
    """Empty the cache, but for what was recorded on the first download."""
    folder = cache_dir() / "dit_tiny.test"
    for path in folder.glob("*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif pins or not path.name.startswith("pin"):
            path.unlink()


def loaded() -> tuple[dict[str, Tensor], str]:
    found = load_any("dit_tiny.test")
    return found.network.state_dict(), str(found.provenance.source)


def test_the_converter_agrees_with_diffusers_own_network() -> None:
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=1000, norm_eps=1e-6, activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    perturbed(theirs, 0.05)
    for block in theirs.transformer_blocks:  # it spaces the frequencies of time by half - 1, the authors' code by half
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    tensors = theirs.state_dict()
    for name in list(tensors):  # diffusers trains copies of one embedding
        if ".norm1.emb." in name:
            tensors[name].copy_(tensors[f"transformer_blocks.0.{name.split('.', 2)[2]}"])
    config = DiTConfig(8, 4, num_classes=1000, width=32, depth=3, heads=4, learned_variance=True)
    ours = DiT(config).eval()
    ours.load_state_dict(dit_diffusers.from_official(tensors, config))
    z, label, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 1000]), torch.tensor([7, 801])
    with torch.no_grad():
        got, want = ours(z, t.float(), Condition(label=label)), theirs(z, t, label).sample
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(UserError, match="not the same as in the first block"):
        dit_diffusers.from_official(tensors, config)


@pytest.mark.parametrize("gone", ["", "w.pt", "m.safetensors"])
def test_whichever_answers_gives_the_same_weights(sources: FakeHub, state: dict[str, Tensor], gone: str) -> None:
    sources.files.pop(gone, None)
    weights, source = loaded()
    assert source.endswith("m.safetensors" if gone == "w.pt" else "w.pt")
    assert state_sha256(weights) == state_sha256(state)
    assert verify.verify("dit_tiny.test").ok


def test_a_mirror_with_other_weights_is_refused(sources: FakeHub, state: dict[str, Tensor]) -> None:
    loaded()
    forget()
    del sources.files["w.pt"]
    other = {k: v + 1e-3 for k, v in state.items()}
    sources.files["m.safetensors"] = save(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in dit_diffusers.to_official(other, CONFIG).items()}
    )
    with pytest.raises(UserError, match=f"expected converted weights of sha256 {state_sha256(state)}"):
        loaded()
    forget(pins=True)
    loaded()  # nothing is known of them without the authors' file


def test_a_changed_file_is_refused_whichever_source_it_comes_from(sources: FakeHub) -> None:
    missing = sources.files.pop("w.pt")
    loaded()
    forget()
    sources.files["m.safetensors"] += b" "
    with pytest.raises(HashMismatchError, match=r"m\.safetensors is not the file that an earlier download knows"):
        loaded()
    forget()
    sources.files["w.pt"] = missing
    assert loaded()[1].endswith("w.pt")


def test_the_first_reason_and_all_places_are_said(sources: FakeHub) -> None:
    sources.files.clear()
    with pytest.raises(UserError, match=r"w\.pt.* answered 404.*nor can it be had from .*/m\.safetensors"):
        loaded()


def test_a_file_in_the_layout_of_a_mirror_is_read(sources: FakeHub, state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(sources.files["m.safetensors"])
    mine = create_model("dit_tiny", pretrained=tmp_path / "diffusion_pytorch_model.safetensors")
    assert state_sha256(mine.state_dict()) == state_sha256(state)


def test_jit_weights_of_a_mirror_have_another_prefix() -> None:
    config = dit.TINY_JIT
    state: dict[str, Any] = DiT(config).state_dict()
    theirs = authors.to_official(state, config)
    for prefix in ("", "net.", "transformer."):
        back = authors.from_official({prefix + k: v for k, v in theirs.items()}, config)
        assert state_sha256(back) == state_sha256(state)


@pytest.mark.parametrize(
    ("asked", "given", "converter"),
    [("sit_s_256", "jit_l_512", authors), ("edm_64", "adm_64", adm_layout)],
)
def test_a_file_of_another_model_says_which_it_is(asked: str, given: str, converter: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = registry.build(given)
    state = converter.to_official(network.state_dict(), network.config)
    torch.save({"ema": {k: torch.zeros(()).expand(v.shape) for k, v in state.items()}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w\.pt holds the weights of another model than {asked}: .*{given}"):
        create_model(asked, pretrained=tmp_path / "w.pt")
