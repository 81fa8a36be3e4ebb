"""The verdict on a final grid: real images pass, blobs of colour and samples of the wrong classes do not."""

import pytest
import torch

from diffzoo.data import DemoData
from diffzoo.errors import UserError
from diffzoo.training.verdict import GridVerdict, coarsened, compare


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(iter(DemoData(image_size=32, batch_size=700, num_workers=0).train_dataloader()))
    return batch["image"], batch["label"]


def test_real_images_are_finished_and_blobs_are_not(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, labels = images
    first, others, made = pixels[:100], pixels[200:], pixels[100:200]
    labels = torch.cat([labels[:100], labels[200:]])
    found = {label: iter(others[labels[100:] == label]) for label in range(10)}
    same = torch.stack([next(found[label]) for label in labels[:100].tolist()])
    assert compare(same, first, others, labels).finished
    assert not compare(made, first, others, labels).finished  # real, of other classes than were asked for
    blobs = coarsened(coarsened(same.flip(0))[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2))
    verdict = compare(blobs, first, others, labels)
    assert not verdict.finished
    assert verdict.distance > verdict.coarse


def test_a_verdict_on_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        GridVerdict(n=1)
