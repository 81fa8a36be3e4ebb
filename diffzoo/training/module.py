"""The LightningModule: one step of training, and what Lightning calls around it.

`training_step` is Algorithm 1 of arXiv:2006.11239: sample a time and noise, diffuse, predict, weigh. The mathematics is
in `diffzoo.process`. Starting from weights is in `fine_tuning.py`, the checks of a resumed run are in `resume.py`.
"""

import functools
from pathlib import Path
from typing import cast

import lightning.pytorch as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from diffzoo import rng
from diffzoo.encoders.autoencoder import Autoencoder
from diffzoo.encoders.text import TextEncoder
from diffzoo.errors import UserError
from diffzoo.images import to_float
from diffzoo.models.base import Network, Recompute
from diffzoo.process import GaussianProcess, TimeDensity, UniformEps, Weighting, denoising_loss
from diffzoo.process.discrete import hybrid_loss
from diffzoo.record import from_plain
from diffzoo.sampling import DDIM, Guidance, Sampler
from diffzoo.training import fine_tuning, freezing, frozen_encoders, resume, run_record
from diffzoo.training.batch_format import BatchReader, check_data_fits, size_of
from diffzoo.training.extra_losses import ExtraLoss, StepOutputs
from diffzoo.training.gradients import clip_by_norm, gradient_norm, release
from diffzoo.training.guards import GradientGuard
from diffzoo.training.host_memory import keep_freed_memory
from diffzoo.training.lora import LoRA, inject
from diffzoo.training.optimizers import OptimizerFactory, SchedulerFactory, network_optimizer, with_scheduler
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.sharding import is_sharded, shard
from diffzoo.training.steps import callback_of, ended
from diffzoo.typing import Batch, Condition, Data, Images, PerSample
from diffzoo.zoo.loading import base_of
from diffzoo.zoo.metadata import Metadata

__all__ = ["DiffusionModule"]


