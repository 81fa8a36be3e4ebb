"""Proof that a change of structure changes no number: loss curves, images and an evaluation, bit for bit.

    python benchmarks/same_bits.py record before.json     # at the revision before the change
    python benchmarks/same_bits.py compare before.json    # after it, on the same machine

Bits differ between machines and versions of torch, so both runs belong to one machine and one environment. About five
minutes on one CPU core; `--only NAME ...` runs some of the jobs.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ["fit", "-c", str(ROOT / "recipes/emoji/simple_uvit_xs_32.yaml")]
QUIET = ["--trainer.limit_val_batches=0", "--trainer.callbacks=null"]

IN_PYTHON = """
import hashlib, json, torch
from diffzoo.models import adm, dimr
from diffzoo.process import DiscreteBetas, Eps, GaussianProcess
from diffzoo.sampling import (
    ClassifierFree, ClassifierGuidance, DDIM, Denoiser, DPMSolver, Respaced, RespacedAncestral, RespacedDDIM, sample,
)
from diffzoo.training import DiffusionModule
import lightning.pytorch as L
import diffzoo.process as processes

# one word of the process has another name since: `reads` became `noise_conditioning`
by_time = getattr(processes, "TimeConditioning", None) or processes.ReadsTime
field = "noise_conditioning" if hasattr(processes, "TimeConditioning") else "reads"

def seen(tensor):
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()

class Losses(L.Callback):
    def __init__(self):
        self.values = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]).hex())

def batches(config, n=8):
    made = torch.Generator().manual_seed(0)
    for i in range(n):
        yield {
            "moments": torch.cat([torch.randn(4, config.in_channels, config.image_size, config.image_size,
                                              generator=made), 0.1 * torch.ones(4, config.in_channels,
                                              config.image_size, config.image_size)], 1),
            "label": torch.arange(4) % max(config.num_classes, 1), "index": torch.arange(4 * i, 4 * i + 4),
            "id": torch.arange(4 * i, 4 * i + 4),
        }

def train(network, process):
    torch.manual_seed(0)
    losses = Losses()
    module = DiffusionModule(network, process=process, condition_dropout=0.2)
    trainer = L.Trainer(max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[losses],
                        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, torch.utils.data.DataLoader(list(batches(network.config)), batch_size=None))
    return losses.values

torch.manual_seed(0)
out = {}
latent = GaussianProcess(DiscreteBetas(kind="scaled_linear", beta_start=0.00085, beta_end=0.012), prediction=Eps(),
                         **{field: by_time(8.0, -4.0)})
out["dimr losses on latents"] = train(dimr.DiMR(dimr.TINY), latent)
torch.manual_seed(1)
def scramble(network):
    for p in network.parameters():  # zero-initialised outputs would hide everything
        torch.nn.init.normal_(p, std=0.05)
    return network.eval()
network = scramble(dimr.DiMR(dimr.TINY))
shape = (network.config.in_channels, network.config.image_size, network.config.image_size)
label = torch.tensor([0, 1])
from diffzoo.typing import Condition
cond = Condition(label=label)
guided = ClassifierFree(Denoiser(network, latent), scale=0.4, formula="cond")
out["dimr images"] = seen(sample(guided, DPMSolver(steps=6), shape, seeds=[0, 1], cond=cond))
process = GaussianProcess(DiscreteBetas(kind="linear"), prediction=Eps(), learned_variance=True,
                          **{field: by_time(1000.0, -1.0)})
network, classifier = scramble(adm.ADMUNet(adm.TINY)), scramble(adm.ADMClassifier(adm.TINY_CLASSIFIER))
shape = (network.config.in_channels, network.config.image_size, network.config.image_size)
cond = Condition(label=label) if network.config.num_classes else None
for name, sampler in (("respaced ancestral", RespacedAncestral(steps=5)), ("respaced ddim", RespacedDDIM(steps=5))):
    out["adm " + name] = seen(sample(Denoiser(network, process), sampler, shape, seeds=[3, 4], cond=cond))
