"""Sampling with guidance as the official DiMR and U-ViT evaluation does it, from a given x_T."""

from golden_case import Json, Tensors, assert_close, section

from diffzoo.models import Network
from diffzoo.process import GaussianProcess
from diffzoo.sampling.denoiser import Denoiser
from diffzoo.sampling.dpm_solver import DPMSolver
from diffzoo.sampling.grids import UniformTime
from diffzoo.sampling.guidance import ClassifierFree, PowerCosine
from diffzoo.sampling.loop import sample
from diffzoo.typing import Condition


def guided(case: Json, network: Network, process: GaussianProcess) -> ClassifierFree:
    """The guidance that the case's fields describe: cond + s (cond - uncond), or DiMR's decay of the other formula."""
    power = case.get("cfg_scale_pow", -1)
    denoise = Denoiser(network, process)
    if power == -1:
        return ClassifierFree(denoise, case["cfg_scale"], "cond")
    return ClassifierFree(denoise, case["cfg_scale"], "uncond", decay=PowerCosine(power))


def run_sampling(case: Json, tensors: Tensors, network: Network, process: GaussianProcess) -> None:
    """Draw with every number of steps of the case and compare the images."""
    inputs = section(tensors, "in/")
    assert network.config.num_classes == case["null_class"]
    x_t = inputs["x_T"]
    got = {}
    for steps in case["steps"]:
        sampler = DPMSolver(steps=steps, grid=UniformTime(t_end=1e-3), order=3, form="data", method="fast")
        images = sample(guided(case, network, process), sampler, x_t.shape[1:], range(len(x_t)),
                        Condition(label=inputs["y"]), start=x_t)  # fmt: skip
        got[f"steps{steps}/x0"] = images
    want = {name: tensor for name, tensor in section(tensors, "out/").items() if name.startswith("steps")}
    assert want
    assert_close(got, want, case["tolerance"]["out"])
