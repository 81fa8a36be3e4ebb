"""From a name to images: classes by name, seeds, guidance in the weights' own formula, latents, PNG records."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffzoo
from diffzoo import Condition, GaussianProcess, pipeline
from diffzoo.cli.main import main
from diffzoo.encoders import Identity, KLAutoencoder
from diffzoo.errors import MissingExtraError, UserError
from diffzoo.generation import Pipeline, Samples
from diffzoo.generation.classes import Classes
from diffzoo.generation.seeds import parse_seeds
from diffzoo.images import LINE, to_uint8
from diffzoo.models import adm, dimr, uvit_bao
from diffzoo.models.base import Level, Network
from diffzoo.process import Eps, V
from diffzoo.record import from_plain
from diffzoo.sampling import DDIM, ClassifierFree, Denoiser, Guidance, sample
from diffzoo.zoo import save_pretrained

NAMES = ("cat", "dog, hound", *(f"thing {i}" for i in range(7)), "Smileys & Emotion")
COND, UNCOND = "cond + s * (cond - uncond)", "uncond + s * (cond - uncond)"


def random_weights(network: Network, seed: int = 5) -> Network:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)  # enough for the class to show
    return network.eval()


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    """A class-conditional model of 8-pixel RGB images, on disk."""
    config = uvit_bao.UViTBaoConfig(image_size=8, in_channels=3, num_classes=10, width=32, depth=3, heads=4)
    folder = tmp_path / "pixels"
    process = GaussianProcess(prediction=V())
    save_pretrained(
        random_weights(uvit_bao.UViTBao(config)),
        folder,
        process=process,
        class_names=NAMES,
        guidance={"formula": COND, "scale": 0.5},
    )
    return folder


@pytest.fixture
def unconditional(tmp_path: Path) -> Path:
    config = uvit_bao.UViTBaoConfig(image_size=8, in_channels=3, width=32, depth=3, heads=4)
    folder = tmp_path / "unconditional"
    save_pretrained(random_weights(uvit_bao.UViTBao(config)), folder, process=GaussianProcess(prediction=V()))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised autoencoder of Stable Diffusion's architecture, narrower, on disk."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(path)
    return path


# -- images


def test_images_are_those_of_the_parts_put_together(pixels: Path) -> None:
    pipe = pipeline(pixels, "cpu")
    images = pipe(["hound", 7], seeds=[3, 4, 9], guidance=1.5, steps=5)
    denoise = ClassifierFree(Denoiser(pipe.network, pipe.process), 1.5, "cond")
    cond = Condition(label=torch.tensor([1, 1, 1, 7, 7, 7]))
    expected = to_uint8(sample(denoise, DDIM(steps=5), (3, 8, 8), [3, 4, 9, 3, 4, 9], cond))
    assert images.pixels.dtype == np.uint8
    assert images.pixels.shape == (6, 8, 8, 3)
    assert np.array_equal(images.pixels, expected.permute(0, 2, 3, 1).numpy())
    assert images.labels == ["dog"] * 3 + ["thing 5"] * 3
    assert np.array_equal(np.asarray(images.pil()[2]), images[2])
    assert len({p.tobytes() for p in images.pixels}) == 6


def test_an_image_does_not_depend_on_the_others(pixels: Path) -> None:
    pipe = pipeline(pixels, "cpu")
    every = pipe([0, 1, 2], seeds=range(4), steps=3).pixels
    assert np.array_equal(pipe(1, seeds=[2], steps=3).pixels[0], every[6])
    assert np.array_equal(pipe([0, 1, 2], seeds=range(4), steps=3, batch_size=5).pixels, every)


def test_the_published_guidance_is_the_default_and_zero_means_none(pixels: Path) -> None:
    pipe = pipeline(pixels, "cpu")
    assert np.array_equal(pipe(3, steps=3).pixels, pipe(3, steps=3, guidance=0.5).pixels)
    assert not np.array_equal(pipe(3, steps=3).pixels, pipe(3, steps=3, guidance=0).pixels)
    calls = 0
    forward = pipe.network.forward

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert len(args[0]) == 1
        return forward(*args)

    pipe.network.forward = counted  # type: ignore[method-assign]
    pipe(3, seeds=[0], steps=3, guidance=0)
    assert calls == 3


def test_the_two_formulas_agree_where_they_should(pixels: Path, tmp_path: Path) -> None:
    first = pipeline(pixels, "cpu")
    network = diffzoo.create_model(f"local-dir:{pixels}")
    save_pretrained(network, tmp_path / "other", guidance={"formula": UNCOND, "scale": 1.0})
    other = pipeline(tmp_path / "other", "cpu")
    assert np.array_equal(first(2, steps=3, guidance=0.4).pixels, other(2, steps=3, guidance=1.4).pixels)


def test_unconditional_models_take_no_classes(unconditional: Path) -> None:
    pipe = pipeline(unconditional, "cpu")
    assert pipe(seeds=range(3), steps=2).pixels.shape == (3, 8, 8, 3)
    with pytest.raises(UserError, match="this model is unconditional: leave out the classes"):
        pipe([1])
    with pytest.raises(UserError, match="no condition that guidance could act on"):
        pipe(guidance=2)


@pytest.mark.parametrize(
    ("wanted", "index"), [("cat", 0), ("Dog", 1), ("hound", 1), ("dog, hound", 1), ("4", 4), (9, 9), (np.int64(2), 2)]
)
def test_classes_have_names_and_numbers(pixels: Path, wanted: Any, index: int) -> None:
    assert pipeline(pixels, "cpu").classes.index(wanted) == index


def test_imagenet_classes_have_their_names(tmp_path: Path) -> None:
    config = uvit_bao.UViTBaoConfig(image_size=8, in_channels=3, num_classes=1000, width=32, depth=3, heads=4)
    save_pretrained(uvit_bao.UViTBao(config), tmp_path, process=GaussianProcess(), class_names="imagenet-1k")
    pipe = pipeline(tmp_path, "cpu")
    assert [pipe.classes.index(c) for c in ("golden retriever", 207, "tench", "Tinca tinca", "great white shark")] == [
        207, 207, 0, 0, 2,
    ]  # fmt: skip
    with pytest.raises(UserError, match="did you mean 'golden retriever'"):
        pipe.classes.index("golden retreiver")
    assert pipe.classes.label(207) == "golden retriever"
    for word, numbers in {"crane": r"134 \(crane\) and 517 \(crane\)", "Maillot": "638 .* and 639 "}.items():
        with pytest.raises(UserError, match=f"'{word}' is the name of several classes, {numbers}"):
            pipe.classes.index(word)
    assert pipe.classes.index("maillot, tank suit") == 639


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": []}, "there are no seeds"),
        ({"sampler": "DIMM"}, "DDIM"),
        ({"classes": None}, "this model samples from a class: say which"),
        ({"classes": ["hounds"]}, "did you mean 'hound'"),
        ({"classes": ["smileys"]}, "did you mean 'Smileys & Emotion'"),
        ({"classes": [10]}, "class 10 is out of range: .* 0 to 9"),
        ({"classes": ["-1"]}, "-1 is"),
        ({"steps": 0}, "at least 1 step"),
    ],
)
def test_bad_requests_are_refused(pixels: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pipeline(pixels, "cpu")(**{"classes": [0], **options})


def test_weights_without_a_process_cannot_sample(tmp_path: Path) -> None:
    config = uvit_bao.UViTBaoConfig(image_size=8, in_channels=3, width=32, depth=3, heads=4)
    save_pretrained(uvit_bao.UViTBao(config), tmp_path)
    with pytest.raises(UserError, match="do not say which noise process"):
        pipeline(tmp_path)


def test_upsamplers_say_what_they_need(tmp_path: Path) -> None:
    levels = (Level(16, 64, 1), Level(8, 64, 1))
    config = adm.ADMConfig(image_size=16, levels=levels, upsampler=True, learned_variance=False)
    save_pretrained(adm.ADMUNet(config), tmp_path, process=GaussianProcess(prediction=Eps()))
    with pytest.raises(UserError, match="needs low-resolution images"):
        pipeline(tmp_path, "cpu")()


# -- latents


def latent_model(folder: Path, vae: Path) -> Path:
    metadata = {"repo": str(vae), "scaling_factor": 0.18215}
    network = random_weights(dimr.DiMR(dimr.TINY))
    return save_pretrained(network, folder, process=GaussianProcess(prediction=V()), autoencoder=metadata)


def test_latents_go_through_the_autoencoder_of_the_weights(vae: Path, tmp_path: Path) -> None:
    pipe = pipeline(latent_model(tmp_path, vae), "cpu")
    assert isinstance(pipe.generator.autoencoder, KLAutoencoder)
    images = pipe([2], seeds=[0, 1], steps=3)
    cond = Condition(label=torch.tensor([2, 2]))
    latents = sample(Denoiser(pipe.network, pipe.process), DDIM(steps=3), (4, 16, 16), [0, 1], cond)
    expected = to_uint8(KLAutoencoder(str(vae), 0.18215).decode(latents)).permute(0, 2, 3, 1).numpy()
    assert images.pixels.shape == (2, 128, 128, 3)
    assert np.array_equal(images.pixels, expected)


def test_a_missing_extra_is_named(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(latent_model(tmp_path, vae), "cpu")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(pipe.network, "forward", lambda *args: pytest.fail("sampled before the extra was missed"))
    with pytest.raises(MissingExtraError, match=r"a latent model needs .*diffzoo\[latent\]"):
        pipe([2], seeds=[0], steps=1)


def test_an_autoencoder_that_cannot_be_had_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metadata = {"repo": "nobody/vae", "scaling_factor": 0.18215}
    network = random_weights(dimr.DiMR(dimr.TINY))
    save_pretrained(network, tmp_path, process=GaussianProcess(prediction=V()), autoencoder=metadata)
    pipe = pipeline(tmp_path, "cpu")
    monkeypatch.setattr(pipe.network, "forward", lambda *args: pytest.fail("sampled before the autoencoder was there"))
    with pytest.raises(UserError, match="the autoencoder nobody/vae is not in the cache"):
        pipe([2], seeds=[0], steps=1)


# -- captions


class Words:
    """A text encoder that turns a caption into noise of its own."""

    width, max_tokens = 8, 5

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.randn(5, 8, generator=torch.Generator().manual_seed(len(c))) for c in captions]
        return torch.stack(rows), torch.ones(len(captions), 5, dtype=torch.bool)

    def null(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        text, mask = self.encode([""])
        return text.expand(count, -1, -1), mask.expand(count, -1)

    def fingerprint(self) -> str:
        return "words"

    def to(self, device: Any) -> "Words":
        return self


def test_captions_are_sampled_and_guided_away_from_the_empty_one(tmp_path: Path) -> None:
    config = uvit_bao.UViTBaoConfig(
        image_size=8, in_channels=3, width=32, depth=3, heads=4, text_width=8, text_tokens=5
    )
    save_pretrained(
        random_weights(uvit_bao.UViTBao(config)),
        tmp_path,
        process=GaussianProcess(prediction=V()),
        guidance={"formula": COND, "scale": 1.0},
    )
    pipe = pipeline(tmp_path, "cpu", text_encoder=Words())
    images = pipe(["a cat", "a longer caption"], seeds=[1, 2], steps=3)
    text, mask = Words().encode(["a cat", "a cat", "a longer caption", "a longer caption"])
    null = Condition(text=Words().null(1)[0], text_mask=Words().null(1)[1])
    denoise = ClassifierFree(Denoiser(pipe.network, pipe.process), 1.0, "cond", null=null)
    expected = sample(denoise, DDIM(steps=3), (3, 8, 8), [1, 2, 1, 2], Condition(text=text, text_mask=mask))
    assert np.array_equal(images.pixels, to_uint8(expected).permute(0, 2, 3, 1).numpy())
    assert images.labels[2] == "a longer caption"
    with pytest.raises(UserError, match="do not say through which text encoder"):
        pipeline(tmp_path, "cpu")(["a cat"])


# -- files


def test_every_png_says_how_it_was_made(pixels: Path, tmp_path: Path) -> None:
    images = pipeline(pixels, "cpu")(["hound", 7], seeds=[3, 4], guidance=1.5, steps=5)
    paths = images.save_png(tmp_path / "out")
    assert [p.name for p in paths] == ["dog_seed3.png", "dog_seed4.png", "thing_5_seed3.png", "thing_5_seed4.png"]
    with Image.open(paths[1]) as image:
        assert np.array_equal(np.asarray(image), images[1])
        record = json.loads(image.text["diffzoo"])  # type: ignore[attr-defined]
    assert record["seed"] == 4
    assert (record["drawn"], record["class_id"]) == ("dog", 1)
    assert (record["dtype"], record["device"]) == ("float32", "cpu")
    assert from_plain(Guidance, record["guidance"]) == Guidance(1.5, "cond")
    assert record["sampler"]["class"] == "diffzoo.sampling.DDIM"
    assert record["sampler"]["steps"] == 5
    assert record["diffzoo"] == diffzoo.__version__


def test_records_say_the_precision_and_which_of_two_classes_of_one_name(pixels: Path, unconditional: Path) -> None:
    pipe = pipeline(pixels, "cpu")
    pipe.published.__dict__["classes"] = Classes(10, ("crane", "heron", "crane", *NAMES[3:]))
    images = pipe([0, 2], seeds=[5, 6], steps=1, precision="bf16")
    assert images.labels == ["crane"] * 4
    assert [(r["class_id"], r["seed"]) for r in images.records] == [(0, 5), (0, 6), (2, 5), (2, 6)]
    assert {r["dtype"] for r in images.records} == {"bfloat16"}
    assert "class_id" not in pipeline(unconditional, "cpu")(seeds=[0], steps=1).records[0]


LONG = "a photograph of a harbour in the early morning with many small boats"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["crane", "Crane"], ["crane_seed0", "crane_seed0_2"]),
        (["a cat?", "a cat!", "a cat"], ["a_cat_seed0", "a_cat_seed0_2", "a_cat_seed0_3"]),
        (["猫", "犬", "Кошка, 2"], ["猫_seed0", "犬_seed0", "кошка_2_seed0"]),
        (["\N{HEAVY BLACK HEART}\ufe0f", "", "../.."], ["seed0", "seed0_2", "seed0_3"]),
        (["e\u0301tang", "\xe9tang"], ["\xe9tang_seed0", "\xe9tang_seed0_2"]),
    ],
)
def test_every_image_has_a_file_of_its_own(labels: list[str], names: list[str], tmp_path: Path) -> None:
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    records = [{"seed": 0, "drawn": label} for label in labels]
    paths = Samples(pixels, labels, records, 1).save_png(tmp_path)
    assert [p.stem for p in paths] == names
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path, value, record in zip(paths, range(len(labels)), records, strict=True):
        with Image.open(path) as image:
            assert image.getpixel((0, 0)) == (value,) * 3
            assert json.loads(image.text["diffzoo"]) == record  # type: ignore[attr-defined]


def test_long_captions_have_files_of_their_own_in_every_call(tmp_path: Path) -> None:
    labels = [LONG + " and a red one", LONG + " and a blue one", "語" * 300, "語" * 301, "\U00020000" * 50]
    paths = [
        path
        for label in labels
        for path in Samples(np.zeros((1, 1, 1, 3), np.uint8), [label], [{"seed": 2**62}], 1).save_png(tmp_path)
    ]
    assert len(set(paths)) == len(labels)
    assert all(path.is_file() for path in paths)
    assert max(len(path.name.encode()) for path in paths) < 220  # leaves room for a number and the temporary name
    assert paths[0].name.startswith("a_photograph_of_a_harbour_in_the_early_morning_with")


def test_letters_that_the_file_system_cannot_write_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsencode", lambda name: str(name).encode("ascii"))
    images = Samples(np.zeros((2, 1, 1, 3), np.uint8), ["猫 2", "犬 2"], [{"seed": 0}] * 2, 1)
    assert [path.name for path in images.save_png(tmp_path)] == ["2_seed0.png", "2_seed0_2.png"]


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("0-2,20", [0, 1, 2, 20]), (" 1 , 3-4 ", [1, 3, 4])]
)
def test_seeds_are_ranges_and_numbers(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "0-10000000000"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected seeds such as 0-7 or 0-15,20|10000000001 images are more than"):
        parse_seeds(text)


def test_the_command_writes_a_grid_with_a_row_per_class(
    pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, folder = tmp_path / "new" / "grid.png", tmp_path / "each"
    args = ["sample", str(pixels), "--classes", "hound", "7", "--seeds", "0-2", "--steps", "3", "--guidance", "0.3"]
    assert main([*args, "--out", str(grid), "--dir", str(folder), "--npz", str(tmp_path / "all.npz"), "--device", "cpu",
                 "--quiet"]) == 0  # fmt: skip
    assert "6 images, rows: dog, thing 5" in capsys.readouterr().out
    images = pipeline(pixels, "cpu")(["hound", 7], seeds=range(3), steps=3, guidance=0.3)
    with Image.open(grid) as image:
        drawn = np.asarray(image)
        assert len(json.loads(image.text["diffzoo"])) == 6  # type: ignore[attr-defined]
    assert drawn.shape == (2 * (34 + 2 * LINE) + 2, 3 * 34 + 2, 3)
    assert np.array_equal(drawn[36 + 2 * LINE : 68 + 2 * LINE : 4, 70:102:4], images[5])
    assert sorted(p.name for p in tmp_path.joinpath("new").iterdir()) == ["grid.png"]
    assert len(list(folder.iterdir())) == 6
    with np.load(tmp_path / "all.npz") as archive:  # as the evaluator of ADM reads it
        assert np.array_equal(archive["arr_0"], images.pixels)
        assert archive["arr_1"].tolist() == [1, 1, 1, 7, 7, 7]
    assert main([*args, "--out", str(grid), "--dir", str(folder), "--device", "cpu", "--quiet"]) == 2
    assert "holds images already" in capsys.readouterr().err


def test_the_command_samples_unconditional_models_and_some_classes(
    pixels: Path, unconditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "0", "--steps", "1", "--device", "cpu", "--quiet", "--out", str(tmp_path / "g.png")]
    assert main(["sample", str(unconditional), *options]) == 0
    assert "1 images" in capsys.readouterr().out
    assert main(["sample", str(pixels / "model.safetensors"), *options]) == 0
    assert "8 images, rows: cat, dog, thing 0" in capsys.readouterr().out
    assert main(["sample", str(pixels), "--classes", "hounds", *options]) == 2
    assert "did you mean 'hound'" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "none.ckpt"), *options]) == 2


def test_the_command_shows_what_the_model_believed_on_the_way(
    pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["sample", str(pixels), "--classes", "1", "2", "--seeds", "0-2", "--steps", "20", "--device", "cpu"]
    args += ["--quiet", "--out", str(tmp_path / "g.png"), "--trajectory"]
    assert main([*args, str(tmp_path / "way.gif")]) == 0
    with Image.open(tmp_path / "way.gif") as film, Image.open(tmp_path / "g.png") as grid:
        assert film.size == grid.size
        assert 5 < film.n_frames <= 21  # equal frames are merged
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(last - np.asarray(grid)).mean() < 8  # 256 colours
    assert main([*args, str(tmp_path / "way.png")]) == 0
    with Image.open(tmp_path / "way.png") as sheet:
        # steps 0, 2, ..., 18, and the finished images; six rows
        assert sheet.size == (11 * 34 + 2, 6 * (34 + 2 * LINE) + 2 + 2 * LINE)
    assert "11 steps on the way" in capsys.readouterr().out
    assert main([*args, str(tmp_path / "way.mp4")]) == 2
    assert "a .gif or a .png" in capsys.readouterr().err


def test_compilation_is_handed_on(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Network, "compile_units", lambda self, **_: calls.append(self))
    args = ["sample", str(pixels), "--classes", "1", "--seeds", "0", "--steps", "2", "--device", "cpu", "--quiet"]
    assert main([*args, "--out", str(tmp_path / "g.png"), "--compile"]) == 0
    assert len(calls) == 1


def test_a_pipeline_says_what_it_is(pixels: Path) -> None:
    pipe = pipeline(pixels, "cpu")
    assert isinstance(pipe, Pipeline)
    assert isinstance(pipe.generator.autoencoder, Identity)
    assert repr(pipe) == "Pipeline(UViTBao, samples from a class, on cpu)"


def test_classes_that_are_called_by_numbers_are_sampled_by_these() -> None:
    classes = Classes(3, ("1", "3", "12"))
    assert [classes.index(name) for name in ("1", "3", "12")] == [0, 1, 2]
    assert classes.index(1) == 1  # a number of Python's is an index
    with pytest.raises(UserError, match="class 5 is out of range"):
        classes.index("5")
