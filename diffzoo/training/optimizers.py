"""Optimizers by name and parameter groups by the family's own rule.

A recipe chooses a class, `{class_path: diffzoo.training.FusedAdamW, init_args: {lr: 1.0e-4}}`, any other of
`torch.optim`, or, for one of timm's names, `{class_path: diffzoo.training.TimmOptimizer, init_args: {name: muon, lr:
1.0e-3}}`. The learning rate is the one that is stated: nothing scales it by the batch or the number of devices.
"""

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import ParamsT

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Network

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "OptimizerFactory",
    "SchedulerFactory",
    "TimmOptimizer",
    "network_optimizer",
    "parameter_groups",
    "scale_learning_rates",
    "with_scheduler",
]

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def parameter_groups(
    network: nn.Module, shares: Mapping[str, float] | None = None, split_tables: bool = True
) -> list[dict[str, object]]:
    """The trainable parameters in one group, or in two where the family exempts some from weight decay.

    The exempt ones are those that `network.no_weight_decay()` names, and nothing else: most diffusion codes decay
    norms and biases too, and a recipe reproduces what its authors did. Their groups have `weight_decay` 0.

    Args:
        network: whose parameters.
        shares: share of the learning rate by parameter name, for layer-wise learning rates: one group per share,
            which has it as `lr_share` (`scale_learning_rates`).
        split_tables: mark class tables, so that Muon leaves them to AdamW (`TimmOptimizer`).

    Raises:
        UserError: if nothing is trainable, or if a name that the family exempts does not exist.
    """
    trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("the network has no trainable parameters: all are frozen")
    rule = getattr(network, "no_weight_decay", None)
    exempt = set(rule()) if rule is not None else set()
    for name in sorted(exempt - {n for n, _ in network.named_parameters()}):
        raise UserError(f"no_weight_decay() names {name!r}, which is no parameter of the network")
    tables = set(network.class_tables()) if split_tables and isinstance(network, Network) else set()
    for name, parameter in trainable.items():
        parameter.diffzoo_name, parameter.class_table = name, name in tables  # type: ignore[attr-defined]
    share_of = dict.fromkeys(trainable, 1.0) if shares is None else shares
    groups: list[dict[str, object]] = []
    for share in sorted({share_of[n] for n in trainable}, reverse=True):  # the order is that of the checkpoint
        stated = {} if shares is None else {"lr_share": share}
        mine = [n for n in trainable if share_of[n] == share]
        decayed, free = [n for n in mine if n not in exempt], [n for n in mine if n in exempt]
        groups += [{"params": [trainable[n] for n in decayed], **stated}] if decayed else []
        groups += [{"params": [trainable[n] for n in free], **stated, "weight_decay": 0.0}] if free else []
    return groups


def scale_learning_rates(optimizer: Optimizer) -> Optimizer:
    """Give every group its `lr_share` of the optimizer's learning rate; before a schedule takes it as the base."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_share", 1.0)
    return optimizer


def _groups_of(params: ParamsT) -> list[dict[str, Any]]:
    """Parameter groups; plain parameters are one."""
    given = list(params)
    return [{**g} for g in given if isinstance(g, dict)] or [{"params": given}]


def _fits_fused(groups: list[dict[str, Any]]) -> bool:
    """Whether the fused kernels take these parameters: floating point, on a device that has them."""
    tensors = [p for g in groups for p in g["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "xpu", "mps") for p in tensors)


class FusedAdamW(torch.optim.AdamW):
    """AdamW with the fused kernel: 2 to 6 times as fast as the default one, and able to skip a step on the device.

    Args:
        params: parameter groups (`parameter_groups`).
        lr: learning rate, used as it is.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay; most diffusion models use 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        groups = _groups_of(params)
        super().__init__(groups, lr, betas, eps, weight_decay, fused=_fits_fused(groups))
        self._step_supports_amp_scaling = False  # Lightning refuses to clip where this is set
        self.takes_found_inf = bool(self.defaults["fused"])  # the kernel does; `GradientGuard` reads it


