"""What loaders that are not ours may give: understood where it is clear, one sentence where it is not."""

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from diffzoo.errors import UserError
from diffzoo.process import Cosine, GaussianProcess, UniformV
from diffzoo.training import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore")

RAW = (torch.arange(4 * 3 * 32 * 32) * 7919 % 256).to(torch.uint8).reshape(4, 3, 32, 32)
UNIT = RAW.float() / 255
SIGNED = UNIT * 2 - 1
LABELS = torch.tensor([0, 1, 1, 0])


class Seen(DiffusionModule):
    """Keeps the clean images and labels of every step."""

    def __init__(self) -> None:
        super().__init__(
            "simple_uvit_xs_32",
            network_args={"num_classes": 2, "width_at": {16: 16, 8: 32}, "depth_at": {8: 1}},
            process=GaussianProcess(Cosine()),
            weighting=UniformV(),
            condition_dropout=0.0,
        )
        self.images: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def losses(self, x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, cond: Any, *more: Any) -> torch.Tensor:
        self.images.append(x)
        self.labels.append(cond.label)
        return super().losses(x, eps, t, cond, *more)


def fit(train: Any, validation: Any = None, steps: int = 1) -> Seen:
    module = Seen()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **quiet)
    loaders = [DataLoader(d, 4) for d in (train, validation) if d is not None]
    trainer.fit(module, *loaders)
    return module


def rows(images: torch.Tensor, name: str = "image", labels: Any = LABELS, label_name: str = "label") -> list[dict]:
    return [{name: i, label_name: v} for i, v in zip(images, labels, strict=True)]


@pytest.mark.parametrize(
    "data",
    [
        rows(RAW),
        rows(RAW.long()),
        rows(UNIT),
        [{"jpg": i, "cls": v} for i, v in zip(UNIT, LABELS, strict=True)],
        rows(SIGNED),
        rows(UNIT * 255),
        rows(SIGNED.half(), "pixel_values", LABELS.int(), "labels"),
        rows(RAW, labels=LABELS[:, None]),
        list(zip(SIGNED, LABELS, strict=True)),
        list(zip(RAW, LABELS.tolist(), strict=True)),
    ],
    ids=[
        "uint8",
        "int64",
        "[0, 1]",
        "WebDataset",
        "[-1, 1]",
        "[0, 255]",
        "other names",
        "columns",
        "tuples",
        "tuples of uint8",
    ],
)
def test_every_usual_form_trains_on_the_same_images(data: Any) -> None:
    module = fit(data, data)
    assert len(module.images) == 2 + 1  # sanity check and validation need no `id`
    for images, labels in zip(module.images, module.labels, strict=True):
        torch.testing.assert_close(images, SIGNED, atol=2e-3, rtol=0)
        assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (rows(SIGNED * 2.5), "got float32 between -2.5 and 2.5: leave out a normalisation"),
        (rows(SIGNED.movedim(1, 3)), r"expected images of shape \(b, 3, 32, 32\), got .*: put the channels first"),
        (rows(SIGNED[..., :16]), r"expected images of shape \(b, 3, 32, 32\), got \(4, 3, 32, 16\)"),
        (rows(SIGNED, labels=torch.eye(2)[LABELS]), r"got shape \(4, 2\): take argmax\(1\) of one-hot labels"),
        (rows(SIGNED, labels=LABELS.float()), "from 0 to 1, integers of shape .*, got float32"),
        (rows(SIGNED, labels=LABELS + 1), "got 2: set model.network_args.num_classes"),
        (rows(SIGNED, labels=LABELS - 1), "got -1"),
        ([{"image": i} for i in SIGNED], "have no label: give `label`"),
        (rows(RAW // 128), "got uint8 between 0 and 1: scale them"),
        (rows(RAW.int() // 128), "got int32 between 0 and 1: scale them"),
        ([{"picture": i} for i in SIGNED], "have no images: expected `image` .*, got picture"),
        (list(zip(SIGNED, LABELS, LABELS, strict=True)), r"an \(image, label\) tuple of tensors, got a list of 3"),
    ],
)
def test_anything_else_is_one_sentence(data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(data)


def test_two_values_may_be_black_and_white() -> None:
    torch.testing.assert_close(fit(rows(RAW > 127)).images[0], (RAW > 127).float() * 2 - 1)


@pytest.mark.parametrize(
    ("first", "later", "words"),
    [
        (UNIT, SIGNED, r"images are in \[0, 1\].* a later one holds -1 to 1"),
        (UNIT, UNIT * 255, r"images are in \[0, 1\].* a later one holds 0 to 255"),
        (SIGNED, UNIT * 255, r"images are floats in \[-1, 1\], .* a later one holds 0 to 255"),
        (SIGNED, RAW, r"images are floats in \[-1, 1\], .* a later one holds 0 to 255"),
        (RAW, UNIT, "were uint8 in the first batch and are float32 in a later one"),
    ],
)
def test_a_later_batch_that_contradicts_the_first_is_not_trained_on(
    first: torch.Tensor, later: torch.Tensor, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        fit([*rows(first), *rows(later)], steps=2)


def test_a_label_for_every_image() -> None:
    module = Seen()
    with pytest.raises(UserError, match="a batch holds 4 of image, 2 of label"):
        module.transfer_batch_to_device({"image": SIGNED, "label": LABELS[:2]}, torch.device("cpu"), 0)
