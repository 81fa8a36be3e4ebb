"""The KL autoencoder in the layout of the latent-diffusion code (arXiv:2112.10752), as `diffusers.AutoencoderKL`.

VA-VAE (arXiv:2501.01423) and REPA-E's autoencoders (arXiv:2504.10483) are stored like this. It is a renaming, except
that attention is a convolution over positions there and a linear layer here. Widths, depths and places of attention are
read from the tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.tensors import check_tensors

__all__ = ["from_ldm", "latent_statistics"]

_RULES = [
    (r"(down|up)_blocks\.", r"\1."),
    (r"(down|up)samplers\.0\.", r"\1sample."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"resnets\.", "block."),
    (r"attentions\.", "attn."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"(group|conv)_norm(_out|)\.", r"norm\2."),
    (r"to_out\.0\.", "proj_out."),
    (r"to_([qkv])\.", r"\1."),
]
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def from_ldm(data: Mapping[str, Any], where: str) -> Any:
    """The autoencoder in a checkpoint: at its top, under "state_dict", or under "vae" beside a network.

    Args:
        data: content of the file.
        where: its name, for messages.

    Returns:
        a `diffusers.AutoencoderKL` in float32.

    Raises:
        UserError: if there is none, or its tensors are not those of this architecture.
    """
    held = [part for part in (data.get("vae"), data.get("state_dict"), data) if isinstance(part, Mapping)]
    state = next((part for part in held if "encoder.conv_in.weight" in part), None)
    if state is None:
        raise UserError(f"{where} does not hold an autoencoder in the layout of latent diffusion")
    own = {k: v for k, v in state.items() if k.startswith(_PARTS)}  # the rest is discriminators and the like
    model = _built(own)
    names = {k: _ldm_name(k, len(model.config.block_out_channels)) for k in model.state_dict()}
    tensors = {k: v[..., 0, 0] if re.search(r"attn\S*\.(q|k|v|proj_out)\.weight", k) else v for k, v in own.items()}
    wanted = {names[k]: tuple(v.shape) for k, v in model.state_dict().items()}
    check_tensors(tensors, wanted, f"the autoencoder in {where}")
    model.load_state_dict({k: tensors[name].float() for k, name in names.items()}, assign=True)
    return model


def _built(state: Mapping[str, Tensor]) -> Any:
    """The network of these tensors, on the meta device."""
    from diffusers import AutoencoderKL

    levels = range(_count(state, r"encoder\.down\.(\d+)\."))
    attends = [f"encoder.down.{i}.attn.0.q.weight" in state for i in levels]
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=tuple(len(state[f"encoder.down.{i}.block.0.conv1.bias"]) for i in levels),
            down_block_types=tuple(f"{'Attn' * a}DownEncoderBlock2D" for a in attends),
            up_block_types=tuple(f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)),
            layers_per_block=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=state["decoder.conv_in.weight"].shape[1],
            use_quant_conv="quant_conv.weight" in state,
            use_post_quant_conv="post_quant_conv.weight" in state,
        )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _ldm_name(name: str, levels: int) -> str:
    """From a name of diffusers, which counts the decoder's levels from the latents; latent diffusion from the image."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def latent_statistics(data: Mapping[str, Any], where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the latents, per channel.

    Args:
        data: content of a file of statistics, LightningDiT's (`mean`, `std`) or REPA-E's (`latents_bias`,
            `latents_scale`), or of a checkpoint of REPA-E, whose EMA normalises latents by the running statistics "bn".
        where: its name, for messages.

    Raises:
        UserError: if there are none.
    """
    ema = data.get("ema") or {}
    if "mean" in data and "std" in data:
        mean, std = data["mean"], data["std"]
    elif "latents_scale" in data and "latents_bias" in data:
        mean, std = data["latents_bias"], 1 / data["latents_scale"]
    elif "bn.running_var" in ema:
        mean, std = ema["bn.running_mean"], ema["bn.running_var"].sqrt()
    else:
        raise UserError(f"{where} does not hold statistics of latents")
    return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
