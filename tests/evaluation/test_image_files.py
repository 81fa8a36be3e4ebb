"""Pixels, `.npz` files, references, and the search for copies."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.stand_ins import reference, smooth_images
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.evaluation import Reference, make_reference
from diffzoo.evaluation.image_files import FolderImages, NpzImages
from diffzoo.evaluation.memorisation import report
from diffzoo.images import LINE, to_uint8, write_npz
from diffzoo.metrics import Moments, extract, load_features


def test_rounding_and_truncation() -> None:
    # -1, half a level, 1.6 levels, and beyond the end
    levels = torch.tensor([0.0, 0.5, 1.6, 254.4, 300.0])
    images = (levels / 127.5 - 1).reshape(1, 1, 1, 5)
    assert to_uint8(images, "round").flatten().tolist()[2:] == [2, 254, 255]
    assert to_uint8(images, "truncate").flatten().tolist() == [0, 0, 1, 254, 255]


def test_npz_is_what_numpy_reads_and_streams_back(tmp_path: Path) -> None:
    pixels, labels = to_uint8(smooth_images(range(23))), torch.arange(23)
    path = write_npz(tmp_path / "x.npz", pixels.split(5), 23, labels)
    with np.load(path) as archive:
        assert np.array_equal(archive["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(archive["arr_1"], labels.numpy())
    images = NpzImages(str(path))
    assert len(images) == 23
    assert torch.equal(torch.cat([images.images(i, 7) for i in range(0, 23, 7)]), pixels)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_that_numpy_wrote_are_read(tmp_path: Path, save: object) -> None:
    pixels = to_uint8(smooth_images(range(9))).permute(0, 2, 3, 1).numpy()
    save(tmp_path / "x.npz", pixels)
    assert np.array_equal(NpzImages(str(tmp_path / "x.npz")).images(4, 3).permute(0, 2, 3, 1).numpy(), pixels[4:7])


def test_a_stored_file_is_not_read_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    pixels = to_uint8(smooth_images(range(40)))
    path = write_npz(tmp_path / "x.npz", [pixels], 40, torch.arange(40))
    images = NpzImages(str(path))
    assert len(images) == 40  # the header has been read
    monkeypatch.setattr(zipfile.ZipExtFile, "seek", lambda *_: pytest.fail("a seek that reads all that lies before"))
    assert torch.equal(images.images(33, 7), pixels[33:])


def test_a_file_that_is_cut_off_is_no_image_file(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz", [to_uint8(smooth_images(range(40)))], 40)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match="holds no images"):
        len(NpzImages(str(path)))


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    pixels = to_uint8(smooth_images(range(4)))
    for i, name in enumerate(("b/2.png", "a/9.png", "a/1.png", "c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(tmp_path / name)
    (tmp_path / ".hidden").touch()
    assert torch.equal(FolderImages(str(tmp_path)).images(0, 4), pixels[[2, 1, 0, 3]])


def test_a_reference_holds_statistics_of_all_and_some_images(tmp_path: Path) -> None:
    network = load_features("random-conv")
    pixels = to_uint8(smooth_images(range(70)))
    batches = [{"image": part, "label": torch.arange(len(part))} for part in pixels.split(16)]
    ref = make_reference(batches, [network], tmp_path / "r.npz", keep=40)
    layers = extract(network, pixels)
    for layer in ("pool", "spatial"):
        mean, covariance = ref.statistics(network, layer)
        want = Moments.of(layers[layer])
        torch.testing.assert_close(mean, want.mean)
        torch.testing.assert_close(covariance, want.covariance())
    torch.testing.assert_close(ref.features(network, "pool"), layers["pool"][:40])
    assert torch.equal(NpzImages(str(ref.path)).images(0, 99), pixels[:40])
    assert len(make_reference(batches, [network], tmp_path / "l.npz", limit=20).features(network, "pool")) == 20


def test_equal_images_make_an_equal_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert reference(tmp_path / "a").sha256 == reference(tmp_path / "b").sha256


def test_an_adm_file_is_a_reference(tmp_path: Path) -> None:
    class Inception(torch.nn.Module):
        name, dims = "inception-2015", {"pool": 4, "spatial": 3}

    np.savez(tmp_path / "adm.npz", mu=np.arange(4.0), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=2 * np.eye(3))
    ref = Reference.open(tmp_path / "adm.npz")
    assert ref.statistics(Inception(), "pool")[0].tolist() == [0, 1, 2, 3]
    assert ref.statistics(Inception(), "spatial")[1].trace() == 6
    assert ref.image_size() is None


def test_statistics_are_made_from_images_where_the_file_has_none(tmp_path: Path) -> None:
    network = load_features("random-conv")
    pixels = to_uint8(smooth_images(range(30)))
    ref = Reference.open(write_npz(tmp_path / "x.npz", [pixels], 30))
    torch.testing.assert_close(ref.statistics(network, "pool")[0], Moments.of(extract(network, pixels)["pool"]).mean)


def test_planted_copies_are_found(tmp_path: Path) -> None:
    training, samples = to_uint8(smooth_images(range(200))), to_uint8(smooth_images(range(500, 540)))
    samples[7], samples[21] = training[3], training[150]
    files = [NpzImages(str(write_npz(tmp_path / f"{i}.npz", [p], len(p)))) for i, p in enumerate((samples, training))]
    found = report(*files, "random-conv", tmp_path / "report", pairs=5)
    assert dict(zip(found.sample[:2], found.training[:2], strict=True)) == {7: 3, 21: 150}
    assert found.distance[:2] == pytest.approx([0, 0], abs=1e-5)
    assert found.distance[2] > 1e-3
    assert 2 <= found.suspicious < 10
    with Image.open(found.picture) as shown:
        assert shown.size == (4 * 66 + 2, 5 * (66 + LINE) + 2)
    assert json.loads((tmp_path / "report" / "memorisation.json").read_text())["suspicious"] == found.suspicious
    assert f"{found.suspicious} of 40" in found.summary()
    text = (tmp_path / "report" / "memorisation.json").read_text()
    assert len(text.splitlines()) == 10


def test_copies_are_looked_for_in_a_folder_too(tmp_path: Path) -> None:
    training = to_uint8(smooth_images(range(30)))
    (tmp_path / "training").mkdir()
    for i, pixels in enumerate(training):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "training" / f"{i:03d}.png")
    samples = NpzImages(str(write_npz(tmp_path / "s.npz", [training[[11, 29]]], 2)))
    found = report(samples, FolderImages(str(tmp_path / "training")), "random-conv", tmp_path / "report")
    assert dict(zip(found.sample, found.training, strict=True)) == {0: 11, 1: 29}
    assert found.suspicious == 2
    other = NpzImages(str(write_npz(tmp_path / "o.npz", [to_uint8(smooth_images(range(3), 8))], 3)))
    with pytest.raises(UserError, match="use equal sizes"):
        report(other, samples, "random-conv", tmp_path / "report")
