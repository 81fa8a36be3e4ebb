"""Buckets: every batch of one shape, every row as often as any other, and resume as if nothing had been."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data.stand_ins import image_bytes, quiet_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffzoo.cli.main import main
from diffzoo.data import ImageFolder, Latents
from diffzoo.data.buckets import Bucketed, aspects, nearest
from diffzoo.errors import UserError
from diffzoo.images import to_float
from diffzoo.models.dit import TINY as TINY_DIT
from diffzoo.models.simple_unet import TINY, SimpleUNet
from diffzoo.training import DiffusionModule
from diffzoo.training.batch_format import check_data_fits

SHAPES = {(20, 20): 9, (30, 15): 14, (15, 30): 5}  # width, height: how many
BUCKETS = [8, [6, 12], [12, 6]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    number = 0
    for size, count in SHAPES.items():
        for _ in range(count):
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / "images" / f"{number:02}.png").write_bytes(image_bytes(number, size))
            number += 1
    return tmp_path / "images"


def module(folder: Path, **options) -> ImageFolder:
    return ImageFolder(
        str(folder), **{"image_size": 8, "batch_size": 4, "buckets": BUCKETS, "num_workers": 0, "seed": 3, **options}
    )


def stream(data: ImageFolder, batches: int) -> list[tuple]:
    """Position, row and a digest of the pixels of each sample, batch by batch."""
    found: list[tuple] = []
    while len(found) < batches:
        for batch in data.train_dataloader():
            index, rows = batch["index"].tolist(), batch["id"].tolist()
            found.append((index, rows, tuple(batch["image"].shape[2:]), batch["image"].sum((1, 2, 3)).tolist()))
            if len(found) == batches:
                break
    return found


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5), st.integers(0, 10_000)
)
@settings(deadline=None, max_examples=20)
def test_batches_hold_one_bucket_and_rows_come_equally_often(rows: list[int], batch: int, seed: int, far: int) -> None:
    bucket = np.array(rows)
    order = Bucketed(bucket, [8, (8, 16), (16, 8), (4, 32)], seed, batch)
    shown: Counter[int] = Counter()
    last: dict[int, int] = {}
    passes = 40 * batch * len(rows)
    for start in range(0, min(passes, 300), batch):
        places = order.places(start, batch)
        assert len({bucket[p.row] for p in places}) == 1
        for place in places:
            shown[place.row] += 1
            assert place.visit == last.get(place.row, -1) + 1
            last[place.row] = place.visit
    counts = [shown[row] for row in range(len(rows))]
    assert max(counts) - min(counts) <= 1 + 2 * max(1, batch / Counter(rows).most_common()[-1][1])
    fresh = Bucketed(bucket, [8, (8, 16), (16, 8), (4, 32)], seed, batch)
    assert fresh.places(far * batch, batch) == order.places(far * batch, batch)  # without what came before


def test_images_go_to_the_nearest_aspect(folder: Path) -> None:
    source = module(folder).train_source
    found = nearest(aspects(source), module(folder).buckets)
    assert Counter(found.tolist()) == {0: 9, 1: 14, 2: 5}
    assert nearest(np.array([1.4, 1.5, 0.72, 0.1]), (8, (6, 12), (12, 6))).tolist() == [0, 2, 0, 1]
    assert np.array_equal(aspects(source), aspects(source))  # from the cache


def test_an_exif_turn_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "a.jpg", exif=exif)
    assert aspects(module(tmp_path / "images").train_source).tolist() == [2.0]


def test_every_batch_has_the_shape_of_its_bucket(folder: Path) -> None:
    data = module(folder)
    bucket = nearest(aspects(data.train_source), data.buckets)
    shapes = [(8, 8), (6, 12), (12, 6)]
    seen = Counter()
    for _, rows, shape, _ in stream(data, 70):
        assert {shapes[bucket[row]] for row in rows} == {shape}
        seen[shape] += 4
    assert {s: round(n / 10) for s, n in seen.items()} == {(8, 8): 9, (6, 12): 14, (12, 6): 5}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_exact(folder: Path, workers: int) -> None:
    unbroken = stream(module(folder, crop="random"), 30)
    first = module(folder, crop="random", num_workers=workers)
    assert stream(first, 11) == unbroken[:11]
    state = first.state_dict()
    first.teardown()
    second = module(folder, crop="random", seed=99, num_workers=workers)
    with pytest.warns(UserWarning, match="keep the seed 3"):
        second.load_state_dict(state)
    assert stream(second, 19) == unbroken[11:]
    second.teardown()


def test_ranks_and_micro_batches_share_what_one_process_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = stream(module(folder), 12)
    parts = []
    for rank in range(2):
        data = module(folder, micro_batch_size=1)
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, 2))
        parts.append(stream(data, 24))
    for number, (index, rows, shape, _) in enumerate(unbroken):
        shares = [part[2 * number + k] for part in parts for k in range(2)]
        assert [i for share in shares for i in share[0]] == index
        assert [r for share in shares for r in share[1]] == rows
        assert {share[2] for share in shares} == {shape}


@pytest.mark.filterwarnings("ignore")  # Lightning's
def test_training_takes_every_bucket(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    training = DiffusionModule(SimpleUNet(TINY.override(image_size=8, num_classes=0)))
    shapes = Counter()
    training.network.register_forward_pre_hook(lambda _, args: shapes.update([tuple(args[0].shape[2:])]))
    data = module(folder, buckets=[8, [6, 12], [12, 6]])
    quiet_trainer(tmp_path, max_steps=9).fit(training, datamodule=data)
    assert set(shapes) == {(8, 8), (6, 12), (12, 6)}


def test_latents_in_buckets_come_as_their_pixels_do(folder: Path, tmp_path: Path) -> None:
    command = f"data encode {folder} --size 8 --buckets 8 6x12 12x6 --out {tmp_path / 'cache'} --autoencoder identity"
    assert main([*command.split(), "--shard-rows", "4", "--workers", "0"]) == 0
    data = Latents(str(tmp_path / "cache"), 8, 4, buckets=BUCKETS, num_workers=0, seed=3)
    pixels = module(folder)
    for position in (0, 52):  # each epoch has seven batches
        for either in (data, pixels):
            either.set_position(position)
        for latent, raw in zip(data.train_dataloader(), pixels.train_dataloader(), strict=True):
            assert torch.equal(latent["index"], raw["index"])
            assert torch.allclose(latent["moments"][:, :3].float(), to_float(raw["image"]), atol=1e-3)
    state = data.state_dict()
    again = Latents(str(tmp_path / "cache"), 8, 4, buckets=BUCKETS, num_workers=0, seed=3)
    again.load_state_dict(state)
    assert again.images_seen == data.images_seen == 80
    assert main(["data", "inspect", str(tmp_path / "cache"), "--workers", "0"]) == 0
    with pytest.raises(UserError, match=r"in the buckets \[\[12, 6\], \[6, 12\], 8\], but the recipe expects \[\]"):
        Latents(str(tmp_path / "cache"), 8).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": True}, "balance and buckets both decide"),
        ({"buckets": [[6, 12, 3]]}, "buckets: expected a positive whole number"),
    ],
)
def test_what_does_not_go_together_is_refused(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(folder, **options)


def test_a_position_in_other_buckets_is_refused(folder: Path) -> None:
    state = module(folder).state_dict()
    for options, message in (
        ({"buckets": None}, r"buckets set to \[\[8, 8\], \[6, 12\], \[12, 6\]\]"),
        ({"batch_size": 8}, "batch_size set to 4"),
    ):
        with pytest.raises(UserError, match=message):
            module(folder, **options).load_state_dict(state)
    with pytest.raises(UserError, match="multiple of batch_size 4, got 6"):
        module(folder).set_position(6)
    streamed = module(folder)
    streamed.train_source.random_access = False
    with pytest.raises(UserError, match="buckets need the shape of every image"):
        _ = streamed.order


def test_buckets_that_the_network_cannot_have_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"buckets: net takes multiples of 4, got 6x12"):
        check_data_fits(module(folder), TINY_DIT.override(image_size=8, patch=4, num_classes=0), "net", latent=False)
    assert torch.is_tensor(next(iter(module(folder).train_dataloader()))["image"])
