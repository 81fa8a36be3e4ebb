"""`diffzoo plan`: what a recipe needs, before it is started."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffzoo.errors import UserError

if TYPE_CHECKING:
    from diffzoo.models.base import Network
    from diffzoo.training.planning import GPU, Plan

__all__ = ["configure", "plan_content", "plan_recipe", "run", "split_settings"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = "diffzoo plan RECIPE | -c RECIPE [-c OVERLAY ...] [--key value ...] [options]"
    parser.epilog = (
        "Settings of the recipe follow as for `diffzoo fit`: --trainer.KEY, --model.KEY, --data.KEY, for example "
        "--data.init_args.micro_batch_size 8."
    )
    parser.add_argument("recipe", nargs="?", help="a file, or a name that ships (`diffzoo recipes list`)")
    parser.add_argument("-c", "--config", action="append", default=[], help="the same; later ones win, as for `fit`")
    parser.add_argument("--data.folder", dest="folder", help="plan for a folder of images, as for `fit`")
    parser.add_argument(
        "--gpu", help="h100, h200, a100-80, l40s, rtx4090, ...; default: the one of this machine, or h100"
    )
    parser.add_argument("--devices", type=int, help="number of GPUs; default: trainer.devices where it is stated, or 1")
    parser.add_argument(
        "--shards",
        type=int,
        help="GPUs that share weights and optimizer by FSDP2; default: all with ModelParallelStrategy, else 1",
    )
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed share of the peak FLOPs (default 0.35)")
    parser.add_argument("--price", type=float, help="US dollars per GPU hour; default: a typical on-demand price")
    parser.add_argument("--grad-checkpointing", action="store_true", help="plan with recomputed activations")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from diffzoo.training.planning import find_gpu, present_gpu

    stated = [n for n in (args.devices, args.shards) if n is not None]
    if min(stated, default=1) < 1 or not 0 < args.mfu <= 1:
        raise UserError("--devices and --shards must be at least 1, --mfu must lie in (0, 1]")
    names = [*([args.recipe] if args.recipe else []), *args.config]
    if not names:
        raise UserError("no recipe: give a file or a name that ships, `diffzoo recipes list` shows all")
    gpu = find_gpu(args.gpu) if args.gpu else present_gpu() or find_gpu("h100")
    shown = " + ".join(names)
    plain = len(names) == 1 and not args.settings and not args.folder
    content = _read(names[0]) if plain else _parsed(names, args.settings, args.folder)
    trainer = content.get("trainer") or {}
    devices = args.devices or _devices(trainer)
    shards = args.shards or (devices if "ModelParallelStrategy" in str(trainer.get("strategy")) else 1)
    plan, micro = plan_content(content, shown, devices, shards, args.mfu, args.grad_checkpointing)
    metadata = _metadata(plan, gpu, micro, gpu.price if args.price is None else args.price)
    print(json.dumps(metadata, indent=1) if args.json else _text(shown, plan, gpu, metadata))
    return 0


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of the recipe in the form of `fit`, with their values, and the other arguments."""
    settings: list[str] = []
    others: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if not name.startswith(("--data", "--model", "--trainer", "--seed_everything")) or name == "--data.folder":
            others.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return settings, others


def _read(recipe: str) -> dict[str, Any]:
    """A recipe as it is written."""
    import yaml

    from diffzoo.cli.recipe_files import find_recipe

    path = find_recipe(recipe)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error


def _parsed(recipes: Sequence[str], settings: Sequence[str], folder: str | None) -> dict[str, Any]:
    """Recipes and settings as `fit` would take them together, defaults included."""
    from diffzoo.cli.fit import command_arguments, plain_warnings
    from diffzoo.cli.lightning_cli import ParsedRecipe
    from diffzoo.cli.recipe_files import find_recipe
    from diffzoo.cli.recipe_version import newer_explained

    paths = [find_recipe(name) for name in recipes]
    with plain_warnings(), newer_explained(paths):
        config = ParsedRecipe(command_arguments("fit", paths, settings, folder)).config
    return config["fit"].as_dict()


