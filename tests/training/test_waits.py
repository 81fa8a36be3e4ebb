"""A training step never waits for the device: everything it needs was copied there with the batch."""

from dataclasses import replace

import pytest
import torch
from device_copies import counted_copies

from diffzoo.models import adm, dimr, dit, edm2, simple_uvit, uvit_bao
from diffzoo.models.base import Network
from diffzoo.process import Cosine, DiscreteBetas, Eps, GaussianProcess, Sigmoid, Straight
from diffzoo.training import DiffusionModule, FusedAdamW, GradientGuard, TrainingLog
from diffzoo.training.gradients import gradient_norm

NETWORKS = {
    "simple_uvit": (simple_uvit.SimpleUViT, simple_uvit.TINY, GaussianProcess(schedule=Cosine())),
    "adm": (adm.ADMUNet, adm.TINY, GaussianProcess(schedule=DiscreteBetas(), prediction=Eps(), learned_variance=True)),
    "dimr": (dimr.DiMR, dimr.TINY, GaussianProcess()),
    "dit": (dit.DiT, dit.TINY, GaussianProcess(path=Straight())),
    "edm2": (edm2.EDM2UNet, edm2.TINY, GaussianProcess()),
    "uvit_bao": (uvit_bao.UViTBao, uvit_bao.TINY, GaussianProcess()),
}


def trained(name: str, device: str) -> tuple[DiffusionModule, dict]:
    """A module on a device, and a batch of its own as the reader brings it there."""
    build, config, process = NETWORKS[name]
    config = replace(config, null_class=name != "adm")
    with torch.device(device):
        network: Network = build(config)
    module = DiffusionModule(network, process=process, weighting=Sigmoid(bias=-1.0), seed=3).to(device)
    c, (h, w) = config.in_channels, config.sides
    image = torch.zeros(4, c, h, w)
    image[0] = -1  # in [-1, 1]
    batch = {"image": image, "label": torch.arange(4) % config.num_classes, "index": torch.arange(4, 8)}
    return module, module.transfer_batch_to_device({**batch, "id": batch["index"]}, torch.device(device), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_makes_no_copy_between_devices(name: str) -> None:
    """On the meta device, where reading a number back is an error."""
    module, batch = trained(name, "meta")
    log, guard, optimizer = TrainingLog(), GradientGuard(), FusedAdamW(module.network.parameters())
    for step in range(2):
        with counted_copies() as copies:
            loss = module.training_step(batch, step)
            loss.backward()
            norm = gradient_norm(optimizer)
            assert norm is not None
            guard.judge(norm)
            log._take_in(module, loss, 4)
    assert copies == []  # of the second step: the first brings the borders of the noise levels


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_never_waits_and_is_one_cuda_graph(name: str) -> None:
    module, batch = trained(name, "cuda")
    want = module.training_step(batch, 0)  # fills the tables of keys and schedules
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.training_step(batch, 0).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    module.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = module.training_step(batch, 0)
        loss.backward()
    graph.replay()
    torch.testing.assert_close(loss, want)


def test_copies_are_seen() -> None:
    with counted_copies() as copies:
        torch.zeros(()).to("meta")
        torch.tensor(1.0, device="meta")
    assert copies == ["aten._to_copy.default", "torch.tensor"]
