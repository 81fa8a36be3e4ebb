"""The files of consistency models and their teachers (openai/consistency_models): guided-diffusion's names.

Their 1x1 kernels over positions are `(out, in, 1, 1)`, and their qkv channels are in the "new" order although the flag
beside them says otherwise: the configs of `edm_64` and `edm_256_uncond` say so.
"""

from collections.abc import Mapping

from torch import Tensor

from diffzoo.models.adm import ADMConfig
from diffzoo.zoo.converters import guided_diffusion

__all__ = ["from_official", "to_official"]

_POINTWISE = (".qkv.weight", ".proj_out.weight")


def from_official(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """Their state dict as ours.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    flat = {k: v[..., 0] if k.endswith(_POINTWISE) and v.ndim == 4 else v for k, v in state.items()}
    return guided_diffusion.from_official(flat, config)


def to_official(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    official = guided_diffusion.to_official(state, config)
    return {k: v[..., None] if k.endswith(_POINTWISE) else v for k, v in official.items()}