def _devices(trainer: dict[str, Any]) -> int:
    """How many a trainer states; one where it leaves them to the machine."""
    if trainer.get("devices", "auto") in ("auto", -1, "-1", None):
        return 1
    from diffzoo.cli.lightning_cli import world_size

    return world_size(trainer)


def plan_recipe(
    recipe: str, devices: int = 1, shards: int = 1, mfu: float = 0.35, recompute: bool = False
) -> "tuple[Plan, int | None]":
    """The plan of a recipe and the micro-batch that it states, if any.

    Args:
        recipe: a file, or a name that ships.
        devices: number of GPUs.
        shards: GPUs that share weights, gradients, optimizer and averages.
        mfu: assumed share of the peak FLOPs.
        recompute: plan with activation checkpointing, whatever the recipe says.

    Raises:
        UserError: for a recipe that does not parse, or whose network is not a registered name.
    """
    return plan_content(_read(recipe), recipe, devices, shards, mfu, recompute)


def plan_content(
    content: dict[str, Any], where: str, devices: int = 1, shards: int = 1, mfu: float = 0.35, recompute: bool = False
) -> "tuple[Plan, int | None]":
    """`plan_recipe` for a recipe that is read already; `where` it came from, for messages."""
    import torch

    import diffzoo.models  # noqa: F401  registers the names
    from diffzoo.models.registry import build
    from diffzoo.training.planning import Plan, network_cost

    model, trainer = content.get("model") or {}, content.get("trainer") or {}
    name, overrides = _network(model, where)
    overrides = {k: v for k, v in overrides.items() if k not in ("classes", "class_names")}  # of the weights
    with torch.device("meta"):
        network = build(name, **overrides)
        _choose_trained(network, model)
    network.set_grad_checkpointing(recompute or bool(model.get("grad_checkpointing")))
    data = (content.get("data") or {}).get("init_args") or {}
    plan = Plan(
        cost=network_cost(network, half="16" in str(trainer.get("precision", "32"))),
        optimizer_states=_states(model.get("optimizer")),
        averages=_averages(trainer.get("callbacks")),
        companions=_companions(model),
        batch=int(data.get("batch_size", 64)),
        steps=max(0, int(trainer.get("max_steps", 0) or 0)),
        devices=devices,
        shards=shards,
        mfu=mfu,
    )
    micro = data.get("micro_batch_size")
    return plan, None if micro is None else int(micro)


def _choose_trained(network: "Network", model: dict[str, Any]) -> None:
    """Freeze what the recipe freezes: neither gradients nor optimizer states nor averages are kept of it."""
    from diffzoo.training import freezing
    from diffzoo.training.lora import LoRA, inject

    if model.get("freeze"):
        freezing.freeze(network, model["freeze"])
    if model.get("lora"):
        inject(network, LoRA(**model["lora"]))


def _network(model: dict[str, Any], recipe: str) -> tuple[str, dict[str, Any]]:
    network = model.get("network")
    if isinstance(network, str):
        return network, dict(model.get("network_args") or {})
    arguments = dict((network or {}).get("init_args") or {})
    name = arguments.pop("name", None)
    if name is None:
        raise UserError(f"the recipe {recipe} states no registered network: expected model.network, a name")
    arguments.pop("pretrained", None)
    return name, {**arguments, **(arguments.pop("overrides", None) or {}), **((network or {}).get("dict_kwargs") or {})}


def _class(part: Any) -> tuple[str, dict[str, Any]]:
    """Short class name and arguments of an entry of a recipe."""
    if isinstance(part, str):
        return part.rsplit(".", 1)[-1], {}
    if not isinstance(part, dict):
        return "", {}
    return str(part.get("class_path", "")).rsplit(".", 1)[-1], dict(part.get("init_args") or {})


