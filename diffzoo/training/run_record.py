"""The metadata of a run, and its weights as `load_any` reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from diffzoo import __version__, rng
from diffzoo.models.adapters import plain_name
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.training.ema import EMA, averaged
from diffzoo.training.lora import adapter_state
from diffzoo.training.sharding import whole_state
from diffzoo.training.steps import callback_of
from diffzoo.zoo.metadata import Adapter, Metadata, Provenance
from diffzoo.zoo.saving import write_model

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["Checkpoint", "adapter_of", "complete", "run_metadata", "write_weights"]


class Checkpoint(TypedDict, total=False):
    """What is used of Lightning's checkpoints: the tensors, the optimizers, and what `complete` adds."""

    state_dict: dict[str, Tensor]
    optimizer_states: list[dict[str, list[dict[str, list[int]]]]]
    diffzoo: dict[str, object]


def adapter_of(module: "DiffusionModule") -> Adapter | None:
    """What the low-rank adapters of a run belong to; None = it trains none."""
    if module.lora is None:
        return None
    if module.frozen_sha256 is None:  # it takes a while, and what is frozen stays
        frozen = {plain_name(n): p for n, p in module.network.named_parameters() if not p.requires_grad}
        module.frozen_sha256 = state_sha256(frozen, ADAPTER_BASE)
    source = (module.base and module.base.source) or module.weights
    lora = module.lora
    return Adapter(str(source), lora.rank, float(lora.scale * lora.rank), module.frozen_sha256)


def run_metadata(module: "DiffusionModule") -> Metadata:
    """What is known about the weights that a run makes; the module is attached to its trainer."""
    base = module.base
    return Metadata(
        module.network_class,
        module.network.config,
        module.name,
        module.process,
        tuple(module.class_names),
        module.guidance,
        module.sampler,
        # other encoders than those of the package have to be passed to the pipeline by hand
        getattr(module.autoencoder, "spec", None),
        getattr(module.text_encoder, "spec", None),
        adapter=adapter_of(module),
        licence=base.licence if base is not None else None,
        provenance=Provenance(base=base, global_step=module.global_step or None),
        recipe=module.recipe,
        version=__version__,
    )


def complete(module: "DiffusionModule", checkpoint: Checkpoint) -> None:
    """Add to a checkpoint what rebuilds the model and what a resumed run compares; with LoRA, keep only what trains."""
    checkpoint["diffzoo"] = {
        **run_metadata(module).to_plain(),
        "recipe_settings": module.recipe_settings,
        "data": type(getattr(module.trainer, "datamodule", None)).__qualname__,
        "channels_last": module.channels_last,
        "noise": rng.NOISE,
    }
    if module.lora is not None:
        trained = {f"network.{n}" for n, p in module.network.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def write_weights(module: "DiffusionModule", folder: Path) -> Path:
    """Write the network's weights, their EMA where one is kept, in the form that `load_any` reads; returns the file.

    `model.safetensors`, or `adapter.safetensors` where low-rank adapters are trained, with the metadata in its
    header and in `config.json`. Every rank must call it; rank 0 writes.
    """
    keeper = callback_of(module.trainer, EMA)
    if module.lora is not None:
        with averaged(module):
            state = {k: v.clone() for k, v in adapter_state(module.network).items()}
    else:
        state = keeper.network_state(module) if keeper else whole_state(module.network)
    if module.trainer.is_global_zero:
        write_model(state, module.metadata(), folder)
    return folder / ("model.safetensors" if module.lora is None else "adapter.safetensors")
