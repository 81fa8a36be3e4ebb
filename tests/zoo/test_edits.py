"""Images from images on the pipeline and the command line: what is asked for happens, and the metadata says so."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffzoo import pipeline
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.generation import Pipeline, Samples
from diffzoo.generation.edits import fitted
from diffzoo.sampling import Trajectory

NAME = "simple_uvit_xs_32.emoji"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline(NAME, "cpu")


@pytest.fixture(scope="module")
def flag(pipe: Pipeline) -> np.ndarray:
    return pipe("Flags", seeds=[3], steps=20)[0]


def test_strength_decides_how_much_of_the_image_stays(pipe: Pipeline, flag: np.ndarray) -> None:
    def distance(strength: float) -> float:
        made = pipe.edit(flag, "Flags", seeds=[0, 1], strength=strength, steps=20)
        assert made.records[1]["edit"]["steps"] == round(20 * strength)
        return float(np.abs(made.pixels.astype(float) - flag).mean())

    distances = [distance(s) for s in (0.1, 0.5, 1.0)]
    assert distances[0] < 0.5 * distances[2]
    assert distances[0] < distances[1] < distances[2] * 1.05


def test_inpainting_changes_what_the_mask_says_and_nothing_else(pipe: Pipeline, flag: np.ndarray) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    made = pipe.edit(Image.fromarray(flag), "Flags", seeds=[0, 1], mask=Image.fromarray(mask), steps=6, resample=2)
    assert np.array_equal(made.pixels[:, :, :16], np.stack([flag[:, :16]] * 2))
    assert not np.array_equal(made.pixels[0, :, 16:], flag[:, 16:])
    edit = made.records[0]["edit"]
    assert (edit["kind"], edit["mask_share"], edit["resample"], edit["strength"]) == ("inpainting", 0.5, 2, 1.0)
    with pytest.raises(UserError, match="black everywhere"):
        pipe.edit(flag, "Flags", mask=0 * mask)
    with pytest.raises(UserError, match=r"mask has 8 x 8 pixels and the image 32 x 32"):
        pipe.edit(flag, "Flags", mask=mask[:8, :8])


def test_an_inverted_image_comes_back(pipe: Pipeline, flag: np.ndarray) -> None:
    start = pipe.invert(flag, "Flags", steps=60)
    back = pipe("Flags", seeds=[0], steps=60, sampler="DDIM", guidance=1.0, start=start)
    other = pipe("Flags", seeds=[0], steps=60, sampler="DDIM", guidance=1.0)
    error = np.abs(back[0].astype(float) - flag).mean()
    assert error < 0.15 * np.abs(other[0].astype(float) - flag).mean()
    assert back.records[0]["start"] == "given"


def test_interpolation_has_the_images_of_its_ends(pipe: Pipeline) -> None:
    made = pipe.interpolate(3, 4, "Flags", frames=3, steps=5)
    ends = pipe("Flags", seeds=[3, 4], steps=5)
    for i, j in ((0, 0), (2, 1)):
        assert np.abs(made[i].astype(int) - ends[j].astype(int)).max() <= 2
    assert [r["edit"]["weight"] for r in made.records] == [0.0, 0.5, 1.0]
    assert made.records[0]["edit"]["between"] == [3, 4]


def test_variations_go_from_a_seed_towards_others(pipe: Pipeline) -> None:
    own, other = pipe("Flags", seeds=[3, 4], steps=5).pixels.astype(int)
    none, some, whole = (
        pipe.variations(3, "Flags", [4], amount=amount, steps=5).pixels[0].astype(int) for amount in (0.0, 0.3, 1.0)
    )
    assert np.abs(none - own).max() <= 2
    assert np.abs(whole - other).max() <= 2
    assert 0 < np.abs(some - own).mean() < np.abs(other - own).mean()
    made = pipe.variations(3, "Flags", [4, 5], steps=2)
    assert [r["edit"]["towards"] for r in made.records] == [4, 5]
    with pytest.raises(UserError, match=r"expected an amount in \[0, 1\]"):
        pipe.variations(3, "Flags", amount=2)


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["--between", "3", "4", "--frames", "3"], lambda p: p.interpolate(3, 4, "Flags", frames=3, steps=4)),
        (["--around", "3", "--seeds", "5,6"], lambda p: p.variations(3, "Flags", [5, 6], steps=4)),
    ],
)
def test_the_command_goes_between_and_around_seeds(
    arguments: list[str], call: Callable[[Pipeline], Samples], pipe: Pipeline, tmp_path: Path
) -> None:
    fixed = ["sample", NAME, "--classes", "Flags", "--steps", "4", "--device", "cpu", "--quiet"]
    assert main([*fixed, *arguments, "--npz", str(tmp_path / "x.npz"), "--out", str(tmp_path / "x.png")]) == 0
    with np.load(tmp_path / "x.npz") as archive:
        assert np.array_equal(archive["arr_0"], call(pipe).pixels)


def test_watching_an_edit_changes_nothing(pipe: Pipeline, flag: np.ndarray) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[8:, 16:] = 255
    for given in (None, mask):
        seen = Trajectory()
        how = {"mask": given, "steps": 4, "resample": 2}
        watched = pipe.edit(flag, "Flags", [0, 1], trajectory=seen, **how)
        assert np.array_equal(watched.pixels, pipe.edit(flag, "Flags", [0, 1], **how).pixels)
        assert len(seen.frames()) >= 3


def test_the_command_edits_a_file(pipe: Pipeline, flag: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(flag).resize((80, 64)).save(tmp_path / "in.png")
    fixed = ["sample", NAME, "--classes", "Flags", "--seeds", "5", "--steps", "5", "--device", "cpu", "--quiet"]
    begin = ["--init", str(tmp_path / "in.png"), "--strength", "0.4", "--out", str(tmp_path / "out.png")]
    assert main([*fixed, *begin, "--dir", str(tmp_path / "d")]) == 0
    with Image.open(next((tmp_path / "d").iterdir())) as written:
        edit = json.loads(written.text["diffzoo"])["edit"]  # type: ignore[attr-defined]
        want = pipe.edit(tmp_path / "in.png", "Flags", [5], strength=0.4, steps=5)
        assert np.array_equal(np.asarray(written), want[0])
    assert edit["fitted"] == "cropped and resized from 80 x 64 to 32 x 32"
    assert (edit["steps"], edit["of_steps"]) == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "m.png"], "belong to --init IMAGE"),
        (["--init", "nothing.png"], "could not read the image nothing.png: No such file"),
        (["--init", "IN", "--strength", "2"], "expected a strength in (0, 1], got 2.0"),
        (["--between", "1", "2", "--classes", "1", "2"], "--between takes one class or caption, got 2"),
        (["--init", "IN", "--around", "2"], "--init and --around do not go together"),
        (["--init", "IN", "--trajectory", "x.gif"], "--init and --trajectory do not go together"),
    ],
)
def test_wrong_edits_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png") if a == "IN" else a for a in arguments]
    assert main(["sample", "--device", "cpu", "--quiet", "--out", str(tmp_path / "o.png"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_image_is_cropped_to_its_middle_and_turned_as_its_camera_was(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 200
    assert int(fitted(pixels, 8)[0].min()) == 200
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[0] = 255
    Image.fromarray(upright).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(
        fitted(tmp_path / "turned.png", 8)[0], torch.from_numpy(np.rot90(upright, -1).copy()).permute(2, 0, 1)
    )
