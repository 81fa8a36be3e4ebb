"""How a run checks the checkpoint that it resumes from, and how it follows a recipe that has changed since.

Optimizers and learning-rate schedules store their settings in checkpoints and restore them on a resume, so that a new
learning rate in the recipe would be ignored silently. A checkpoint therefore also holds the settings as the recipe made
them. Where the recipe at hand makes others, these are set after the resume. Settings that did not change are not
touched, so that a resume with the same recipe stays exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, cast

import lightning.pytorch as L
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffzoo.errors import UserError
from diffzoo.record import to_plain
from diffzoo.rng import EARLIER_NOISE, NOISE
from diffzoo.training.run_record import Checkpoint, adapter_of
from diffzoo.training.steps import say
from diffzoo.zoo.metadata import Adapter, Metadata, held_metadata

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["Resumed", "Settings", "check_checkpoint", "check_class_order", "check_data", "follow_recipe", "settings_of"]


class Settings(TypedDict):
    """What the recipe says of the parameter groups and of the learning-rate schedule, and the class of the latter."""

    groups: list[dict[str, object]]
    scheduler: dict[str, object]
    kind: str | None


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says of the run that wrote it; None where an earlier version did not say.

    Args:
        metadata: of its weights.
        settings: `settings_of` its optimizer and learning-rate schedule.
        group_sizes: number of parameters in each group of its optimizer.
        channels_last: whether its feature maps were in NHWC order.
        noise: what drew its noise, times and dropped conditions (`diffzoo.rng.NOISE`).
    """

    metadata: Metadata | None
    settings: Settings | None
    group_sizes: list[int] | None
    channels_last: bool | None
    noise: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Resumed":
        """Read a checkpoint of Lightning's."""
        held = checkpoint.get("diffzoo") or {}
        optimizers = checkpoint.get("optimizer_states")
        sizes = [len(group["params"]) for group in optimizers[0]["param_groups"]] if optimizers else None
        return cls(
            held_metadata(checkpoint, "the checkpoint"),
            cast(Settings | None, held.get("recipe_settings")),
            sizes,
            cast(bool | None, held.get("channels_last")),
            str(held.get("noise", EARLIER_NOISE)),
        )


def check_checkpoint(module: "DiffusionModule", checkpoint: Checkpoint) -> None:
    """Check that a checkpoint belongs to this run, and keep in `module.resumed` what the run compares later.

    Beside adapters, the network keeps the weights that it started from.

    Raises:
        UserError: for a checkpoint of other data, classes in another order, other adapters or another architecture.
    """
    module.resumed = resumed = Resumed.of(checkpoint)
    if resumed.noise != NOISE:
        say(
            f"the noise of this run was drawn by {resumed.noise} and is drawn by {NOISE} from here on: it goes on with "
            "other noise, times and dropped conditions than an uninterrupted run would have had"
        )
    if module.drops and resumed.channels_last not in (None, module.channels_last):
        say(
            f"channels_last is {module.channels_last} here and was {resumed.channels_last}: dropout draws in the order "
            "of memory, so the run goes on with other draws"
        )
    check_data(module._trainer, checkpoint)
    theirs = resumed.metadata
    if theirs is not None:
        check_class_order(theirs.class_names, module.class_names)
        module.base = module.base or theirs.provenance.base  # the recipe need not name it again
    _check_adapter(theirs.adapter if theirs is not None else None, adapter_of(module))
    if "state_dict" not in checkpoint:  # the strategy of FSDP2 has loaded the tensors itself, and strictly
        return
    state = module.state_dict()
    _check_architecture(checkpoint["state_dict"], state, theirs, module)
    if module.lora is not None:
        checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}


def check_data(trainer: L.Trainer | None, checkpoint: Checkpoint) -> None:
    """Refuse another data module, which would ignore the position; one of the same class compares its rows itself."""
    data = getattr(trainer, "datamodule", None)
    theirs, ours = (checkpoint.get("diffzoo") or {}).get("data"), type(data).__qualname__
    if theirs is not None and theirs in vars(type(data)).get("former_names", ()):
        states = cast(dict[str, object], checkpoint)
        states[ours], theirs = states.pop(str(theirs)), ours
    if trainer is None or not trainer.training or data is None or theirs in (None, "NoneType", ours):
        return
    if not getattr(getattr(data, "reading", None), "allow_changed_source", False):
        raise UserError(
            f"this run was trained on {theirs}, and its position in it means nothing in {ours}: go on with the "
            "same data, set allow_changed_source to start with the first of the new, or begin another run with "
            "model.weights"
        )


