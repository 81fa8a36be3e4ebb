"""What a run will need: operations, memory, time.

Nothing is computed: the network runs on tensors without data (`FakeTensorMode`), forward and backward, while operations
are counted and the bytes alive are followed. Two batch sizes tell what grows with the batch from what does not; they
are large, so that the peak lies where the activations are, not at the end, where the gradients are.

Conventions: FLOPs are two per multiply-add; a training step costs three forward passes, and one more where
activations are recomputed; GiB are 2^30 bytes.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffzoo.models.base import Network
from diffzoo.models.summary import example_inputs, multiply_adds
from diffzoo.training.gpus import GPU

__all__ = ["NetworkCost", "Plan", "flops_per_image", "network_cost"]

BATCHES = (64, 128)


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These are counted elsewhere: parameters and inputs."""
        self._seen.update(t.untyped_storage()._cdata for t in tensors)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True)
class NetworkCost:
    """What a network needs.

    Args:
        parameters: number of parameters; trainable: of those that train.
        flops: of one forward pass per image.
        activations: bytes per image at the peak of a training step: what the backward pass needs, and temporaries.
        fixed: bytes at that peak that do not grow with the batch: weights cast to half precision, first gradients.
        forward: bytes per image at the peak of a pass without gradients.
        recompute: whether activations are recomputed.
    """

    parameters: int
    trainable: int
    flops: float
    activations: float
    fixed: float
    forward: float
    recompute: bool

    @property
    def hardware_flops(self) -> float:
        """Operations that a training step carries out per image."""
        return (4 if self.recompute else 3) * self.flops


def fake_pass(network: Network, prepare: Callable[[Network], None]) -> None:
    """A forward pass of a twin without data, given to `prepare` first, which may register hooks."""
    twin = _twin(network).eval()
    prepare(twin)
    with torch.no_grad():
        twin.training_outputs(*example_inputs(network.config, 2))


def _twin(network: Network) -> Network:
    """The same network without data. Initialisation is done on "meta": some of it looks at values."""
    with torch.device("meta"):
        twin = type(network)(network.config)
    twin.set_grad_checkpointing(network.grad_checkpointing)
    # adapters are not part of the twin, and the layers that they surround have a longer name
    trains = {n.replace(".base_layer.", "."): p.requires_grad for n, p in network.named_parameters()}
    for name, own in twin.named_parameters():
        own.requires_grad_(trains[name])
    return twin