class FusedAdam(torch.optim.Adam):
    """Adam with the fused kernel and no weight decay.

    Args:
        params: parameter groups (`parameter_groups`).
        lr: learning rate, used as it is.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        groups = _groups_of(params)
        super().__init__(groups, lr, betas, eps, fused=_fits_fused(groups))
        self._step_supports_amp_scaling = False  # Lightning refuses to clip where this is set
        self.takes_found_inf = bool(self.defaults["fused"])  # the kernel does; `GradientGuard` reads it


class TimmOptimizer(Optimizer):
    """An optimizer by timm's name: "muon", "lion", "adafactor", ... (`timm.optim.list_optimizers()`).

    Making one gives timm's object; this class is there to be named in recipes. timm gives `momentum` the value 0.9
    where it is not stated, whatever the optimizer's own default is.

    Muon steps matrices by their orthogonalised momentum and leaves vectors to AdamW. timm decides by the shape alone;
    here class tables, of which a batch touches a few rows, and the parameters in `fallback_list` go to AdamW too. It
    orthogonalises in bfloat16: with a gradient of low rank, rounding decides the step in part, so runs on other numbers
    of devices are not as close as with AdamW.

    Cautious optimizers ("cadamw", "clion", ...) divide a step by the share of entries that move: a class table's step
    grows by classes over classes in the batch, so lower their learning rate, or choose others, for class-conditional
    networks.

    Args:
        params: parameter groups (`parameter_groups`); their own weight decay wins.
        name: timm's name, in any case.
        lr: learning rate, used as it is.
        weight_decay: as the optimizer defines it.
        options: further arguments of the optimizer itself, such as `{betas: [0.9, 0.95]}`.
        fallback_list: shell patterns of parameter names that Muon and its kin leave to AdamW.

    Raises:
        UserError: for an unknown name or option, naming the nearest, or an optimizer that does not run here.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: ParamsT,
        name: str,
        lr: float,
        weight_decay: float = 0.0,
        options: dict[str, object] | None = None,
        fallback_list: list[str] | None = None,
    ) -> Optimizer:
        from timm.optim import create_optimizer_v2

        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
        takes = _options_of(name)
        for option in given.keys() - takes:
            raise UserError(f"the optimizer {name!r} does not take {option!r}{did_you_mean(option, takes)}")
        if "deterministic" in takes:  # else Kron draws from the global generator and does not resume to the bit
            given.setdefault("deterministic", True)
        groups = _groups_of(params)
        if "fallback_lr_scale" in takes:  # timm's Muon and its kin
            groups = _with_fallback(groups, fallback_list or [])
        elif fallback_list:
            raise UserError(f"fallback_list is for Muon and its kin, which {name!r} is not")
        try:
            return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **given)
        except (TypeError, ValueError, ImportError, AssertionError, RuntimeError) as error:
            raise UserError(f"the optimizer {name!r} cannot be made with these options: {error}") from error


def _options_of(name: str) -> set[str]:
    """The names of the options of timm's optimizer."""
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    known = [str(n) for n in list_optimizers()]
    if name.lower() not in known:
        raise UserError(f"timm has no optimizer {name!r}{did_you_mean(name.lower(), known)}")
    if get_optimizer_info(name.lower()).second_order:
        raise UserError(f"the optimizer {name!r} needs second derivatives, which training here does not compute")
    try:
        made = get_optimizer_class(name.lower(), bind_defaults=False)
    except (AssertionError, ImportError) as error:
        raise UserError(f"the optimizer {name!r} does not run here: {error}") from error
    return set(inspect.signature(made).parameters) - {"params", "lr", "weight_decay"}


def _with_fallback(groups: list[dict[str, Any]], patterns: list[str]) -> list[dict[str, Any]]:
    """The groups with class tables and parameters of these names apart, marked for AdamW."""
    found: list[dict[str, Any]] = []
    names = [getattr(p, "diffzoo_name", "") for group in groups for p in group["params"]]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"fallback_list: no parameter that trains matches {pattern!r}")
    for group in groups:
        apart = [p for p in group["params"] if _falls_back(p, patterns)]
        rest = [p for p in group["params"] if not _falls_back(p, patterns)]
        found += [{**group, "params": rest}] if rest else []
        found += [{**group, "params": apart, "use_fallback": True}] if apart else []
    return found


def _falls_back(parameter: Tensor, patterns: list[str]) -> bool:
    name = getattr(parameter, "diffzoo_name", "")
    return getattr(parameter, "class_table", False) or any(fnmatch.fnmatchcase(name, p) for p in patterns)


def network_optimizer(
    factory: OptimizerFactory, network: nn.Module, shares: Mapping[str, float] | None, sizes: list[int] | None
) -> Optimizer:
    """The optimizer of what trains in a network.

    `shares` of the learning rate are by parameter name. `sizes` are the numbers of parameters in each group of the
    checkpoint that is resumed; None = a new run.
    """
    _warn_of_half_weights(network)
    optimizer = factory(parameter_groups(network, shares))
    if sizes not in (None, [len(g["params"]) for g in optimizer.param_groups]):
        # a checkpoint from before Muon left class tables to AdamW goes on as it began
        optimizer = factory(parameter_groups(network, shares, split_tables=False))
    return scale_learning_rates(optimizer)


def with_scheduler(optimizer: Optimizer, scheduler: LRScheduler | None) -> OptimizerLRScheduler:
    """Both as Lightning wants them: stepped every step, or every epoch by the training loss."""
    if scheduler is None:
        return optimizer
    if isinstance(scheduler, ReduceLROnPlateau):
        config = LRSchedulerConfigType(scheduler=scheduler, interval="epoch", monitor="train/loss")
    else:
        config = LRSchedulerConfigType(scheduler=scheduler, interval="step")
    return {"optimizer": optimizer, "lr_scheduler": config}


def _warn_of_half_weights(network: nn.Module) -> None:
    """Moments of the gradients take the weights' precision: Adam's second moment is then off by up to a factor of 2."""
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
        rank_zero_warn(
            "the weights themselves are in 16 bits: small steps are rounded away in them and in the optimizer's "
            "moments, and the fused kernels of Adam take other steps than the plain ones. Use trainer.precision "
            "bf16-mixed, which keeps float32 weights (the EMA is float32 either way)"
        )
