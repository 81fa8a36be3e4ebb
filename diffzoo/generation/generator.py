"""The one object that samples: a network with all that turns seeds into images.

The pipeline, evaluation, sweeps and the previews of training differ in where seeds, classes and guidance come from; the
way from there to images is `Generator.images`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from diffzoo.encoders.autoencoder import Autoencoder, Identity
from diffzoo.encoders.text import TextEncoder
from diffzoo.errors import UserError
from diffzoo.generation.guidance import AnyGuidance, ByClassifier, ByWeakerModel
from diffzoo.generation.plan import Precision, SamplePlan, labels_of
from diffzoo.models.base import Network
from diffzoo.precision import float32_digits
from diffzoo.process import Cosine, GaussianProcess, Interpolated, LogSNRConditioning, Shifted
from diffzoo.runs import launch
from diffzoo.sampling import ClassifierGuidance, Denoise, Denoiser, Sampler, Trajectory, sample
from diffzoo.sampling.upsample import quantise
from diffzoo.sizes import Size, as_size, mean_side, scaled, sides, size_text
from diffzoo.typing import Condition, Images, Latents
from diffzoo.zoo.building import Loaded

__all__ = ["Generator", "ImageSource", "PlannedImages", "device_of"]

DECODED = 16  # latents that are decoded at a time


def device_of(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; None = a GPU if there is one. Under torchrun or srun "cuda" is the GPU of this process.

    Raises:
        UserError: for a name that is none, and for a GPU that is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":
            torch.empty(0, device=device)  # torch knows the names of devices that it was not built for
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and device.index is None and launch().world > 1 and torch.cuda.device_count():
        device = torch.device("cuda", launch().local % torch.cuda.device_count())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no device {device}: {torch.cuda.device_count()} GPUs were found; cpu works anywhere")
    return device


@dataclass
class Generator:
    """A network with its process, frozen encoders and guides.

    Args:
        network: in evaluation mode, on `device`.
        process: it was trained with.
        autoencoder: decodes what the network samples; the identity in pixel space.
        text_encoder: embeds captions; None for networks that read none, or where it is not known.
        classifier: the noise-aware classifier that guides.
        weak: denoiser of the weaker model of autoguidance.
        device: where to compute.
        latent_size: height and width that the network sees, where they are not its own (`at`).
    """

    network: Network
    process: GaussianProcess
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None = None
    classifier: Any = None
    weak: Denoise | None = None
    device: torch.device | str = "cpu"
    latent_size: Size | None = None

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        device: torch.device | str,
        autoencoder: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> Self:
        """The generator of loaded weights, with the frozen encoders that belong to them unless others are given.

        Raises:
            UserError: for a classifier.
        """
        metadata = loaded.metadata
        if metadata.kind != "denoiser":
            raise UserError(
                f"{metadata.title} is a classifier and samples nothing: guide a model of its "
                "resolution with it, pipeline(MODEL, classifier=...) or diffzoo sample MODEL --classifier ..."
            )
        if autoencoder is None:
            autoencoder = metadata.autoencoder.build() if metadata.autoencoder else Identity()
        if text_encoder is None and metadata.text_encoder is not None:
            text_encoder = metadata.text_encoder.build()
        network = loaded.network.eval().to(device)
        encoder = text_encoder.to(device) if text_encoder is not None else None
        return cls(network, loaded.process, autoencoder.to(device), encoder, device=device)

    def guide_with(self, classifier: Loaded) -> None:
        """Let a classifier for this network's noisy images do the guidance.

        Raises:
            UserError: for weights that are no classifier, or one of another resolution or noise schedule.
        """
        ours, theirs, name = self.network.config, classifier.network.config, classifier.metadata.name
        if classifier.metadata.kind != "classifier":
            raise UserError(f"{name} is no classifier: guide with one, such as adm_classifier_64")
        if (ours.image_size, ours.in_channels) != (theirs.image_size, theirs.in_channels):
            own, other = size_text(ours.image_size), size_text(theirs.image_size)
            raise UserError(f"the classifier reads images of {other} px, this model samples {own} px: use its own")
        if classifier.metadata.process is not None and classifier.process.schedule != self.process.schedule:
            raise UserError(
                f"{name} was trained on another noise schedule than this model: use the classifier that was made for it"
            )
        self.classifier = classifier.network.eval().requires_grad_(False).to(self.device)

    # -- what it samples

    @property
    def denoiser(self) -> Denoiser:
        """Network and process, without guidance."""
        return Denoiser(self.network, self.process)

    @property
    def num_classes(self) -> int:
        """Classes to choose from: the network's, or those that the classifier tells apart; 0 = unconditional."""
        guide = self.classifier.config.num_classes if self.classifier is not None else 0
        return int(self.network.config.num_classes or guide)

    @property
    def kind(self) -> Literal["image", "caption", "class", "nothing"]:
        """What it samples from: a smaller image (upsamplers), a caption, a class, or nothing."""
        config = self.network.config
        if config.upsampler:
            return "image"
        return "caption" if config.text_width else "class" if self.num_classes else "nothing"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image or latent as the network sees it, `(c, h, w)`."""
        return self.network.config.in_channels, *sides(self.latent_size or self.network.config.image_size)

    @property
    def image_size(self) -> Size:
        """Height and width of its images in pixels."""
        return scaled(as_size(self.shape[1:]), self.autoencoder.ratio)

    def at(self, size: Size | None) -> Self:
        """This generator for images of another height and width in pixels; None = its own.

        Learned positions are resampled. The schedule of Simple Diffusion follows the number of pixels: it is shifted
        where the network reads log-SNR itself (`Shifted`), so that a larger image begins in as much more noise.

        Raises:
            UserError: for a network of one size, and for sides that it cannot have.
        """
        if size is None or as_size(size, "size") == self.image_size:
            return self
        size, name = as_size(size, "size"), type(self.network).__name__
        if not self.network.any_size or self.classifier is not None:
            why = f"a {name} has one size" if self.classifier is None else "its classifier reads one size"
            raise UserError(f"this model samples images of {size_text(self.image_size)} px only, because {why}")
        step = self.autoencoder.ratio * self.network.config.cell
        if any(side % step for side in sides(size)):
            near = as_size([max(step, round(side / step) * step) for side in sides(size)])
            raise UserError(
                f"size: this model samples heights and widths that are multiples of {step}, got {size_text(size)}: "
                f"the nearest is {size_text(near)}"
            )
        latent = as_size([side // self.autoencoder.ratio for side in sides(size)])
        return replace(self, latent_size=latent, process=self._shifted(mean_side(latent)))

    def _shifted(self, side: float) -> GaussianProcess:
        """The process for images with as many pixels as a square of this side."""
        own, schedule = mean_side(as_size(self.shape[1:])), self.process.schedule
        reads = self.process.noise_conditioning
        if side == own or reads != LogSNRConditioning() or not isinstance(schedule, Cosine | Shifted | Interpolated):
            return self.process
        return replace(self.process, schedule=Shifted(schedule, from_resolution=own, to_resolution=side))

    def captions(self, captions: Sequence[str]) -> Condition:
        """The condition of some captions.

        Raises:
            UserError: if the text encoder is not known.
        """
        return self._text(lambda encoder: encoder.encode(list(captions)))

    def _text(self, embed: Callable[[TextEncoder], tuple[Tensor, Tensor]]) -> Condition:
        if self.text_encoder is None:
            raise UserError("these weights read captions but do not say through which text encoder: pass one")
        embedded, mask = embed(self.text_encoder)
        return Condition(text=embedded, text_mask=mask)

    def guided(self, guidance: AnyGuidance | None) -> Denoise:
        """The denoiser with guidance around it: the one place where it gets it.

        Raises:
            UserError: for guidance that does not fit the network.
        """
        if guidance is None:
            return self.denoiser
        if isinstance(guidance, ByClassifier):
            conditional = self.network.config.num_classes > 0
            return ClassifierGuidance(self.denoiser, self.classifier, guidance.scale, conditional=conditional)
        captions = self.kind == "caption" and self.text_encoder is not None
        null = self._text(lambda encoder: encoder.null(1)) if captions else None
        return guidance.around(self.denoiser, null, self.weak if isinstance(guidance, ByWeakerModel) else None)

    # -- sampling

    def images(
        self,
        seeds: Sequence[int],
        cond: Condition | None = None,
        *,
        sampler: Sampler,
        guidance: AnyGuidance | None = None,
        precision: Precision | None = None,
        **options: Any,
    ) -> Images:
        """One image per seed, in about [-1, 1], float32 on the CPU.

        Args:
            seeds: one non-negative integer per image.
            cond: what to sample, a row per image.
            sampler: how to step, and where.
            guidance: as in `SamplePlan`; None = none.
            precision: "fp32" = float32 with all digits; "bf16" or "fp16" = the network in that; "tf32" or None = as
                torch is set.
            options: of `diffzoo.sampling.sample`: batch_size, progress, start, trajectory, compile.
        """
        with float32_digits(precision == "fp32"):
            guided = self.guided(guidance)
            _ = self.autoencoder.ratio  # loads it: a missing package or a failed download is said before the steps
            half: Any = precision if precision in ("bf16", "fp16") else None
            self.show_images(options.get("trajectory"))
            return self.decode(
                sample(guided, sampler, self.shape, seeds, cond, device=self.device, precision=half, **options)
            )

    def show_images(self, trajectory: Trajectory | None) -> None:
        """Let a trajectory decode latents, if it does not yet."""
        if trajectory is not None and trajectory.decode is None and not isinstance(self.autoencoder, Identity):
            trajectory.decode = self.decode

    def encode(self, images: Images) -> Latents:
        """What the network samples in place of images in [-1, 1]: the mean of their latents, float32 on the CPU."""
        return self.autoencoder.encode(images.to(self.device))[0].float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Images:
        """Images from what the network samples, float32 on the CPU."""
        if isinstance(self.autoencoder, Identity):
            return latents
        parts = latents.split(DECODED)
        return torch.cat([self.autoencoder.decode(part.to(self.device)).float().cpu() for part in parts])


class ImageSource(Protocol):
    """Images by position: a model with a plan, a folder, a file. It crosses process boundaries by pickling."""

    def images(self, start: int, count: int) -> Tensor:
        """Images `start` to `start + count`: uint8, or floats in [-1, 1], `(count, c, h, w)`."""

    def plan(self) -> Any:
        """What goes into the record."""


@dataclass
class PlannedImages:
    """Images by position, sampled as a plan says: image i comes from the seed `plan.first_seed + i`.

    Args:
        generator: what samples.
        sample_plan: how.
        captions: one per image, for text models.
        base: of an upsampler: the small images, in [-1, 1].
    """

    generator: Generator
    sample_plan: SamplePlan
    captions: Sequence[str] = ()
    base: ImageSource | None = None

    def condition(self, start: int, count: int) -> Condition | None:
        """What to sample at some positions.

        Raises:
            UserError: if the plan's captions or classes do not fit.
        """
        if self.sample_plan.labels == "captions":
            captions = self.captions[start : start + count]
            if len(captions) < count:
                raise UserError(
                    f"the plan samples captions and has {len(self.captions)}; image {start + count - 1} has none: give "
                    "--captions FILE, one per line"
                )
            return self.generator.captions(captions)
        label = labels_of(self.sample_plan, self.generator.num_classes, start, count)
        low = quantise(self.base.images(start, count)) if self.base is not None else None
        cond = Condition(label=label, low_res=low)
        return cond if len(cond) else None

    def images(self, start: int, count: int) -> Images:
        """Images at some positions, `(count, c, h, w)`, float32 on the CPU."""
        plan = self.sample_plan
        return self.generator.at(plan.size).images(
            range(plan.first_seed + start, plan.first_seed + start + count),
            self.condition(start, count),
            sampler=plan.sampler,
            guidance=plan.guidance,
            precision=plan.precision,
            batch_size=plan.images_per_batch,
        )

    def plan(self) -> SamplePlan:
        """The plan."""
        return self.sample_plan
