"""The norm of a step's gradients, taken once, and clipping by it inside the optimizer's fused kernel."""

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["clip_by_norm", "gradient_norm", "release", "steps_on_device"]


@torch.no_grad()
def gradient_norm(optimizer: Optimizer) -> Float[Tensor, ""] | None:
    """Euclidean norm of all gradients of an optimizer, float32 on the device; None if there are none.

    Gradients of shards (FSDP2) are reduced over the processes.
    """
    gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    if not gradients:
        return None
    norm = nn.utils.get_total_norm([g.detach() for g in gradients])
    full = getattr(norm, "full_tensor", None)
    return (full() if full is not None else norm).float()


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, norm: Float[Tensor, ""], limit: float, trainer: Trainer) -> None:
    """Scale the gradients of the coming step so that their norm, now `norm`, is at most `limit`.

    A fused kernel divides by `grad_scale` as it reads the gradients, so that they are not written once more. Whoever
    sets it takes it away after the step (`release`). Other optimizers find scaled gradients.
    """
    if steps_on_device(optimizer, trainer) and norm.device.type in ("cpu", "cuda"):
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0).reshape(())  # type: ignore[attr-defined]
    else:
        nn.utils.clip_grads_with_norm_(_parameters(optimizer), limit, norm)


def release(optimizer: Optimizer) -> None:
    """Clear what was set for one step: the clip factor, and whether to skip it."""
    optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]


def steps_on_device(optimizer: Optimizer, trainer: Trainer) -> bool:
    """Whether an optimizer's kernel takes `found_inf` and `grad_scale`, and no gradient scaler is using them."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return False
    fused = all(group.get("fused") for group in optimizer.param_groups)
    # ours say so by a name of their own, because torch's makes Lightning refuse to clip
    return fused and any(getattr(optimizer, name, False) for name in ("takes_found_inf", "_step_supports_amp_scaling"))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