def _states(optimizer: Any) -> int:
    """Tensors of the size of the weights: the two moments of Adam and its kin, one for those with momentum alone."""
    kind, arguments = _class(optimizer)
    name = str(arguments.get("name", kind)).lower()
    return 1 if any(n in name for n in ("lion", "muon", "sgd")) else 2


def _averages(callbacks: Any) -> int:
    for callback in callbacks or []:
        kind, arguments = _class(callback)
        if kind == "EMA":
            return len(arguments.get("decays", [0.9999])) + len(arguments.get("stds", []))
    return 0


# parameters of frozen companions, in millions; they are kept in float32
COMPANIONS = {"KLAutoencoder": 84, "CLIPEncoder": 123, "T5Encoder": 4762}


def _companions(model: dict[str, Any]) -> float:
    kinds = [_class(model.get(part))[0] for part in ("autoencoder", "text_encoder")]
    return sum(4e6 * COMPANIONS.get(kind, 0) for kind in kinds)


def _metadata(plan: "Plan", gpu: "GPU", micro: int | None, price: float) -> dict[str, Any]:
    largest, fitting = plan.largest_micro_batch(gpu), plan.fitting_micro_batch(gpu)
    chosen = micro or fitting or 1
    hours = plan.hours(gpu)
    return {
        "gpu": gpu.name,
        "devices": plan.devices,
        "parameters": plan.cost.parameters,
        "gflops_per_image": plan.cost.flops / 1e9,
        "training_gflops_per_image": plan.cost.hardware_flops / 1e9,
        "bytes": {
            **plan.parts(),
            "gradients": plan.gradients(),
            "activations, fixed part": plan.cost.fixed,
            "activations per image": plan.cost.activations,
            "evaluation step": plan.evaluation(),
        },
        "micro_batch": chosen,
        "peak_bytes": plan.peak(chosen),
        "usable_bytes": plan.usable(gpu),
        "fits": plan.peak(chosen) <= plan.usable(gpu),
        "largest_micro_batch": largest,
        "largest_fitting_micro_batch": fitting,
        "images_per_second": plan.images_per_second(gpu),
        "hours": hours,
        "dollars": hours * plan.devices * price,
    }


def _text(recipe: str, plan: "Plan", gpu: "GPU", metadata: dict[str, Any]) -> str:
    gib = 2**30
    lines = [
        f"{recipe} on {plan.devices} x {gpu.name}",
        f"  parameters          {plan.cost.parameters / 1e6:.1f} M",
        f"  FLOPs per image     {metadata['gflops_per_image']:.1f} G forward, "
        f"{metadata['training_gflops_per_image']:.1f} G in training (two per multiply-add)",
        "  memory per GPU",
    ]
    lines += [f"    {name:<28} {size / gib:9.3f} GiB" for name, size in metadata["bytes"].items()]
    verdict = "fits" if metadata["fits"] else "does NOT fit"
    lines += [
        f"  micro-batch {metadata['micro_batch']}: peak {metadata['peak_bytes'] / gib:.1f} GiB of "
        f"{metadata['usable_bytes'] / gib:.1f} GiB usable: {verdict}",
        f"  largest micro-batch {metadata['largest_micro_batch']}, "
        f"largest that divides the batch of {plan.batch}: {metadata['largest_fitting_micro_batch']}",
    ]
    if not metadata["largest_fitting_micro_batch"]:
        lines.append("  nothing fits: set model.grad_checkpointing to true (--grad-checkpointing), or shard (--shards)")
    lines.append(
        f"  speed               {metadata['images_per_second']:.0f} images/s at {100 * plan.mfu:.0f} % MFU (assumed)"
    )
    if plan.steps:
        lines.append(
            f"  whole run           {metadata['hours']:.1f} h for {plan.steps * plan.batch / 1e6:.1f} M images, "
            f"about {metadata['dollars']:.0f} US dollars"
        )
    return "\n".join(lines)
