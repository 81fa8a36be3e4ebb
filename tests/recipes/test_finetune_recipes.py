"""The recipes for one's own classes, run as their headers say, on folders of a few images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.stand_ins import write_images
from networks import perturbed

from diffzoo import create_model, load_any, pipeline
from diffzoo.cli.main import main
from diffzoo.models import dimr, registry
from diffzoo.models.base import Network
from diffzoo.process import Cosine, DiscreteBetas, Eps, GaussianProcess, TimeConditioning
from diffzoo.zoo import save_pretrained

# Lightning's own: few workers, deprecated parts of torch
pytestmark = [
    pytest.mark.usefixtures("without_report"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    names = [f"{c}/{i}.png" for c in ("Objects", "robots") for i in range(14)]
    return write_images(tmp_path / "images", names, (32, 32))


def released(network: Network, folder: Path, process: GaussianProcess, name: str, names: list[str]) -> Network:
    save_pretrained(perturbed(network, 0.05), folder, process=process, name=name, class_names=tuple(names))
    return network.eval()


def test_the_whole_network_learns_two_classes(images: Path, tmp_path: Path) -> None:
    names = ["Animals", "Objects", "Food", *"abcdefg"]
    start = released(create_model("simple_uvit_xs_32", num_classes=10), tmp_path / "emoji",
                     GaussianProcess(schedule=Cosine()), "simple_uvit_xs_32", names)  # fmt: skip
    run = tmp_path / "run"
    options = {
        "model.weights": str(tmp_path / "emoji"), "data.init_args.path": str(images),
        "model.network_args.num_classes": "2", "trainer.max_steps": "2", "trainer.accelerator": "cpu",
        "data.init_args.num_workers": "0", "model.sampler.init_args.steps": "2", "model.lr_scheduler": "null",
        "model.optimizer.init_args.lr": "1e-6", "data.init_args.val_fraction": "0.2",
        "trainer.callbacks": """[
            {class_path: SampleGrid, init_args: {every_n_steps: 0, per_class: 1}},
            {class_path: diffzoo.training.HeldOutDistance,
             init_args: {metric: "frechet:random-conv", every_n_steps: 1, n: 4}},
            {class_path: diffzoo.training.MemorisationReport, init_args: {network: random-conv, n: 3}}]""",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert main(["fit", "-c", "finetune/simple_uvit_xs_32", "--run", str(run), *arguments]) == 0
    tuned = load_any(run, weights="raw")
    assert tuned.class_names == ("Objects", "robots")
    before, after = start.state_dict(), tuned.network.state_dict()
    table = "conditioning.classes.weight"
    expected = torch.stack([before[table][1], before[table][:10].mean(0), before[table][10]])
    torch.testing.assert_close(after[table], expected, rtol=0, atol=1e-5)  # two steps of at most 1e-6 each
    assert all((after[k] - v).abs().max() < 1e-5 for k, v in before.items() if k != table)
    assert any(not torch.equal(after[k], v) for k, v in before.items() if k != table)
    for left in ("best/model.safetensors", "held_out.npz", "memorisation.png", "samples/final.png"):
        assert (run / left).is_file(), left


def test_adapters_learn_two_classes(images: Path, tmp_path: Path, own_registry: None) -> None:
    config = replace(dimr.TINY, in_channels=3)
    registry.register_model("dimr_nano", dimr.DiMR, config)
    process = GaussianProcess(
        schedule=DiscreteBetas("scaled_linear", beta_start=0.00085, beta_end=0.012),
        prediction=Eps(), noise_conditioning=TimeConditioning(8.0, -4.0),
    )  # fmt: skip
    names = ["thing, Objects", *"abcdefghi"]
    start = released(dimr.DiMR(config), tmp_path / "nano", process, "dimr_nano", names)
    run = tmp_path / "run"
    options = {
        "model.network": "dimr_nano", "model.autoencoder": "null", "model.weights": str(tmp_path / "nano"),
        "data.init_args.path": str(images), "data.init_args.image_size": "16", "data.init_args.batch_size": "4",
        "model.network_args.num_classes": "2", "data.init_args.num_workers": "0", "trainer.max_steps": "2",
        "trainer.precision": "32-true", "trainer.accelerator": "cpu", "trainer.limit_val_batches": "0",
        "trainer.callbacks": "[{class_path: EMA, init_args: {decays: [0.0]}}]",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert main(["fit", "-c", "finetune/dimr_xl_256_lora", "--run", str(run), *arguments]) == 0
    tuned = load_any(run).network.state_dict()
    table = "stages.0.class_table.weight"
    before = start.state_dict()
    assert (tuned[table][0] - before[table][0]).abs().max() < 1e-3  # known by one of its two names
    assert (tuned[table][1] - before[table][:10].mean(0)).abs().max() < 1e-3
    assert (tuned[table][2] - before[table][10]).abs().max() < 1e-3
    targets = {f"{name}.weight" for name in start.lora_targets()}
    assert all(torch.equal(v, before[k]) for k, v in tuned.items() if k not in targets and k != table)
    adapter, whole = run / "adapter" / "adapter.safetensors", tmp_path / "nano" / "model.safetensors"
    assert adapter.stat().st_size < whole.stat().st_size
    samples = pipeline(run, "cpu")(["robots"], seeds=[0], steps=6, guidance=1.4)
    assert samples.pixels.shape == (1, 16, 16, 3)


def test_another_resolution_keeps_the_network_and_shifts_the_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    process = GaussianProcess(schedule=Cosine())
    start = released(create_model("simple_uvit_xs_32", num_classes=10), tmp_path / "emoji", process,
                     "simple_uvit_xs_32", list("abcdefghij"))  # fmt: skip
    options = {
        "model.weights": str(tmp_path / "emoji"), "trainer.max_steps": "1", "trainer.accelerator": "cpu",
        "data.init_args.batch_size": "2", "data.init_args.cache": "false", "trainer.limit_val_batches": "0",
        "model.optimizer.init_args.lr": "1e-6", "model.lr_scheduler": "null", "trainer.callbacks": "[]",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert main(["fit", "-c", "finetune/simple_uvit_xs_64", "--run", str(tmp_path / "run"), *arguments]) == 0
    assert "schedule shifted from 32 to 64 px: -1.386 log-SNR" in capsys.readouterr().out
    tuned = load_any(tmp_path / "run")
    t = torch.tensor([0.1, 0.5, 0.8])
    torch.testing.assert_close(tuned.process.logsnr(t), process.logsnr(t) - 2 * torch.log(torch.tensor(2.0)))
    before, after = start.state_dict(), tuned.network.state_dict()
    changed = [k for k in before if after[k].shape != before[k].shape]
    assert changed == ["middle.position.table"]
    assert all((after[k] - before[k]).abs().max() < 1e-5 for k in before if k not in changed)
    # every second place of the new grid lies beside an old one
    old, new = (v.unflatten(0, (n, n)) for v, n in ((before[changed[0]], 8), (after[changed[0]], 16)))
    error = (new.reshape(8, 2, 8, 2, -1).mean((1, 3)) - old).norm() / old.norm()
    assert error < 0.5


def test_a_policy_for_classes_asks_for_weights(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = f"--data.init_args.path={images}"
    assert main(["fit", "-c", "finetune/simple_uvit_xs_32", "--run", str(tmp_path / "run"), data]) == 2
    assert "classes is copy, what becomes of the class table of trained weights: say which" in capsys.readouterr().err
