"""What a run writes about its weights, and the weights themselves in the form that `load_any` reads."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo import __version__
from diffzoo.models.adapters import plain_name
from diffzoo.models.base import Network
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.training.ema import EMA, averaged
from diffzoo.training.lora import adapter_state
from diffzoo.training.sharding import whole_state
from diffzoo.zoo.metadata import Base, Metadata, Provenance
from diffzoo.zoo.saving import write_model

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["frozen_sha256", "run_metadata", "write_weights"]


def frozen_sha256(network: Network) -> str:
    """Hash of the parameters that do not train, which low-rank adapters belong to."""
    frozen = {plain_name(n): p for n, p in network.named_parameters() if not p.requires_grad}
    return state_sha256(frozen, ADAPTER_BASE)


def run_metadata(module: "DiffusionModule", base: Base | None) -> Metadata:
    """What is known about the weights that a run makes.

    Args:
        module: attached to its trainer.
        base: the weights that the run started from; None = random ones.
    """
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
        adapter=module.adapter(),
        licence=base.licence if base is not None else None,
        provenance=Provenance(base=base, global_step=module.global_step or None),
        recipe=module.recipe,
        version=__version__,
    )


def write_weights(module: "DiffusionModule", folder: Path) -> Path:
    """Write the network's weights, their EMA where one is kept, in the form that `load_any` reads.

    `model.safetensors`, or `adapter.safetensors` where low-rank adapters are trained, with the metadata in its
    header and in `config.json`. Every rank must call it; rank 0 writes.

    Args:
        module: attached to its trainer.
        folder: made if needed.

    Returns:
        the file of weights.
    """
    keeper = next((c for c in module.trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    if module.lora is not None:
        with averaged(module):
            state = {k: v.clone() for k, v in adapter_state(module.network).items()}
    else:
        state = keeper.network_state(module) if keeper else whole_state(module.network)
    if module.trainer.is_global_zero:
        write_model(state, module.metadata(), folder)
    return folder / ("model.safetensors" if module.lora is None else "adapter.safetensors")