class DiffusionModule(L.LightningModule):
    """Trains a denoiser.

    Args:
        network: a registered name (`diffzoo list`), `module:name` for one that a module of one's own registers, or a
            built network.
        network_args: overrides of the registered config, for example `{dropout: 0.2, depth_at: {16: 36}}`.
        weights: start from these weights: a published tag, a Hub repository, a run or a file; None = random. With
            `network_args` of other `num_classes` and a policy `classes` (mean, copy or random), or another
            `image_size`, they are adapted: see `diffzoo.zoo.adapt`. "copy" goes by the names of the data's classes.
        shift_schedule: where the weights are of another image size, shift the schedule of `process`, which is then the
            weights' own, by the ratio of the two (Eq. 4 of arXiv:2301.11093).
        freeze: parameters that do not train: "blocks", "first_half", "all_but_classes", or patterns of parameter names.
        layer_decay: learning rate of a block as a share of the next block's; the output layer and the class table keep
            the full rate. None = the same rate for all.
        lora: train only low-rank adapters and the class table; checkpoints then hold nothing else.
        process: schedule, path, prediction and noise conditioning.
        weighting: which noise levels matter.
        time_density: distribution of the training times, which weighs noise levels too (`process/time_density.py`);
            None = uniform.
        extra_losses: terms beside the denoising loss, in this order (`training/extra_losses.py`).
        loss_resolutions: the resolutions of Simple Diffusion's multiscale loss, in pixels; None = plain loss.
        loss_coefficients: weight of each output of a multi-resolution network; None = 1 / ratio^2.
        condition_dropout: probability that a sample is trained without its condition, for classifier-free guidance.
        sampler: makes the previews.
        guidance: {formula, scale}, perhaps {interval, decay}: how the finished weights are to be guided. Evaluation,
            sampling and the model card take it from the run. Without effect on networks without conditions.
        optimizer: called with the parameter groups; None = AdamW at a learning rate of 1e-4.
        lr_scheduler: called with the optimizer, stepped every step; None = constant.
        autoencoder: frozen codec of a latent model; None = pixel space.
        text_encoder: frozen encoder of captions; None = classes or nothing.
        grad_checkpointing: recompute the blocks' activations: less memory, about a quarter more time; or
            "all_but_attention".
        compile: compile every block.
        channels_last: keep feature maps in NHWC order, which convolutions prefer.
        seed: seed of noise, times and dropout of conditions.
    """

    autoencoder: Autoencoder | None
    text_encoder: TextEncoder | None
    last_losses: tuple[Tensor, Tensor] | None  # of a step: log-SNR and loss per sample
    last_ids: list[int]  # of its rows

    # -- Algorithm 1

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch: sample times and noise, diffuse, predict, weigh."""
        index, places = self._index(batch, batch_idx)
        x = self.clean(batch, places)
        cond = self.condition(batch, places)
        t = self._times(places)
        eps = rng.normal("eps", self.seed, places, x.shape[1:], self.device)
        if self.drops:
            rng.seed_layers(self.seed, index)
        loss = self.losses(x, eps, t, cond, self._seen(batch))
        self.last_losses = (self.process.logsnr(t), loss.detach())
        ids = batch.get("id", index)
        self.last_ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return loss.mean()

    def losses(
        self, x: Data, eps: Data, t: PerSample, cond: Condition | None, images: Images | None = None
    ) -> Float[Tensor, " b"]:
        """Weighted loss per sample, `(b,)`; `images` are the clean ones in [-1, 1] where x are their latents."""
        t = self.process.schedule.snap(t)
        z = self.process.add_noise(x, eps, t)
        if self.channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        level, network = self.process.noise_level(t), self.network
        tokens = None
        if any(term.needs_tokens for term in self.extra_losses):
            output, tokens = network.aligned(z, level, cond)
            outputs: tuple[Tensor, ...] = (output,)
        else:
            outputs = network.training_outputs(z, level, cond)
        if self.process.learned_variance:
            return hybrid_loss(self.process, outputs[-1].float(), x, z, eps, t)
        outputs = tuple(out.float() for out in outputs)
        loss = denoising_loss(
            self.process, self.weighting, outputs, x, eps, t, self.loss_resolutions, self.loss_coefficients
        )
        step = StepOutputs(network, self.process, x, eps, t, level, outputs[-1], tokens, images)
        for term in self.extra_losses:
            loss = term(loss, step)
        return loss

    def clean(self, batch: Batch, places: rng.Places) -> Data:
        """Clean data `(b, c, h, w)`: images in [-1, 1], or unit-variance latents drawn from their moments."""
        if "moments" in batch:
            mean, std = batch["moments"].float().chunk(2, dim=1)
        else:
            images = _floats(batch["image"])
            if self.autoencoder is None:
                return images
            with torch.no_grad():
                mean, std = self.autoencoder.encode(images)
        return mean + std * rng.normal("latent", self.seed, places, mean.shape[1:], self.device)

    def condition(self, batch: Batch, places: rng.Places | None) -> Condition | None:
        """Class or text of a batch; with `places`, some are dropped, here and nowhere else."""
        label = batch.get("label") if self.network.config.num_classes else None
        text = mask = None
        if self.text_encoder is not None:
            text, mask = frozen_encoders.encoded_text(batch, self.text_encoder, self.device)
        cond = Condition(label=label, text=text, text_mask=mask)
        if not len(cond):
            return None
        if places is not None and self.condition_dropout > 0:
            drop = rng.uniform("condition", self.seed, places, self.device) < self.condition_dropout
            null = self.network.null_condition(cond)
            cond = cond.where(~drop, null) if null is not None else cond
        return cond

    def _times(self, places: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        u = rng.times(self.seed, places, self.device)
        return u if self.time_density is None else self.time_density.times(self.process, u)

    def _seen(self, batch: Batch) -> Images | None:
        """The images of a batch in [-1, 1], for the terms of the loss that look at them."""
        return _floats(batch["image"]) if self.extra_losses and "image" in batch else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on held-out data, with noise that depends on the row alone; `EMA` puts its average in."""
        index = batch["id"] if "id" in batch else self._consecutive(batch, batch_idx)
        places = rng.places(index, self.device)
        x = self.clean(batch, places)
        t = self._times(places)
        eps = rng.normal("validation", self.seed, places, x.shape[1:], self.device)
        loss = self.losses(x, eps, t, self.condition(batch, None), self._seen(batch)).mean()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(x))
        # Lightning would log the step before this one
        self.log("step", float(self.global_step), sync_dist=True, batch_size=len(x))

    # -- which sample gets which noise

    def _index(self, batch: Batch, batch_idx: int) -> tuple[rng.Places, Int[Tensor, " b"]]:
        """Place of each sample in the global stream, on the host and on the device.

        Batches that do not say get consecutive places.
        """
        again = getattr(self._trainer, "overfit_batches", 0)
        if "index" in batch and not again:  # batches that come again get new noise each time
            places = batch.get("places")
            return batch["index"], rng.places(batch["index"], self.device) if places is None else places
        accumulate = self.trainer.accumulate_grad_batches
        index = self._consecutive(batch, self.global_step * accumulate + batch_idx % accumulate)
        return index, rng.places(index, self.device)

    def _consecutive(self, batch: Batch, number: int) -> range:
        """Consecutive places for the samples of batch `number`, over all ranks."""
        n = size_of(batch)
        start = (number * self.trainer.world_size + self.global_rank) * n
        return range(start, start + n)

    # -- what is trained

    def __init__(
        self,
        network: Network | str,
        network_args: dict[str, object] | None = None,
        weights: str | None = None,
        shift_schedule: bool = False,
        freeze: str | list[str] | None = None,
        layer_decay: float | None = None,
        lora: LoRA | None = None,
        process: GaussianProcess = GaussianProcess(),  # noqa: B008  frozen
        weighting: Weighting = UniformEps(),  # noqa: B008  frozen
        time_density: TimeDensity | None = None,
        extra_losses: list[ExtraLoss] | None = None,
        loss_resolutions: list[int] | None = None,
        loss_coefficients: list[float] | None = None,
        condition_dropout: float = 0.1,
        sampler: Sampler = DDIM(),  # noqa: B008  frozen
        guidance: dict[str, object] | Guidance | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        autoencoder: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        grad_checkpointing: Recompute = False,
        compile: bool = False,
        channels_last: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 <= condition_dropout <= 1:
            raise UserError(f"condition_dropout must lie in [0, 1], got {condition_dropout}")
        if lora is not None and (freeze is not None or layer_decay is not None):
            raise UserError("lora freezes everything but its adapters: leave out freeze and layer_decay")
        self.name = network.rpartition(":")[2] if isinstance(network, str) else type(network).__name__
        self.weights, self.lora, self.layer_decay = weights, lora, layer_decay
        self._class_policy = (network_args or {}).get("classes")
        self.network = fine_tuning.build_network(network, network_args, weights)
        self.network_class = type(self.network)  # sharding changes the class
        self.base = base_of(self.network.metadata, weights) if isinstance(self.network.metadata, Metadata) else None
        if weights:
            fine_tuning.check_process(self.network, process, weights)
        if shift_schedule:
            process = fine_tuning.shifted(process, self.network)
        if freeze is not None:
            freezing.freeze(self.network, freeze)
        # a recipe's guidance is no claim about a network without conditions, such as a base recipe with num_classes 0
        guided = guidance is not None and self.network.conditional
        self.guidance = from_plain(Guidance, guidance, "guidance") if guided else None
        self.recipe_settings: resume.Settings | None = None
        self.resumed: resume.Resumed | None = None  # until the first step
        self.frozen_sha256: str | None = None  # of the weights that the adapters belong to
        if lora is not None:
            inject(self.network, lora)
        self.drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.network.modules())
        self.process, self.weighting, self.sampler = process, weighting, sampler
        self.time_density = time_density
        self.extra_losses = list(extra_losses or ())
        for term in self.extra_losses:
            term.check(self.network)
        self.loss_resolutions, self.loss_coefficients = loss_resolutions, loss_coefficients
        self.condition_dropout = condition_dropout if self.network.config.null_class else 0.0
        self.optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-4)
        self.lr_scheduler = lr_scheduler
        # frozen encoders stay outside the module tree: they are neither averaged, nor saved, nor sharded
        object.__setattr__(self, "autoencoder", autoencoder)
        object.__setattr__(self, "text_encoder", text_encoder)
        self.network.set_grad_checkpointing(grad_checkpointing)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile_units()
        self.channels_last = channels_last
        self.seed = seed
        self.class_names: list[str] = []
        self.recipe: str | None = None
        self.last_losses, self.last_ids = None, []
        self._reader = BatchReader(self.network.config, latent=autoencoder is not None)

    # -- around a step

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Log the loss for callbacks that monitor it; `TrainingLog` writes it."""
        for optimizer in self.trainer.optimizers:
            release(optimizer)
        if self.last_losses is not None:
            loss = self.last_losses[1]
            self.log("train/loss", loss.mean(), logger=False, on_step=True, on_epoch=True, batch_size=len(loss))

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> Batch:
        """Bring a batch of any loader into our form (`batch_format`) and move it."""
        where = "training" if self._trainer is None or self._trainer.training else "validation"
        return self._reader.read(batch, where, dataloader_idx, device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the network alone, with the family's own no-decay groups."""
        decay, resumed = self.layer_decay, self.resumed
        shares = None if decay is None else freezing.learning_rate_shares(self.network, decay)
        sizes = resumed.group_sizes if resumed is not None else None
        optimizer = network_optimizer(self.optimizer, self.network, shares, sizes)
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler is not None else None
        self.recipe_settings = resume.settings_of(optimizer, scheduler)
        return with_scheduler(optimizer, scheduler)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that `GradientGuard` has just taken; by value, and in shards, as Lightning does."""
        if not gradient_clip_val:
            return
        sharded = any(map(is_sharded, self.network.parameters()))
        if sharded or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        guard = callback_of(self.trainer, GradientGuard)
        norm = guard.last_norm if guard is not None else gradient_norm(optimizer)
        if norm is not None:
            clip_by_norm(optimizer, norm, gradient_clip_val, self.trainer)

    def on_train_start(self) -> None:
        """After a resume, what the recipe has changed since wins over what the checkpoint stored."""
        resume.follow_recipe(self)

    def setup(self, stage: str) -> None:
        """Check that data and network fit, and say what disagrees."""
        data = getattr(self.trainer, "datamodule", None)
        check_data_fits(data, self.network.config, self.name, latent=self.autoencoder is not None)
        self._reader.sizes = tuple(getattr(data, "buckets", ()))
        self.class_names = list(getattr(data, "class_names", None) or [])
        if stage == "fit":
            fine_tuning.start(self.network, self.weights, self._class_policy, self.lora, self.class_names)

    def configure_model(self) -> None:
        """Shard the network block by block, where the strategy is `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is None:
            return
        if self.lora is not None:
            raise UserError("low-rank adapters are not trained on sharded networks: use DDP, they need little memory")
        shard(self.network, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Bring the frozen encoders to the device; tell the network what "no text" is, where it has to be told."""
        if self.device.type == "cpu":
            keep_freed_memory()
        frozen_encoders.prepare(self.network, self.autoencoder, self.text_encoder, self.device)
        for term in self.extra_losses:
            term.to(self.device)

    on_validate_start = on_fit_start

    def metadata(self) -> Metadata:
        """What is known about the weights that this run makes."""
        return run_record.run_metadata(self)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Add all that is needed to rebuild the model without its recipe (`diffzoo.zoo.load_any`)."""
        run_record.complete(self, cast(run_record.Checkpoint, checkpoint))

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Check that the checkpoint belongs to this run."""
        resume.check_checkpoint(self, cast(run_record.Checkpoint, checkpoint))

    def on_train_end(self) -> None:
        """Leave the adapters in the run's folder `adapter`."""
        if self.lora is not None and ended(self.trainer):
            folder = Path(self.trainer.default_root_dir) / "adapter"
            write_or_warn(folder, lambda: self.write_weights(folder))

    def write_weights(self, folder: Path) -> Path:
        """Write the network's weights, their EMA where one is kept: `run_record.write_weights`."""
        return run_record.write_weights(self, folder)


def _floats(images: Tensor) -> Images:
    """Images in [-1, 1] from raw pixels, or as they are."""
    return to_float(images) if images.dtype == torch.uint8 else images.float()
