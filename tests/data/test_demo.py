"""The demo set, and data modules as recipes name them."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from build_demo import SKIN_TONES, _captions, _class_of, _plain
from PIL import Image

import diffzoo.data
from diffzoo.data import DemoData
from diffzoo.data.demo import PATH
from diffzoo.errors import UserError


def test_what_it_is() -> None:
    data = DemoData(image_size=64, batch_size=32, num_workers=0)
    assert (len(data.train_source), len(data.val_source)) == (3000, 374)
    assert data.class_names == [
        "Activities",
        "Animals & Nature",
        "Body",
        "Flags",
        "Food & Drink",
        "Objects",
        "People",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    ]
    assert data.has_captions
    assert PATH.stat().st_size < 5e6
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (32, 3, 64, 64)
    assert batch["image"].dtype == torch.uint8
    assert all(isinstance(c, str) and c for c in batch["caption"])
    assert "MIT License" in (PATH.parent / "LICENSE").read_text()
    assert "Microsoft" in (PATH.parent / "LICENSE").read_text()


def test_skin_tones_of_one_emoji_stay_together() -> None:
    """Otherwise the held-out loss would measure copies."""
    table = pq.read_table(PATH, columns=["code", "split"]).to_pydict()
    splits: dict[str, set[str]] = {}
    for code, split in zip(table["code"], table["split"], strict=True):
        base = "-".join(part for part in code.split("-") if part.upper() not in SKIN_TONES)
        splits.setdefault(base, set()).add(split)
    assert {len(s) for s in splits.values()} == {1}
    assert len(splits) < 2000


def test_balance_and_images_are_not_blank() -> None:
    data = DemoData(image_size=32, batch_size=40, num_workers=0)
    for _, batch in zip(range(3), data.train_dataloader(), strict=False):
        assert torch.bincount(batch["label"], minlength=10).tolist() == [4] * 10
        assert (batch["image"].float().std(dim=(1, 2, 3)) > 10).all()


def test_names() -> None:
    waving = {"category": "People & Body", "subcategory": "hand-fingers-open", "name": "WAVING HAND SIGN"}
    assert _class_of(waving) == "Body"
    assert _class_of({**waving, "subcategory": "person-role"}) == "People"
    assert _class_of({**waving, "category": "Flags"}) == "Flags"
    skins = [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}]
    found = _captions(
        [{"hexcode": "1F44B", "label": "waving hand", "skins": skins}, {"hexcode": "2764", "label": "red heart"}]
    )
    assert found["1f44b-1f3fb"] == "waving hand: light skin tone"
    assert found[_plain("2764-FE0F")] == "red heart"


def test_captions_say_what_is_seen() -> None:
    """The name of a character may mislead: that of the red heart is "heavy black heart"."""
    table = pq.read_table(PATH, columns=["code", "caption"]).to_pydict()
    captions = dict(zip(table["code"], table["caption"], strict=True))
    assert captions["2764-fe0f"] == "red heart"
    assert captions["1f634"] == "sleeping face"
    assert captions["1f44b-1f3fb"] == "waving hand: light skin tone"


def test_public_names_resolve() -> None:
    for name in diffzoo.data.__all__:
        assert getattr(diffzoo.data, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = diffzoo.data.Nothing


CONFIGS = {
    "DemoData": {"image_size": 32, "batch_size": 8, "seed": 3, "num_workers": 0},
    "ImageFolder": {"path": "x", "image_size": 64, "crop": "random", "max_bad": 3},
    "HFDataset": {"source": "owner/name", "where": {"split": "train"}, "resize": "area", "lanes": 8},
    "ImageNet": {"image_size": 128, "batch_size": 1024, "streaming": False},
    "Coco": {"caption": "captions", "shuffle_window": 1000},
    "Cifar10": {"source": "data/cifar10", "balance": True},
    "Latents": {"path": "cache", "pixels": 256},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_module_in_yaml(name: str, tmp_path: Path) -> None:
    """Settings of the base class reach every module through the parser; a typo does not pass."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    def parse(settings: dict):
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({"data": {"class_path": f"diffzoo.data.{name}", "init_args": settings}}))
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data")
        parser.add_argument("--config", action="config")
        return parser.instantiate(parser.parse_args([f"--config={file}"])).data

    data = parse(CONFIGS[name])
    assert type(data).__name__ == name
    assert data.image_size == CONFIGS[name].get("image_size", data.image_size)
    if "resize" in CONFIGS[name]:
        assert data.transform.resize == "area"
    with pytest.raises(Exception, match="batchsize"):
        parse({**CONFIGS[name], "batchsize": 4})


def test_larger_than_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="256"):
        DemoData(image_size=257)
    with pytest.raises(UserError, match=r"64 px wide.*build_demo") as error:
        DemoData(image_size=128)
    written = Path(str(error.value).rsplit(" ", 1)[1])
    assert written.is_relative_to(tmp_path)
    rows = pq.read_table(PATH).to_pylist()[:32]
    for row in rows:
        image = Image.new("RGB", (256, 256), (200, 100, 50))
        image.putpixel((0, 0), (0, 0, 0))
        data = io.BytesIO()
        image.save(data, "PNG")
        row["image"] = {"bytes": data.getvalue(), "path": None}
    written.parent.mkdir(parents=True)
    schema = pq.read_schema(PATH)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), written)
    image = next(iter(DemoData(image_size=256, batch_size=4, num_workers=0).train_dataloader()))["image"]
    assert image.shape == (4, 3, 256, 256)
    assert (image == 0).sum() == 4 * 3  # the pixel is whole: the originals were not resized