def check_class_order(theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Refuse the same classes in another order: earlier versions sorted folders named by numbers as text."""
    if list(theirs) != list(ours) and sorted(theirs) == sorted(ours):
        raise UserError(
            f"the checkpoint knows the same classes in another order, {', '.join(theirs[:4])} … in place of "
            f"{', '.join(ours[:4])} …: set data.init_args.class_names to [{', '.join(theirs)}]"
        )


def _check_adapter(theirs: Adapter | None, ours: Adapter | None) -> None:
    """Refuse adapters of other weights, of another shape, or where the run trains none."""
    if ours is None:
        if theirs is not None:
            raise UserError("the checkpoint holds low-rank adapters alone: set model.lora as its recipe did")
        return
    for field in ("rank", "alpha", "base_sha256"):
        if getattr(theirs, field, None) != getattr(ours, field):
            raise UserError(
                f"the adapters of the checkpoint have another {field}, {getattr(theirs, field, None)}, than this "
                f"run, {getattr(ours, field)}: keep model.lora and the weights behind model.weights as they were"
            )


def _check_architecture(
    theirs: Mapping[str, object], ours: Mapping[str, object], held: Metadata | None, module: "DiffusionModule"
) -> None:
    """Raise if tensors of a checkpoint have no place in this run, and say which fields of the config differ.

    Of a checkpoint without metadata Lightning reports.
    """
    shapes = {k: v.shape for k, v in ours.items() if isinstance(v, Tensor)}
    if held is None or all(shapes.get(k) == v.shape for k, v in theirs.items() if isinstance(v, Tensor)):
        return
    here = {**to_plain(module.network.config), "network": f"{module.name} ({module.network_class.__name__})"}
    there = {**to_plain(held.config), "network": f"{held.name} ({held.network.__name__})"}
    if there["network"] != here["network"]:
        differ = ["network"]
    else:
        differ = [k for k in here if k in there and here[k] != there[k]]
    parts = [f"{k} {there[k]} there and {here[k]} here" for k in differ]
    raise UserError(
        f"the checkpoint is of another architecture: {'; '.join(parts) or 'tensors of other names or shapes'}: "
        "resume it with the recipe it was trained with, or start from its weights with model.weights"
    )


def settings_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> Settings:
    """The settings of both before the first step, in types that a checkpoint can hold."""
    groups = [_plain({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    if scheduler is None:
        return {"groups": groups, "scheduler": {}, "kind": None}
    return {"groups": groups, "scheduler": _plain(vars(scheduler)), "kind": type(scheduler).__name__}


def follow_recipe(module: "DiffusionModule") -> None:
    """After a resume, set what the recipe has changed since, and say what that was."""
    resumed, module.resumed = module.resumed, None
    if resumed is None or resumed.settings is None or module.recipe_settings is None:
        return
    theirs, ours = resumed.settings, module.recipe_settings
    optimizer = cast(Optimizer, module.optimizers(use_pl_optimizer=False))
    scheduler = cast(LRScheduler | None, module.lr_schedulers())
    changed = set[str]()
    for group, old, new in zip(optimizer.param_groups, theirs["groups"], ours["groups"], strict=True):
        for name in _differing(old, new):
            group[name] = new[name]
            changed.add(name)
    other_kind = theirs["kind"] != ours["kind"]
    if scheduler is not None:
        differing = list(ours["scheduler"]) if other_kind else _differing(theirs["scheduler"], ours["scheduler"])
        for name in differing:
            setattr(scheduler, name, ours["scheduler"][name])
            changed.add(name)
        if other_kind:
            scheduler.last_epoch = module.trainer.global_step
        if changed:
            _set_rates(optimizer, scheduler, theirs, ours)
    if other_kind:
        changed.add("lr_scheduler")
    hidden = {"_last_lr", "base_lrs", "initial_lr", "last_epoch", "_step_count"}  # these follow from the others
    shown = sorted({"lr" if name == "base_lrs" else name for name in changed} - hidden)
    if shown:
        say(f"set as the recipe says, not as the checkpoint: {', '.join(shown)}")


def _set_rates(optimizer: Optimizer, scheduler: LRScheduler, theirs: Settings, ours: Settings) -> None:
    """The learning rates that the schedule gives now."""
    closed_form = getattr(scheduler, "_get_closed_form_lr", None)
    if getattr(scheduler, "factor", None) is not None:  # ours are functions of the step alone
        rates = [float(rate) for rate in scheduler.get_lr()]
    elif closed_form is not None:
        rates = [float(rate) for rate in closed_form()]
    else:  # known only step by step from the first rate: everything scales with that
        now = cast(list[float], ours["scheduler"]["base_lrs"])
        before = cast(list[float], theirs["scheduler"].get("base_lrs") or now)
        last = zip(scheduler.get_last_lr(), before, now, strict=True)
        rates = [float(rate) * new / old if old else float(new) for rate, old, new in last]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def _differing(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [name for name, value in new.items() if name not in old or old[name] != value]


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Only numbers, strings, and lists of them."""

    def is_plain(value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return all(is_plain(v) for v in value)
        return value is None or isinstance(value, (bool, int, float, str))

    return {k: v for k, v in values.items() if is_plain(v)}
