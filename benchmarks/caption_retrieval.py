"""How far images follow their captions, without CLIP: which of ten captions a classifier of emoji finds in an image.

    python benchmarks/caption_retrieval.py runs/emoji/simple_uvit_t2i_xs_64      # needs diffzoo[text-demo]

The judge is a small convolutional network that is trained here on the whole demo set, held-out images included, to
give an image the embedding of its caption (MiniLM, mean over tokens) with a contrastive loss. Then captions of the
training set and held-out ones are sampled with several seeds; each image is compared with its own caption and nine
others of the same part, chosen at random once. The share of images whose own caption wins is printed, beside that of
the real images; by chance it is 10 %. Captions with skin tones are left out: they differ in little else.
"""

import argparse
import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo import pipeline
from diffzoo.data.demo import PATH
from diffzoo.encoders import MiniLMEncoder

SIZE = 32  # pixels that the judge sees
AMONG = 10  # captions, the right one included
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Part:
    """Images `(n, 3, 32, 32)` in [-1, 1] with their captions and these captions' embeddings `(n, 384)`."""

    images: Tensor
    captions: list[str]
    embeddings: Tensor


def read_parts() -> dict[str, Part]:
    """The training and the held-out part of the demo set, without skin tones."""
    rows = pq.read_table(PATH, columns=["image", "caption", "split"]).to_pylist()
    rows = [row for row in rows if "skin tone" not in row["caption"]]
    encoder, parts = MiniLMEncoder(), dict[str, Part]()
    for split in ("train", "validation"):
        mine = [row for row in rows if row["split"] == split]
        captions = [row["caption"] for row in mine]
        pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in mine]
        text = torch.cat([_embedded(encoder, captions[i : i + 64]) for i in range(0, len(captions), 64)])
        parts[split] = Part(as_seen(np.stack(pixels)), captions, text)
    return parts


def _embedded(encoder: MiniLMEncoder, captions: list[str]) -> Tensor:
    text, mask = encoder.encode(captions)
    return F.normalize((text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def as_seen(pixels: np.ndarray) -> Tensor:
    """Pixels `(n, h, w, 3)` of 0 to 255 as the judge sees them."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.adaptive_avg_pool2d(images, SIZE)


def build_judge(width: int = 32) -> nn.Sequential:
    """A network `(n, 3, 32, 32)` to `(n, 384)`."""
    layers: list[nn.Module] = []
    for i, channels in enumerate((width, 2 * width, 4 * width, 8 * width)):
        before = 3 if i == 0 else channels // 2
        stride = 1 if i == 0 else 2
        layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.GroupNorm(8, channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * width, 384))


def train_judge(parts: dict[str, Part], steps: int, seed: int = 0) -> nn.Sequential:
    """The judge, trained on all parts; images are shifted by up to 3 px and get some noise."""
    torch.manual_seed(seed)
    judge = build_judge()
    images = torch.cat([part.images for part in parts.values()])
    text = torch.cat([part.embeddings for part in parts.values()])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randperm(len(images))[:128]
        dx, dy = (int(v) for v in torch.randint(0, 7, (2,)))
        seen = F.pad(images[rows], (3, 3, 3, 3), value=1.0)[:, :, dy : dy + SIZE, dx : dx + SIZE]
        seen = seen + 0.15 * torch.rand(len(rows), 1, 1, 1) * torch.randn_like(seen)
        logits = F.normalize(judge(seen), dim=1) @ text[rows].T / TEMPERATURE
        target = torch.arange(len(rows))
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return judge.eval()


@torch.no_grad()
def share_found(judge: nn.Module, images: Tensor, own: Tensor, part: Part, seed: int = 0) -> float:
    """Share of images whose own caption the judge prefers to nine others of the part.

    Args:
        judge: the network.
        images: `(n, 3, 32, 32)`.
        own: `(n,)` places of their captions in the part.
        part: where the others come from.
        seed: of the choice of the others.
    """
    draw = np.random.default_rng(seed)
    found = F.normalize(judge(images), dim=1)
    wins = 0
    for vector, right in zip(found, own.tolist(), strict=True):
        others = draw.choice([i for i in range(len(part.captions)) if i != right], AMONG - 1, replace=False)
        scores = part.embeddings[[right, *others.tolist()]] @ vector
        wins += int(scores.argmax()) == 0
    return wins / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a text-to-image model: run, checkpoint or published name")
    parser.add_argument("--captions", type=int, default=100, help="of each part (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="images per caption (default: %(default)s)")
    parser.add_argument("--judge-steps", type=int, default=1500, help="training of the judge (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="default: that of the weights")
    args = parser.parse_args()
    parts, pipe = read_parts(), pipeline(args.source)
    judge = train_judge(parts, args.judge_steps)
    result = dict[str, dict[str, float]]()
    for split, part in parts.items():
        chosen = np.random.default_rng(1).permutation(len(part.captions))[: args.captions]
        captions = [part.captions[i] for i in chosen]
        samples = pipe(captions, seeds=list(range(args.seeds)), guidance=args.guidance, batch_size=64)
        own = torch.from_numpy(chosen)
        result[split] = {
            "sampled": share_found(judge, as_seen(samples.pixels), own.repeat_interleave(args.seeds), part),
            "real": share_found(judge, part.images[own], own, part),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
