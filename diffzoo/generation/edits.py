"""Images from images: image-to-image, inpainting, inversion and interpolation, as methods of a pipeline."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL.Image import Image as PillowImage
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.generation.published import Options, Published, Request
from diffzoo.generation.samples import Samples
from diffzoo.images import to_float
from diffzoo.sampling import Sampler
from diffzoo.sampling.edit import inpaint, interpolate, invert, noised, seed_noise, shortened
from diffzoo.sizes import Size, as_size, sides
from diffzoo.typing import Latents

__all__ = ["Edits", "fitted"]

Image = str | Path | np.ndarray | PillowImage
STRENGTH = 0.6  # of image-to-image where a call names none


class Edits:
    """The methods of a pipeline that start from an image, a seed or an inversion."""

    published: Published

    def edit(
        self,
        image: Image,
        classes: Sequence[str | int] | str | int | None = None,
        seeds: Sequence[int] = range(4),
        *,
        strength: float | None = None,
        mask: Image | None = None,
        resample: int = 10,
        **options: Unpack[Options],
    ) -> Samples:
        """Sample from a noised image; with a mask, only where it is white, so that it goes with the rest.

        Args:
            image: a file, an image of Pillow, or uint8 `(h, w, 3)`; cropped and resized to the size of the model.
            classes, seeds: as for sampling.
            strength: share of the sampler's steps that are made, in (0, 1]: small keeps the image. Default: 0.6, and 1
                with a mask.
            mask: a file, or uint8 `(h, w)` of the image's size, white where to sample; fitted as the image is.
            resample: with a mask: how often each step is made (arXiv:2201.09865); more fits better and costs more.
            options: as for sampling.

        Raises:
            UserError: for an image that cannot be read, a mask of another size, or a strength out of range.
        """
        generator = self.published.generator
        request = self.published.request(classes, seeds, **options)
        pixels, about = fitted(image, generator.image_size)
        known = generator.encode(to_float(pixels)[None])
        strength = (STRENGTH if mask is None else 1.0) if strength is None else strength
        short = shortened(request.sampler, generator.process, strength)
        about |= {"strength": strength, "steps": short.steps, "of_steps": request.sampler.steps}
        rows = known.expand(len(request.seeds), -1, -1, -1)
        start = noised(generator.process, short, rows, request.seeds)
        if mask is None:
            edit = {"kind": "image to image", **about}
            return self.published.sample(replace(request, sampler=short), start=start, edit=edit)
        where = self._mask(mask, pixels, image)
        latent = F.max_pool2d(where.float()[None, None], generator.autoencoder.ratio)[0, 0] > 0
        generator.show_images(request.speed.get("trajectory"))
        latents = inpaint(
            generator.guided(request.guidance),
            short,
            rows,
            latent,
            request.seeds,
            request.cond,
            start=start if strength < 1 else None,
            resample=resample,
            device=generator.device,
            **request.speed,
        )
        images = torch.where(where, generator.decode(latents), to_float(pixels))  # an autoencoder changes all pixels
        about |= {"mask_share": float(where.float().mean()), "resample": resample}
        edit = {"kind": "inpainting", **about}
        return self.published.samples(images, request, edit=edit)

    def _mask(self, mask: Image, pixels: Tensor, image: Image) -> Tensor:
        """Where to sample, bool `(h, w)`, fitted as the image was."""
        theirs, ours = _opened(mask), _opened(image)
        if theirs.shape[:2] != ours.shape[:2]:
            raise UserError(
                f"the mask has {theirs.shape[1]} x {theirs.shape[0]} pixels and the image {ours.shape[1]} x "
                f"{ours.shape[0]}: give a mask of the image's size"
            )
        where = fitted(mask, as_size(list(pixels.shape[-2:])), nearest=True)[0][0] > 127
        if not where.any():
            raise UserError("the mask is black everywhere: paint white where to sample")
        return where

    def invert(
        self,
        image: Image,
        classes: str | int | None = None,
        *,
        guidance: float | Mapping[str, object] | None = None,
        steps: int | None = None,
        sampler: Sampler | str | None = None,
    ) -> Latents:
        """The start from which DDIM with the same steps, class and guidance comes back to an image, `(1, c, h, w)`.

        `pipe(classes, seeds=[0], steps=steps, sampler="DDIM", start=pipe.invert(image, classes, steps=steps))`

        Args:
            image: a file, an image of Pillow, or uint8 `(h, w, 3)`; cropped and resized to the size of the model.
            classes: what it shows.
            guidance: default: none, since strong guidance does not come back.
            steps, sampler: whose grid is walked upwards.
        """
        generator = self.published.generator
        request = self.published.request(classes, [0], guidance, steps, sampler)
        denoise = generator.guided(None if guidance is None else request.guidance)
        known = generator.encode(to_float(fitted(image, generator.image_size)[0])[None])
        return invert(denoise, request.sampler, known, request.cond, device=generator.device)

    def interpolate(
        self,
        a: int | Latents,
        b: int | Latents,
        classes: str | int | None = None,
        *,
        frames: int = 8,
        **options: Unpack[Options],
    ) -> Samples:
        """Images between two: of starts along the great circle between those of two seeds, or of two inversions.

        Args:
            a, b: a seed, or a start such as that of `invert`.
            classes: one class or caption.
            frames: how many images, the two ends among them; at least 2.
            options: as for sampling.
        """
        if frames < 2:
            raise UserError(f"expected at least 2 frames, got {frames}")
        # the seed is that of what a stochastic sampler draws on the way
        seeds = [a if isinstance(a, int) else 0] * frames
        request = self.published.request(classes, seeds, **options)
        weights = [i / (frames - 1) for i in range(frames)]
        start = interpolate(self._start(a, request), self._start(b, request), weights)
        edit = {"kind": "interpolation", "between": [end if isinstance(end, int) else "given" for end in (a, b)]}
        return _each(self.published.sample(request, start=start, edit=edit), "weight", weights)

    def variations(
        self,
        of: int | Latents,
        classes: str | int | None = None,
        seeds: Sequence[int] = range(8),
        *,
        amount: float = 0.3,
        **options: Unpack[Options],
    ) -> Samples:
        """Images near one: of starts that lie some way from that of a seed, towards those of other seeds.

        Args:
            of: a seed, or a start such as that of `invert`.
            classes: one class or caption.
            seeds: what to go towards, one image each.
            amount: share of the way along the great circle, in [0, 1]: 0 is the seed itself, 1 the other ones.
            options: as for sampling.
        """
        if not 0 <= amount <= 1:
            raise UserError(f"expected an amount in [0, 1], got {amount}: 0 is the image itself, 1 another one")
        own = of if isinstance(of, int) else 0
        request = self.published.request(classes, [own] * len(seeds), **options)
        first = self._start(of, request)
        start = torch.cat([interpolate(first, self._start(int(seed), request), [amount]) for seed in seeds])
        edit = {"kind": "variations", "of": of if isinstance(of, int) else "given", "amount": amount}
        return _each(self.published.sample(request, start=start, edit=edit), "towards", [int(seed) for seed in seeds])

    def _start(self, end: int | Latents, request: Request) -> Float[Tensor, "c h w"]:
        """The state that sampling from a seed starts with, or one that is given."""
        generator = self.published.generator
        start = seed_noise(generator.process, request.sampler, [end], generator.shape) if isinstance(end, int) else end
        return start.reshape(generator.shape)


def _each(samples: Samples, name: str, values: Sequence[int] | Sequence[float]) -> Samples:
    """The samples with a value each in the record of the edit."""
    pairs = zip(samples.records, values, strict=True)
    samples.records = [{**record, "edit": {**record["edit"], name: value}} for record, value in pairs]
    return samples


def _opened(image: Image) -> np.ndarray:
    """uint8 `(h, w, 3)` of a file, an array or an open image."""
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    if isinstance(image, PillowImage):
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, str | Path):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(f"expected an image as uint8 (h, w, 3), got {image.dtype} {image.shape}")
        return np.asarray(Pillow.fromarray(image).convert("RGB"))
    try:
        with Pillow.open(image) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no image, or a damaged one"
        raise UserError(f"could not read the image {image}: {reason}") from error


def fitted(image: Image, size: Size, nearest: bool = False) -> tuple[Tensor, dict[str, object]]:
    """The centre of an image in the aspect of `size`, resized to it, uint8 `(3, h, w)`, and what was done to it.

    Args:
        image: a file, an image of Pillow, or uint8 `(h, w, 3)` or `(h, w)`.
        size: height and width in pixels.
        nearest: take the nearest pixel, for masks.
    """
    from PIL import Image as Pillow

    pixels = _opened(image)
    about: dict[str, object] = {"image_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    h, w = pixels.shape[:2]
    height, width = sides(size)
    if (h, w) != (height, width):
        tall, wide = min(h, w * height // width), min(w, h * width // height)
        top, left = (h - tall) // 2, (w - wide) // 2
        part = Pillow.fromarray(pixels[top : top + tall, left : left + wide])
        filter_ = Pillow.Resampling.NEAREST if nearest else Pillow.Resampling.BICUBIC
        pixels = np.asarray(part.resize((width, height), filter_))
        about["fitted"] = f"cropped and resized from {w} x {h} to {width} x {height}"
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1), about