def _fill(twin: Network) -> Network:
    """Give a network of "meta" the tensors of the fake mode it is called in, which claim to be on the CPU."""
    for module in twin.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = torch.empty(p.shape, dtype=p.dtype, device="cpu")
            module.register_parameter(name, torch.nn.Parameter(fake, requires_grad=p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
    return twin


def flops_per_image(network: Network) -> float:
    """Operations of one forward pass per image, two per multiply-add: products, convolutions and attention."""
    return 2.0 * multiply_adds(_twin(network))


def _peak(network: Network, batch: int, half: bool, train: bool) -> int:
    """Bytes alive at the peak of one pass, without parameters and inputs."""
    twin = _twin(network).train(train)
    with FakeTensorMode():
        _fill(twin)
        z, level, cond = example_inputs(network.config, batch, "cpu")
        if cond is not None and cond.text is not None:  # captions have a mask in training
            cond = replace(cond, text_mask=torch.ones(cond.text.shape[:2], dtype=torch.bool))
        live = _LiveBytes()
        live.ignore([*twin.parameters(), *twin.buffers(), z, level])
        with live, torch.set_grad_enabled(train):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outputs = twin.training_outputs(z, level, cond)
            if train:
                sum(o.float().square().mean() for o in outputs).backward()  # type: ignore[union-attr]
        return live.peak


def network_cost(network: Network, half: bool = True) -> NetworkCost:
    """Measure a network without running it; `half` = bf16-mixed with weights in float32, else float32 throughout."""
    small, large = BATCHES
    one, two = (_peak(network, b, half, True) for b in BATCHES)
    forward = _peak(network, large, half, False) - _peak(network, small, half, False)
    activations = (two - one) / (large - small)
    return NetworkCost(
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        flops=flops_per_image(network),
        activations=activations,
        fixed=max(0.0, one - small * activations),
        forward=forward / (large - small),
        recompute=bool(network.grad_checkpointing),
    )


@dataclass(frozen=True)
class Plan:
    """Memory and time of a recipe on a card.

    Args:
        cost: of the network.
        optimizer_states: tensors of the size of the weights that the optimizer keeps: 2 for Adam, 1 for Lion.
        averages: how many averages of the weights are kept.
        frozen_encoders: bytes of frozen autoencoder and text encoder.
        batch: images per step over all devices.
        steps: optimizer steps of the run.
        devices: how many cards share the batch.
        shards: over how many of them weights, gradients, optimizer and averages are split; 1 = DDP.
        mfu: share of the card's peak that training reaches; an assumption unless measured.
        evaluation_batch: images drawn at once in previews and evaluation.
    """

    cost: NetworkCost
    optimizer_states: int = 2
    averages: int = 1
    frozen_encoders: float = 0.0
    batch: int = 256
    steps: int = 0
    devices: int = 1
    shards: int = 1
    mfu: float = 0.35
    evaluation_batch: int = 64

    def parts(self) -> dict[str, float]:
        """Bytes per device that stay for the whole run."""
        weights, trained = 4.0 * self.cost.parameters, 4.0 * self.cost.trainable
        return {
            "weights": weights / self.shards,
            "optimizer": self.optimizer_states * trained / self.shards,
            "averages": self.averages * trained / self.shards,
            "autoencoder and text encoder": self.frozen_encoders,
        }

    def gradients(self) -> float:
        """Bytes of all gradients."""
        return 4.0 * self.cost.trainable / self.shards

    def evaluation(self) -> float:
        """Bytes that a preview or evaluation step adds: the raw weights put aside, and the guided forward pass."""
        return self.gradients() + 2 * self.evaluation_batch * self.cost.forward

    def training(self, micro_batch: int) -> float:
        """Bytes of a training step at its peak.

        Gradients come as activations go, unless they are there from the start: those that are being accumulated,
        and DDP's buckets.
        """
        activations, gradients = self.cost.fixed + micro_batch * self.cost.activations, self.gradients()
        stay = self.devices > 1 or micro_batch * self.devices < self.batch
        peak = activations + gradients if stay else max(activations, gradients)
        return sum(self.parts().values()) + peak

    def peak(self, micro_batch: int) -> float:
        """Bytes at the highest point of the run, evaluation included."""
        return max(self.training(micro_batch), sum(self.parts().values()) + self.evaluation())

    def largest_micro_batch(self, gpu: GPU) -> int:
        """The largest micro-batch that fits, 0 if none does; no larger than a device's share of the batch."""
        share = max(1, self.batch // self.devices)
        if self.training(share) <= gpu.usable:
            return share
        room = gpu.usable - sum(self.parts().values()) - self.cost.fixed - self.gradients()
        return max(0, min(int(room // max(self.cost.activations, 1)), share - 1))

    def fitting_micro_batch(self, gpu: GPU) -> int:
        """The largest that also divides a device's share of the global batch, as accumulation wants it."""
        share, largest = max(1, self.batch // self.devices), self.largest_micro_batch(gpu)
        return next((m for m in range(largest, 0, -1) if share % m == 0), 0)

    def images_per_second(self, gpu: GPU) -> float:
        """Images that all devices together train on in a second, at the assumed MFU."""
        return self.devices * gpu.tflops * 1e12 * self.mfu / self.cost.hardware_flops

    def hours(self, gpu: GPU) -> float:
        """Hours that the whole run takes."""
        return self.steps * self.batch / self.images_per_second(gpu) / 3600
