"""Previews: grids of images sampled during training, from the EMA weights."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffzoo.encoders import Identity
from diffzoo.errors import UserError
from diffzoo.generation import Generator
from diffzoo.generation.classes import Classes
from diffzoo.images import make_grid, save_image, to_uint8
from diffzoo.sampling import Guidance
from diffzoo.training.ema import averaged
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.sharding import is_sharded
from diffzoo.training.steps import StepCallback, data_of, ended
from diffzoo.typing import Condition

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["SampleGrid", "sampling_from"]


class SampleGrid(StepCallback):
    """Writes `samples/step_*.png` at intervals and `samples/final.png` at the end of training.

    The same seeds and classes every time, so that the grids can be compared: one row per class (unconditional
    networks: one row). The other ranks idle while rank 0 samples, or sample along where the network is sharded.

    Args:
        every_n_steps: interval in optimizer steps; 0 = at the end only.
        classes: class indices of the rows; None = the first eight.
        per_class: images per row.
        guidance: classifier-free guidance scale; 1 = none.
        final_steps: sampler steps of the final grid; None = as for the others.
        batch_size: images sampled at once.
        captions: what to sample with a text model, one row each; None = captions of the first validation batch.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        classes: Sequence[int] | None = None,
        per_class: int = 8,
        guidance: float = 1.5,
        final_steps: int | None = None,
        batch_size: int = 64,
        captions: Sequence[str] | None = None,
    ):
        if per_class < 1:
            raise UserError(f"per_class must be at least 1, got {per_class}")
        self.every_n_steps, self.classes, self.per_class = every_n_steps, classes, per_class
        self.guidance, self.final_steps, self.batch_size = guidance, final_steps, batch_size
        self.captions = captions

    def after_step(self, trainer: L.Trainer, module: "DiffusionModule") -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0:
            self.sample(trainer, module, f"step_{step:07d}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if ended(trainer):
            self.sample(trainer, cast("DiffusionModule", pl_module), "final", self.final_steps)

    def sample(self, trainer: L.Trainer, module: "DiffusionModule", name: str, steps: int | None = None) -> Path | None:
        """Sample one grid and write it; returns its path, or None on other ranks, on a full disk, and for images that
        are not finite."""
        sharded = any(map(is_sharded, module.network.parameters()))
        if not trainer.is_global_zero and not sharded:  # a sharded network needs every rank in its forward
            return None
        cond, names = self._conditions(trainer, module)
        guided = bool(self.guidance != 1 and cond is not None and module.network.config.null_class)
        sampler = module.sampler if steps is None else replace(module.sampler, steps=steps)
        with sampling_from(module) as generator:
            images = generator.images(
                [*range(self.per_class)] * len(names),
                cond,
                sampler=sampler,
                guidance=Guidance(self.guidance) if guided else None,
                batch_size=self.batch_size,
            )
        if not trainer.is_global_zero:
            return None
        labels = [", ".join(filter(None, (row, f"seed {i}"))) for row in names for i in range(self.per_class)]
        path = Path(trainer.default_root_dir) / "samples" / f"{name}.png"
        try:
            grid = make_grid(to_uint8(images), self.per_class, labels=labels)
        except UserError as error:  # a preview must not stop training; `GradientGuard` may
            rank_zero_warn(f"no preview at step {trainer.global_step}: {error}")
            return None
        rows = names
        if cond is not None and cond.label is not None:
            rows = [str(label) for label in cond.label[:: self.per_class].tolist()]
        options = self._options(module.guidance, rows if cond is not None else [], sampler.steps, guided)
        made = json.dumps({"step": trainer.global_step, "options": options})
        written = write_or_warn(path.parent, lambda: _log(trainer, grid, path, made))
        return path if written else None

    def _options(self, known: Guidance | None, classes: list[str], steps: int, guided: bool) -> list[str] | None:
        """The options of `diffzoo sample` that sample a grid again; None if none do.

        That command guides by the formula and interval of the recipe, `known`, and a preview by the usual formula.
        """
        known = known or Guidance(1.0)
        same = replace(known, scale=self.guidance) == Guidance(self.guidance) if guided else not known.acts
        if not same:
            return None
        options = ["--seeds", f"0-{self.per_class - 1}", "--steps", str(steps)]
        if classes:
            options += ["--classes", *classes]
        if guided:
            options += ["--guidance", str(self.guidance)]
        return options

    def _conditions(self, trainer: L.Trainer, module: "DiffusionModule") -> tuple[Condition | None, list[str]]:
        """The condition of each image, and the label of each row of the grid."""
        config = module.network.config
        if module.text_encoder is not None:
            held_out = next(iter(data_of(trainer).val_dataloader()))["caption"][:8] if not self.captions else []
            captions = list(self.captions or held_out)
            text, mask = module.text_encoder.encode([c for c in captions for _ in range(self.per_class)])
            return Condition(text=text, text_mask=mask), captions
        if not config.num_classes:
            return None, [""] * self.per_class
        count = len(module.class_names) or config.num_classes
        classes = list(self.classes) if self.classes is not None else list(range(min(8, count)))
        for c in classes:
            if not 0 <= c < config.num_classes:
                raise UserError(
                    f"preview class {c} is out of range: the network has classes 0 to {config.num_classes - 1}"
                )
        names = Classes(config.num_classes, tuple(module.class_names))
        labels = torch.tensor([c for c in classes for _ in range(self.per_class)])
        return Condition(label=labels), [names.label(c) if c < count else f"class {c}" for c in classes]


def _log(trainer: L.Trainer, grid: Tensor, path: Path, made: str) -> None:
    save_image(grid, path, {"diffzoo": made})
    for logger in trainer.loggers:
        writer = getattr(getattr(logger, "experiment", None), "add_image", None)
        if writer is not None:
            writer("samples", grid, trainer.global_step)
        elif hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image("samples", [grid], trainer.global_step)


@contextmanager
def sampling_from(module: "DiffusionModule", label: str | None = None) -> Iterator[Generator]:
    """The generator of a module in training, with an EMA in its network for the length of the block."""
    was_training = module.network.training
    module.network.eval()
    try:
        with averaged(module, label), torch.no_grad():
            yield Generator(
                module.network,
                module.process,
                module.autoencoder if module.autoencoder is not None else Identity(),
                module.text_encoder,
                device=module.device,
            )
    finally:
        module.network.train(was_training)
