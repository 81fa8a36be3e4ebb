"""The LightningModule: wiring between a network, a process and a data module, and nothing else.

`training_step` is Algorithm 1 of arXiv:2006.11239 in the words of this package: draw a time and noise, diffuse,
predict, weigh. Mathematics lives in `diffzoo.process`, networks in `diffzoo.models`, averages in `averaging.py`.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from diffzoo import __version__
from diffzoo.encoders.autoencoder import Autoencoder
from diffzoo.encoders.text import TextEncoder
from diffzoo.errors import UserError
from diffzoo.images import to_float
from diffzoo.models.adapters import plain_name
from diffzoo.models.base import Network
from diffzoo.process import (
    DiscreteBetas,
    GaussianProcess,
    Shifted,
    TimeDensity,
    UniformEps,
    Weighting,
    denoising_loss,
)
from diffzoo.record import from_plain, to_plain
from diffzoo.sampling import DDIM, Guidance, Sampler
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.training import draws, freezing
from diffzoo.training.allocation import keep_freed_memory
from diffzoo.training.averaging import EMA, averaged, whole_state
from diffzoo.training.batch_format import BatchFormat, size_of
from diffzoo.training.lora import LoRA, adapter_state, inject
from diffzoo.training.optimizers import parameter_groups, scale_learning_rates
from diffzoo.training.recipe_settings import Settings, apply_changes, settings_of
from diffzoo.training.sharding import shard
from diffzoo.training.side_files import write_or_warn
from diffzoo.typing import Condition
from diffzoo.zoo.loading import base_of
from diffzoo.zoo.metadata import Adapter, Metadata, Provenance, held_metadata, metadata_of
from diffzoo.zoo.saving import write_model

__all__ = ["DiffusionModule"]

OptimizerFactory = Callable[[Iterable], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

_say = rank_zero_only(print)  # on the command line Lightning's own remarks are hidden


class DiffusionModule(L.LightningModule):
    """Trains a denoiser.

    Args:
        network: a registered name (`diffzoo list`) or a built network.
        network_args: overrides of the registered config, for example `{dropout: 0.2, depth_at: {16: 36}}`.
        weights: start from these weights: a published tag, a Hub repository, a run or a file; None = random. With
            `network_args` of other `num_classes` and a policy `classes` (mean, copy or random), or another
            `image_size`, they are adapted: see `diffzoo.zoo.adapt`. "copy" goes by the names of the data's classes.
        shift_schedule: where the weights are of another image size, shift the schedule of `process`, which is then the
            weights' own, by the ratio of the two (Eq. 4 of arXiv:2301.11093).
        freeze: what does not train: "blocks", "first_half", "all_but_classes", or patterns of parameter names.
        layer_decay: share of the learning rate that a block gets of the next one's; the output layer and the class
            table have it whole. None = the same for all.
        lora: train low-rank adapters and the class table alone; checkpoints then hold nothing else.
        process: schedule, path, prediction and what the network reads.
        weighting: which noise levels matter.
        time_density: where training times are drawn, which weighs noise levels too (`process/time_density.py`); None =
            uniformly.
        loss_resolutions: the resolutions of Simple Diffusion's multiscale loss, in pixels; None = plain loss.
        loss_coefficients: weight of each output of a multi-resolution network; None = 1 / ratio^2.
        condition_dropout: probability that a sample is trained without its condition, for classifier-free guidance.
        sampler: draws the previews.
        guidance: {formula, scale}, perhaps {interval, decay}: how the finished weights are to be guided. Evaluation,
            sampling and the model card take it from the run.
        optimizer: called with the parameter groups.
        lr_scheduler: called with the optimizer, stepped every step; None = constant.
        autoencoder: frozen codec of a latent model; None = pixel space.
        text_encoder: frozen encoder of captions; None = classes or nothing.
        grad_checkpointing: recompute the blocks' activations: less memory, about a quarter more time.
        compile: compile every block.
        channels_last: keep feature maps in NHWC order, which convolutions prefer.
        seed: seed of noise, times and dropout of conditions.
    """

    autoencoder: Autoencoder | None
    text_encoder: TextEncoder | None

    def __init__(
        self,
        network: Network | str,
        network_args: dict[str, Any] | None = None,
        weights: str | None = None,
        shift_schedule: bool = False,
        freeze: str | list[str] | None = None,
        layer_decay: float | None = None,
        lora: LoRA | None = None,
        process: GaussianProcess = GaussianProcess(),  # noqa: B008  frozen
        weighting: Weighting = UniformEps(),  # noqa: B008  frozen
        time_density: TimeDensity | None = None,
        loss_resolutions: list[int] | None = None,
        loss_coefficients: list[float] | None = None,
        condition_dropout: float = 0.1,
        sampler: Sampler = DDIM(),  # noqa: B008  frozen
        guidance: dict[str, Any] | Guidance | None = None,
        optimizer: OptimizerFactory = functools.partial(torch.optim.AdamW, lr=1e-4),  # noqa: B008
        lr_scheduler: SchedulerFactory | None = None,
        autoencoder: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        grad_checkpointing: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 <= condition_dropout <= 1:
            raise UserError(f"condition_dropout must lie in [0, 1], got {condition_dropout}")
        if lora is not None and (freeze is not None or layer_decay is not None):
            raise UserError("lora freezes everything but its adapters: leave out freeze and layer_decay")
        self.name = network if isinstance(network, str) else type(network).__name__
        self.weights, self.lora, self.layer_decay = weights, lora, layer_decay
        self._class_policy = (network_args or {}).get("classes")
        self.network = self._build(network, network_args, weights)
        self.network_class = type(self.network)  # sharding changes the class
        self._base = base_of(self.network.metadata, weights) if isinstance(self.network.metadata, Metadata) else None
        if weights:
            _check_process(self.network, process, weights)
        if shift_schedule:
            process = _shifted(process, self.network)
        if freeze is not None:
            freezing.freeze(self.network, freeze)
        self.guidance = from_plain(Guidance, guidance, "guidance") if guidance is not None else None
        self._base_digest: str | None = None
        self._recipe_settings: Settings | None = None
        self._restored_settings: Settings | None = None
        if lora is not None:
            inject(self.network, lora)
        self._drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.network.modules())
        self.process, self.weighting, self.sampler = process, weighting, sampler
        self.time_density = time_density
        self.loss_resolutions, self.loss_coefficients = loss_resolutions, loss_coefficients
        self.condition_dropout = condition_dropout if self.network.config.null_class else 0.0
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        # companions are frozen: outside the module tree they are neither averaged, nor saved, nor sharded
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
        self.images_seen = 0
        self.last_losses: tuple[Tensor, Tensor] | None = None
        self.last_ids: list[int] = []
        self._held_groups: list[int] | None = None  # sizes of the groups of the checkpoint that is resumed
        self._formats: dict[tuple[str, int], BatchFormat] = {}  # of each loader, by its first batch

    @staticmethod
    def _build(network: Network | str, overrides: dict[str, Any] | None, weights: str | None) -> Network:
        if not isinstance(network, str):
            if overrides or weights:
                raise UserError(
                    "network_args and weights need the network to be a registered name, got a built network"
                )
            return network
        from diffzoo.factory import create_model

        overrides = dict(overrides or {})
        if not weights:  # what becomes of weights; `_begin` asks for them
            overrides = {k: v for k, v in overrides.items() if k not in ("classes", "class_names")}
        if weights and overrides.get("classes") == "copy" and not overrides.get("class_names"):
            overrides["classes"] = "mean"  # until the names are known, in `setup`
        # loaded weights come in eval mode, in which dropout and recomputation of activations would be off
        return create_model(network, pretrained=weights, **overrides).train()

    # -- a step

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch: diffuse, predict, weigh."""
        index = self._index(batch, batch_idx)
        x = self.clean(batch, index)
        cond = self.condition(batch, index)
        t = self._times(index)
        eps = draws.normal("eps", self.seed, index, x.shape[1:], self.device)
        if self._drops:
            draws.seed_layers(self.seed, index)
        loss = self.losses(x, eps, t, cond)
        self.last_losses = (self.process.logsnr(t), loss.detach())
        self.last_ids = batch["id"].tolist() if "id" in batch else index
        return loss.mean()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Hand the loss to callbacks that watch it; `TrainingLog` writes it."""
        if self.last_losses is not None:
            loss = self.last_losses[1]
            self.log("train/loss", loss.mean(), logger=False, on_step=True, on_epoch=True, batch_size=len(loss))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss on held-out data, with noise that depends on the row alone; `EMA` puts its average in."""
        index = batch["id"].tolist() if "id" in batch else self._places(batch, batch_idx)
        x = self.clean(batch, index)
        t = self._times(index)
        eps = draws.normal("validation", self.seed, index, x.shape[1:], self.device)
        loss = self.losses(x, eps, t, self.condition(batch, None)).mean()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(x))
        self.log(
            "step", float(self.global_step), sync_dist=True, batch_size=len(x)
        )  # Lightning would write the number before

    def _times(self, index: list[int]) -> Tensor:
        u = draws.times(self.seed, index, self.device)
        return u if self.time_density is None else self.time_density.times(self.process, u)

    def losses(self, x: Tensor, eps: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """Weighted loss per sample, `(b,)`."""
        t = self.process.schedule.snap(t)
        z = self.process.add_noise(x, eps, t)
        if self.channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        outputs = self.network.training_outputs(z, self.process.noise_level(t), cond)
        if self.process.learned_variance:
            return self._learned_variance_losses(outputs, x, z, eps, t)
        outputs = tuple(out.float() for out in outputs)
        return denoising_loss(
            self.process, self.weighting, outputs, x, eps, t, self.loss_resolutions, self.loss_coefficients
        )

    def _learned_variance_losses(
        self, outputs: tuple[Tensor, ...], x: Tensor, z: Tensor, eps: Tensor, t: Tensor
    ) -> Tensor:
        from diffzoo.process.discrete import hybrid_loss

        return hybrid_loss(self.process, outputs[-1].float(), x, z, eps, t)

    def _index(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        """Place of each sample in the global stream; data modules that do not say get consecutive places."""
        again: Any = getattr(self._trainer, "overfit_batches", 0)
        if "index" in batch and not again:  # batches that come again get new noise each time
            return batch["index"].tolist()
        accumulate = self.trainer.accumulate_grad_batches
        return self._places(batch, self.global_step * accumulate + batch_idx % accumulate)

    def _places(self, batch: dict[str, Any], number: int) -> list[int]:
        """Consecutive places for the samples of batch `number`, over all ranks."""
        n = size_of(batch)
        start = (number * self.trainer.world_size + self.global_rank) * n
        return list(range(start, start + n))

    def clean(self, batch: dict[str, Any], index: list[int]) -> Tensor:
        """Clean data `(b, c, h, w)`: images in [-1, 1], or unit-variance latents drawn from their moments."""
        if "moments" in batch:
            mean, std = batch["moments"].float().chunk(2, dim=1)
            return mean + std * draws.normal("latent", self.seed, index, mean.shape[1:], self.device)
        images = batch["image"]
        images = to_float(images) if images.dtype == torch.uint8 else images.float()
        if self.autoencoder is None:
            return images
        with torch.no_grad():
            mean, std = self.autoencoder.encode(images)
        return mean + std * draws.normal("latent", self.seed, index, mean.shape[1:], self.device)

    def condition(self, batch: dict[str, Any], index: list[int] | None) -> Condition | None:
        """Class or text of a batch; with `index`, some are dropped, here and nowhere else."""
        label = batch.get("label") if self.network.config.num_classes else None
        text = mask = None
        if self.text_encoder is not None:
            text, mask = self._text(batch, self.text_encoder)
        cond = Condition(label=label, text=text, text_mask=mask)
        if not len(cond):
            return None
        if index is not None and self.condition_dropout > 0:
            drop = draws.uniform("condition", self.seed, index, self.device) < self.condition_dropout
            null = self.network.null_condition(cond)
            cond = cond.where(~drop, null) if null is not None else cond
        return cond

    def _text(self, batch: dict[str, Any], encoder: TextEncoder) -> tuple[Tensor, Tensor]:
        if "text" in batch:
            return batch["text"], batch["text_mask"]
        if "caption" not in batch:
            raise UserError("the recipe has a text encoder but the data has no captions: choose data with captions")
        text, mask = encoder.encode(batch["caption"])
        return text.to(self.device), mask.to(self.device)

    # -- around a step

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        """Bring a batch of any loader into our form (`batch_format`) and move it.

        Places and row ids stay on the host, where the generators are keyed.
        """
        host = ("index", "id")
        return {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and k not in host else v
            for k, v in self._format(batch, dataloader_idx).read(batch).items()
        }

    def _format(self, batch: Any, dataloader_idx: int) -> BatchFormat:
        """The format of a loader's batches, which its first one decides."""
        where = "training" if self._trainer is None or self._trainer.training else "validation"
        known = self._formats.get((where, dataloader_idx))
        if known is None:
            known = BatchFormat.of(batch, self.network.config, self.autoencoder is not None, where)
            self._formats[where, dataloader_idx] = known
            if known.note:
                _say(f"{where} {known.note}")
        return known

    def configure_optimizers(self) -> Any:
        """The optimizer over the network alone, with the family's own no-decay groups."""
        decay = self.layer_decay
        shares = None if decay is None else freezing.learning_rate_shares(self.network, decay)
        optimizer = self.optimizer(parameter_groups(self.network, shares))
        if self._held_groups not in (None, [len(g["params"]) for g in optimizer.param_groups]):
            # a checkpoint from before Muon left class tables to AdamW goes on as it began
            optimizer = self.optimizer(parameter_groups(self.network, shares, split_tables=False))
        optimizer = scale_learning_rates(optimizer)
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler is not None else None
        self._recipe_settings = settings_of(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        watched = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        when = {"interval": "epoch", "monitor": "train/loss"} if watched else {"interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **when}}

    def on_train_start(self) -> None:
        """After a resume: what the recipe has changed since wins over what the checkpoint stored."""
        _warn_of_half_weights(self.network)
        theirs, self._restored_settings = self._restored_settings, None
        ours = self._recipe_settings
        if theirs is None or ours is None or theirs == ours:
            return
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        changed = apply_changes(optimizer, scheduler, theirs, ours, self.trainer.global_step)  # type: ignore[arg-type]
        if changed:
            _say(f"set as the recipe says, not as the checkpoint: {', '.join(changed)}")

    def setup(self, stage: str) -> None:
        """Check that data and network fit, and say what disagrees."""
        data = getattr(self.trainer, "datamodule", None)
        config = self.network.config
        classes = getattr(data, "num_classes", 0) or 0
        if config.num_classes and classes > config.num_classes:
            raise UserError(
                f"the data has {classes} classes but {self.name} has {config.num_classes}: "
                f"set model.network_args.num_classes to {classes}"
            )
        if config.num_classes and data is not None and not classes and hasattr(data, "num_classes"):
            raise UserError(
                f"{self.name} has {config.num_classes} classes but the data has none: "
                "set model.network_args.num_classes to 0, or use folders as classes"
            )
        size = getattr(data, "image_size", None)
        if self.autoencoder is None and size is not None and size != config.image_size:
            raise UserError(
                f"the data gives images of {size} px but {self.name} expects {config.image_size} px: "
                "set data.init_args.image_size or model.network_args.image_size"
            )
        self.class_names = list(getattr(data, "class_names", None) or [])
        if stage == "fit":
            self._begin()

    def _begin(self) -> None:
        """What has to be known of the data before a first step; a resumed run then loads its own weights."""
        if self.lora is not None and not self.weights:
            raise UserError("low-rank adapters belong to trained weights: say which with model.weights")
        if self._class_policy is not None and not self.weights:
            raise UserError(
                f"network_args.classes is {self._class_policy}, what becomes of the class table of trained weights: "
                "say which with model.weights, or leave it out"
            )
        if self._class_policy == "copy" and self.class_names:
            from diffzoo.factory import copy_classes

            same = copy_classes(self.network, str(self.weights), self.class_names)
            _say(f"classes that start from their own weights: {', '.join(same) or 'none'}")

    def configure_model(self) -> None:
        """Shard the network block by block, where the strategy is `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is None:
            return
        if self.lora is not None:
            raise UserError(
                "low-rank adapters are not trained on sharded networks: they need little memory, so use DDP"
            )
        shard(self.network, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Bring the companions to the device; tell the network what "no text" is, where it has to be told."""
        if self.device.type == "cpu":
            keep_freed_memory()
        for companion in (self.autoencoder, self.text_encoder):
            if companion is not None:
                companion.to(self.device)
        tell = getattr(self.network, "set_null_text", None)
        if tell is not None and self.text_encoder is not None:
            tell(self.text_encoder.null(1)[0].to(self.device))

    on_validate_start = on_fit_start

    def metadata(self) -> Metadata:
        """What is known about the weights that this run makes."""
        base = self._base
        return Metadata(
            self.network_class,
            self.network.config,
            self.name,
            self.process,
            tuple(self.class_names),
            self.guidance,
            self.sampler,
            # other encoders than those of the package have to be passed to the pipeline by hand
            getattr(self.autoencoder, "spec", None),
            getattr(self.text_encoder, "spec", None),
            adapter=self._adapter(self.lora) if self.lora is not None else None,
            licence=base.licence if base is not None else None,
            provenance=Provenance(base=base, global_step=self.global_step or None),
            recipe=self.recipe,
            version=__version__,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add all that is needed to rebuild the model without its recipe (`diffzoo.zoo.load_any`)."""
        checkpoint["diffzoo"] = {
            **self.metadata().to_plain(),
            "recipe_settings": self._recipe_settings,
            "data": type(getattr(self.trainer, "datamodule", None)).__qualname__,
            "channels_last": self.channels_last,
        }
        if self.lora is not None:
            trained = {f"network.{n}" for n, p in self.network.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the weights belong here; beside adapters, the network keeps the weights it was started from."""
        held = checkpoint.get("diffzoo") or {}
        self._restored_settings = held.get("recipe_settings")
        if self._drops and held.get("channels_last", self.channels_last) != self.channels_last:
            _say(
                f"channels_last is {self.channels_last} here and was {not self.channels_last}: dropout draws in the "
                "order of memory, so the run goes on with other draws"
            )
        held_optimizers = checkpoint.get("optimizer_states") or []
        self._held_groups = [len(g["params"]) for g in held_optimizers[0]["param_groups"]] if held_optimizers else None
        self._check_data(checkpoint)
        theirs = held_metadata(checkpoint, "the checkpoint")
        if theirs is not None and sorted(theirs.class_names) == sorted(self.class_names) != []:
            _check_class_order(list(theirs.class_names), self.class_names)
        if theirs is not None and self._base is None:  # the recipe need not name it again
            self._base = theirs.provenance.base
        adapter = theirs.adapter if theirs is not None else None
        if self.lora is None:
            if adapter is not None:
                raise UserError("the checkpoint holds low-rank adapters alone: set model.lora as its recipe did")
            self._check_architecture(checkpoint, theirs)
            return
        ours = self._adapter(self.lora)
        for field in ("rank", "alpha", "base_sha256"):
            if getattr(adapter, field, None) != getattr(ours, field):
                raise UserError(
                    f"the adapters of the checkpoint have another {field}, {getattr(adapter, field, None)}, than this "
                    f"run, {getattr(ours, field)}: keep model.lora and the weights behind model.weights as they were"
                )
        self._check_architecture(checkpoint, theirs)
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

    def _check_data(self, checkpoint: dict[str, Any]) -> None:
        """Data of the same kind compare their rows themselves; of another kind, they never see the checkpoint's."""
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        theirs, ours = (checkpoint.get("diffzoo") or {}).get("data"), type(data).__qualname__
        if theirs is not None and theirs in vars(type(data)).get("former_names", ()):
            checkpoint[ours], theirs = checkpoint.pop(theirs), ours
        if trainer is None or not trainer.training or data is None or theirs in (None, "NoneType", ours):
            return
        if not getattr(data, "allow_changed_source", False):
            raise UserError(
                f"this run was trained on {theirs}, and its position in it means nothing in {ours}: go on with the "
                "same data, set allow_changed_source to start with the first of the new, or begin another run with "
                "model.weights"
            )

    def _check_architecture(self, checkpoint: dict[str, Any], held: Metadata | None) -> None:
        theirs = {k: tuple(v.shape) for k, v in checkpoint.get("state_dict", {}).items() if isinstance(v, Tensor)}
        ours = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        if held is None or all(ours.get(k) == shape for k, shape in theirs.items()):
            return
        config = {**to_plain(self.network.config), "network": f"{self.name} ({self.network_class.__name__})"}
        other = {**to_plain(held.config), "network": f"{held.name} ({held.network.__name__})"}
        if other["network"] != config["network"]:
            differ = ["network"]
        else:
            differ = [k for k in config if k in other and config[k] != other[k]]
        parts = [f"{k} {other[k]} there and {config[k]} here" for k in differ]
        raise UserError(
            f"the checkpoint is of another architecture: {'; '.join(parts) or 'tensors of other names or shapes'}: "
            "resume it with the recipe it was trained with, or start from its weights with model.weights"
        )

    def _adapter(self, lora: LoRA) -> Adapter:
        if self._base_digest is None:
            frozen = {plain_name(n): p for n, p in self.network.named_parameters() if not p.requires_grad}
            self._base_digest = state_sha256(frozen, ADAPTER_BASE)
        base = str((self._base and self._base.source) or self.weights)
        return Adapter(base, lora.rank, float(lora.scale * lora.rank), self._base_digest)

    def on_train_end(self) -> None:
        """Leave the adapters in the run's folder `adapter`."""
        trial = getattr(self.trainer, "fast_dev_run", False) or self.trainer.interrupted
        if self.lora is not None and not trial:
            folder = Path(self.trainer.default_root_dir) / "adapter"
            write_or_warn(folder, lambda: self.write_weights(folder))

    def write_weights(self, folder: Path) -> Path:
        """Write the network's weights, averaged where averages are kept, in the form that `load_any` reads.

        `model.safetensors`, or `adapter.safetensors` where low-rank adapters are trained, with the metadata in its
        header and in `config.json`. Every rank must call it; rank 0 writes.

        Args:
            folder: made if needed.

        Returns:
            the file of weights.
        """
        keeper = next((c for c in self.trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        if self.lora is not None:
            with averaged(self):
                state = {k: v.clone() for k, v in adapter_state(self.network).items()}
        else:
            state = keeper.network_state(self) if keeper else whole_state(self.network)
        if self.trainer.is_global_zero:
            write_model(state, self.metadata(), folder)
        return folder / ("model.safetensors" if self.lora is None else "adapter.safetensors")


def _check_class_order(theirs: list[str], ours: list[str]) -> None:
    """Class folders that are numbers were in the order of texts before."""
    if theirs != ours:
        raise UserError(
            f"the checkpoint knows the same classes in another order, {', '.join(theirs[:4])} … in place of "
            f"{', '.join(ours[:4])} …: set data.init_args.class_names to [{', '.join(theirs)}]"
        )


def _warn_of_half_weights(network: nn.Module) -> None:
    """Moments of the gradients take the weights' precision: Adam's second moment is then off by up to a factor of 2."""
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
        rank_zero_warn(
            "the weights themselves are in 16 bits, and small steps are rounded away in them and in the optimizer's "
            "moments: use trainer.precision bf16-mixed, which keeps float32 weights (the EMA is float32 either way)"
        )


def _check_process(network: Network, process: GaussianProcess, weights: str) -> None:
    """Raise if the weights' input or output means something else in this process; warn if the noise differs."""
    trained = metadata_of(network).process
    if trained is None:
        return
    for name in ("prediction", "noise_conditioning", "learned_variance"):
        theirs, ours = getattr(trained, name), getattr(process, name)
        if theirs != ours:
            raise UserError(
                f"the weights in {weights} were trained with another {name}, {theirs}, than the recipe has, {ours}: "
                "set model.process to that of the weights"
            )
    for name in ("schedule", "path"):
        if getattr(trained, name) != getattr(process, name):
            rank_zero_warn(f"the weights in {weights} were trained with another {name} than this recipe has: the "
                           "network has to learn it anew")  # fmt: skip


def _shifted(process: GaussianProcess, network: Network) -> GaussianProcess:
    """The process with its schedule shifted from the image size of the weights to the network's."""
    size = metadata_of(network).provenance.adapted_from.get("image_size")
    if size is None:
        return process
    if isinstance(process.schedule, DiscreteBetas):
        raise UserError("a table of betas cannot be shifted to another resolution: state a continuous schedule")
    schedule = Shifted(process.schedule, from_resolution=size, to_resolution=network.config.image_size)
    _say(f"schedule shifted from {size} to {network.config.image_size} px: {schedule.shift:+.3f} log-SNR")
    return replace(process, schedule=schedule)
