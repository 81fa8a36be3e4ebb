"""Every recipe that ships: parsed by the real command line, built, run for one batch, and headed by its facts."""

import argparse
import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from diffzoo.cli.main import VERBS
from diffzoo.evaluation import protocol
from diffzoo.models import Network, entry
from diffzoo.recipe.command import ParsedRecipe
from diffzoo.recipe.files import find_recipe, recipe_names
from diffzoo.recipe.parse import read_recipe
from diffzoo.recipe.plan import plan_content
from diffzoo.sampling import Denoiser, sample
from diffzoo.training.gpus import find_gpu
from diffzoo.training.module import DiffusionModule
from diffzoo.typing import Condition

HEADER = ("Command:", "Hardware:", "Cost:", "Expected:", "Source:", "Evaluate:")


@pytest.fixture(params=[name for name in recipe_names() if not name.startswith("studies/")])
def recipe(request: pytest.FixtureRequest) -> Path:
    return find_recipe(request.param)


def tiny(name: str, classes: int) -> Network:
    """A network of the recipe's family, small, conditional on what the recipe's is."""
    found = entry(name)
    module = __import__(found.network.__module__, fromlist=["TINY"])
    text = found.config.text_width
    config = module.TINY_TEXT if text else module.TINY
    changes = {} if text else {"num_classes": min(classes, 7), "null_class": found.config.null_class}
    network = found.network(config.override(**changes))
    if hasattr(network, "set_null_text") and text:
        network.set_null_text(torch.randn(config.text_tokens, config.text_width))
    return network


def substitute_batch(network: Network) -> tuple[torch.Tensor, Condition | None]:
    config = network.config
    x = torch.rand(2, config.in_channels, config.image_size, config.image_size) * 2 - 1
    if config.text_width:
        tokens = config.text_tokens or 5
        mask = torch.ones(2, tokens, dtype=torch.bool)
        return x, Condition(text=torch.randn(2, tokens, config.text_width), text_mask=mask)
    return x, Condition(label=torch.tensor([0, 1])) if config.num_classes else None


def test_header_states_the_metadata(recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for field in HEADER:
        assert any(line.startswith(f"# {field}") for line in head), f"{recipe} has no line '# {field}'"
    command = next(line for line in head if line.startswith("# Command:"))
    stated = re.search(r"diffzoo fit -c (\S+)", command).group(1)
    assert str(recipe).endswith(stated)


def test_the_other_commands_of_the_header_parse(recipe: Path) -> None:
    """What to do with data and results are commands there are, of protocols there are."""
    evaluations = 0
    for line in (line for line in recipe.read_text().splitlines() if line.startswith("#")):
        for command in re.findall(r"diffzoo ((?:data|eval) [^`,]*)", line):
            verb, *words = command.split()
            if words == ["--help"]:
                continue
            parser = argparse.ArgumentParser()
            importlib.import_module(VERBS[verb][0]).configure(parser)
            arguments = parser.parse_args(words)
            if verb == "eval":
                protocol(arguments.protocol)
                evaluations += 1
    assert evaluations == 1


def test_parses_builds_on_meta_and_runs_one_batch(recipe: Path) -> None:
    cli = ParsedRecipe(["fit", f"--config={recipe}", "--trainer.accelerator=cpu", "--trainer.precision=32"])
    with torch.device("meta"):
        built = cli.parser.instantiate_classes(cli.config).fit
    full: DiffusionModule = built.model
    assert all(p.is_meta for p in full.network.parameters())
    assert built.data.batch_size > 0

    network = tiny(full.name, full.network.config.num_classes)
    module = DiffusionModule(
        network,
        process=full.process,
        weighting=full.weighting,
        sampler=full.sampler,
        optimizer=full.optimizer,
        lr_scheduler=full.lr_scheduler,
        condition_dropout=full.condition_dropout,
        loss_resolutions=[network.config.image_size // 2, network.config.image_size] if full.loss_resolutions else None,
    )
    x, cond = substitute_batch(network)
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"]
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(2):  # the first step of a warm-up may have a learning rate of zero
        loss = module.losses(x, torch.randn_like(x), torch.tensor([0.3, 0.7]), cond).mean()
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        configured["lr_scheduler"]["scheduler"].step()
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))

    sampler = replace(full.sampler, steps=4)
    samples = sample(Denoiser(network.eval(), full.process), sampler, x.shape[1:], [0, 1], cond)
    assert samples.shape == x.shape
    assert torch.isfinite(samples).all()


def test_configurations_that_differ_in_size_differ_in_nothing_else() -> None:
    """The U-ViT recipes of Simple Diffusion share everything but the resolution."""
    texts = [find_recipe(f"imagenet{size}/simple_uvit").read_text() for size in (128, 256)]
    bodies = [[line for line in text.splitlines() if not line.startswith("#")] for text in texts]
    changed = [(a, b) for a, b in zip(*bodies, strict=True) if a != b]
    assert all(a.replace("128", "256") == b for a, b in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_step=3"], "max_step.*did you mean.*trainer.max_steps"),
        (["--model.netwrk=simple_uvit_64"], "netwrk.*did you mean.*model.network"),
        (["--model.weighting=Sigmoit"], "Sigmoit.*did you mean.*Sigmoid"),
        (["--data.init_args.imagesize=64"], "imagesize.*did you mean.*image_size"),
        (["--model.sampler.init_args.stepz=4"], "stepz.*did you mean.*steps"),
    ],
    ids=["abbreviation", "model key", "class", "data argument", "sampler argument"],
)
def test_a_wrong_key_names_the_right_one(options: list[str], message: str) -> None:
    from diffzoo.errors import UserError

    with pytest.raises(UserError, match=message):
        ParsedRecipe(["fit", f"--config={find_recipe('emoji/simple_uvit_xs_32')}", *options])


def test_a_class_chosen_anew_takes_nothing_from_the_one_it_replaces() -> None:
    recipe = find_recipe("emoji/simple_uvit_xs_32")
    cli = ParsedRecipe(
        ["fit", f"--config={recipe}", "--model.weighting=Sigmoid", "--model.process.schedule=LinearBeta"]
    )
    with torch.device("meta"):
        model = cli.parser.instantiate_classes(cli.config).fit.model
    assert model.weighting.measure == "logsnr"
    assert model.process.schedule.max_logsnr == 20.0


ON_GPUS = {
    name: (int(found.group(1) or 1), found.group(2))
    for name in recipe_names()
    if (found := re.search(r"# Hardware: +(?:(\d+) x )?([A-Z]+\d+)\n", find_recipe(name, None).read_text()))
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_GPUS)
def test_fits_the_hardware_of_its_header(name: str) -> None:
    """By the plan that `diffzoo plan` prints."""
    devices, card = ON_GPUS[name]
    trainer = yaml.safe_load(find_recipe(name).read_text())["trainer"]
    shards = devices if "ModelParallelStrategy" in str(trainer.get("strategy")) else 1
    plan, micro = plan_content(read_recipe(name), name, devices, shards)
    micro = micro or plan.batch // devices
    assert plan.batch // devices % micro == 0
    gib = 2**30
    need, room = plan.peak(micro) / gib, find_gpu(card.lower()).usable / gib
    assert need <= room, (
        f"{need:.0f} of {room:.0f} GiB; micro_batch_size {plan.fitting_micro_batch(find_gpu('h100'))} fits"
    )