guided = ClassifierGuidance(Denoiser(network, process), classifier, scale=1.0)
out["adm guided by a classifier"] = seen(sample(guided, RespacedDDIM(steps=5), shape, seeds=[3, 4], cond=cond))
print("RESULT " + json.dumps(out))
"""


def run(*arguments: str, folder: Path, code: str | None = None) -> str:
    """The output of `diffzoo ARGUMENTS`, or of Python code, in a folder."""
    command = [sys.executable, "-c", code] if code is not None else [sys.executable, "-m", "diffzoo", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:6]))} ... failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def losses(folder: Path) -> list[list[str]]:
    """Step and loss of every row that a run logged."""
    with next(folder.rglob("metrics.csv")).open() as file:
        return [[row["step"], row["train/loss"]] for row in csv.DictReader(file) if row.get("train/loss")]


def images(folder: Path) -> list[str]:
    """Hashes of the pixels of all images in a folder, in order of their names."""
    from PIL import Image

    found = sorted(p for p in folder.rglob("*.png"))
    return [hashlib.sha256(Image.open(p).tobytes()).hexdigest() for p in found]


def curve(folder: Path) -> object:
    """200 steps of the emoji recipe."""
    run(*EMOJI, "--run", "r", "--trainer.max_steps=200", *QUIET, "--trainer.log_every_n_steps=5", folder=folder)
    return losses(folder / "r")


def resumed(folder: Path) -> object:
    """The same run, stopped after 20 steps and resumed, with an average."""
    average = "diffzoo.training.EMA" if "EMA" in (ROOT / "diffzoo/training/__init__.py").read_text() else None
    callbacks = f"[{{class_path: {average or 'diffzoo.training.WeightAverages'}, init_args: {{decays: [0.99]}}}}]"
    same = [*EMOJI, "--run", "r", "--trainer.limit_val_batches=2", f"--trainer.callbacks={callbacks}"]
    steps = ["--trainer.log_every_n_steps=5", "--model.lr_scheduler.init_args.total_steps=60"]
    run(*same, *steps, "--trainer.max_steps=20", folder=folder)
    run(*same, *steps, "--trainer.max_steps=40", "--resume", "auto", folder=folder)
    run("sample", "r", "--seeds", "0-1", "--classes", "3", "--steps", "5", "--dir", "out", folder=folder)
    return {"losses": losses(folder / "r"), "images of the EMA": images(folder / "out")}


def fine_tuned(folder: Path) -> object:
    """The weights that ship, 20 steps further."""
    tune = ["--model.weights", "simple_uvit_xs_32.emoji", "--model.lr_scheduler=null"]
    run(*EMOJI, "--run", "r", *tune, "--trainer.max_steps=20", *QUIET, "--trainer.log_every_n_steps=5", folder=folder)
    return losses(folder / "r")


def shipped(folder: Path) -> object:
    """Images of the weights that ship, plain and guided, for eight seeds."""
    name = "simple_uvit_xs_32.emoji"
    run("sample", name, "--classes", "3", "--seeds", "0-7", "--steps", "10", "--dir", "a", folder=folder)
    guided = ["--guidance", "3", "--sampler", "DPMSolverMultistep"]
    run("sample", name, "--classes", "5", "--seeds", "0-7", "--steps", "8", *guided, "--dir", "b", folder=folder)
    return {"plain": images(folder / "a"), "guided": images(folder / "b")}


def evaluated(folder: Path) -> object:
    """Metrics of 130 images under the demo protocol."""
    run(
        "eval",
        "simple_uvit_xs_32.emoji",
        "--protocol",
        "demo",
        "--n",
        "130",
        "--steps",
        "5",
        "--out",
        "e",
        folder=folder,
    )
    found = [json.loads(p.read_text()) for p in sorted((folder / "e").rglob("*.json"))]
    return [data["values"] for data in found if isinstance(data, dict) and "values" in data]


def in_python(folder: Path) -> object:
    """Tiny DiMR on latents and tiny ADM, respaced."""
    out = run(folder=folder, code=IN_PYTHON)
    return json.loads(next(line for line in out.splitlines() if line.startswith("RESULT "))[7:])


def differences(before: object, after: object, place: str = "") -> list[str]:
    """Where two pieces of JSON data differ, as paths."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(f"{place}.{key}", before.get(key), after.get(key)) for key in sorted({*before, *after})]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(before, after, strict=True))]
    else:
        return [] if before == after else [place or "the whole"]
    return [found for name, a, b in pairs for found in differences(a, b, name)]


JOBS: dict[str, Callable[[Path], object]] = {
    "curve": curve, "resumed": resumed, "fine_tuned": fine_tuned, "shipped": shipped, "evaluated": evaluated,
    "in_python": in_python,
}  # fmt: skip


def main() -> None:
    """Record the numbers, or compare them with those recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    found = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = JOBS[name](Path(folder))
        print(f"{name}: done", flush=True)
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    before = json.loads(args.file.read_text())
    different = {name: differences(before[name], json.loads(json.dumps(found[name]))) for name in found}
    for name, places in different.items():
        print(f"{name}: {'equal bit for bit' if not places else 'DIFFERENT at ' + ', '.join(places[:8])}")
    sys.exit(any(different.values()))


if __name__ == "__main__":
    main()
