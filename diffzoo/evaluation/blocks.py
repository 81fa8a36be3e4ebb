"""The run in blocks of seeds: generate, extract features, write each block whole or not at all.

A block is one file named by its position. What is there and belongs to the same plan and protocol is not computed
again, so a killed run goes on where it stopped; blocks are computed one by one on one thread, so that their content
does not depend on how many processes shared the work.

Processes of torchrun or srun share a folder and nothing else. Each computes its share of the blocks, then those of the
others that are still missing, from the end. So slow processes are helped, and the rest computes the blocks of a killed
one.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.evaluation.image_files import ImagesPlan, as_protocol_asks
from diffzoo.evaluation.model_images import one_thread
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.files import atomic_path
from diffzoo.generation.generator import ImageSource
from diffzoo.generation.plan import SamplePlan
from diffzoo.images import to_uint8
from diffzoo.metrics.features import FeatureNetwork, extract, load_features
from diffzoo.progress import progress_bar
from diffzoo.record import digest
from diffzoo.runs import Launch, launch
from diffzoo.tensors import write_tensors

__all__ = ["Blocks", "Job"]

Span = tuple[int, int, int]  # index, first image, number of images of a block
LAYOUT = 1  # of the block files: raise it when their content changes meaning


@dataclass(frozen=True)
class Job:
    """All that one process needs; it is pickled.

    Args:
        source: of the images.
        protocol: how pixels are made of them.
        networks: name and weights path of each feature network.
        device: "cpu", "cuda": with several processes, each takes the next GPU.
        features_per_batch: images in one call of a feature network.
        keep_images: keep the pixels too.
    """

    source: ImageSource
    protocol: EvalProtocol
    networks: tuple[tuple[str, str | None], ...]
    device: str = "cpu"
    features_per_batch: int = 50
    keep_images: bool = False


@dataclass
class Blocks:
    """The blocks of one plan and protocol in a folder.

    Args:
        folder: of all blocks; those of this plan lie in a sub-folder named by their key.
        plan: how the images are made, with its hashes filled in.
        protocol: how they are measured, with its hashes filled in; its n and metrics do not matter to a block.
        size: images per block.
        made_with: versions and device: images made with others are not mixed into one result.
    """

    folder: Path
    plan: SamplePlan | ImagesPlan
    protocol: EvalProtocol
    size: int = 1000
    made_with: Mapping[str, str] = field(default_factory=dict)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"a block needs at least 1 image, got {self.size}")
        protocol = self.protocol
        about = {
            "layout": LAYOUT,
            "plan": self.plan.to_dict(),
            "size": self.size,
            "pixels": [protocol.image_size, protocol.resize, protocol.rounding],
            "made_with": dict(self.made_with),
            "networks": [[n.name, n.rule, n.weights_sha256] for n in protocol.networks],
        }
        self.key = digest(about)[:16]

    # -- files

    def path(self, index: int, what: str = "features") -> Path:
        """The file of a block."""
        return self.folder / self.key / f"{index:05d}.{what}.safetensors"

    def spans(self) -> list[Span]:
        """The blocks of this protocol's n."""
        n = self.protocol.n
        return [(i, i * self.size, min(self.size, n - i * self.size)) for i in range(-(-n // self.size))]

    def has(self, index: int, count: int, keep_images: bool = False) -> bool:
        """Whether a block is there, whole and long enough."""
        return all(self._length(index, w) >= count for w in ("features", *(("pixels",) if keep_images else ())))

    def _length(self, index: int, what: str) -> int:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(index, what), "pt") as file:
                return int((file.metadata() or {}).get("count", 0))
        except (OSError, SafetensorError):  # not there, or cut off by a full disk
            return -1

    def write(self, index: int, tensors: dict[str, Tensor], what: str = "features") -> None:
        """Write a block atomically."""
        count = len(next(iter(tensors.values())))
        write_tensors(self.path(index, what), tensors, {"count": str(count)})

    def read(self, index: int, count: int, what: str = "features") -> dict[str, Tensor]:
        """The first `count` rows of a block."""
        from safetensors.torch import load_file

        return {k: v[:count] for k, v in load_file(self.path(index, what)).items()}

    # -- work

    def missing(self, keep_images: bool = False) -> list[Span]:
        """The blocks that have to be computed."""
        return [span for span in self.spans() if not self.has(span[0], span[2], keep_images)]

    def fill(self, job: Job, processes: int = 1, progress: bool | None = None) -> int:
        """Compute the missing blocks; returns the number of images made.

        Args:
            job: how.
            processes: how many at once; the result does not depend on it.
            progress: show a bar that counts images; None = in notebooks alone.

        Raises:
            UserError: for several processes in each of those that torchrun or srun started.
        """
        place = launch()
        if processes > 1 and place.world > 1:
            raise UserError(f"{place.world} processes were started and share the work: leave --processes out")
        missing = _in_turn(self.missing(job.keep_images), place)
        if not missing:
            return 0
        self.path(0).parent.mkdir(parents=True, exist_ok=True)
        about = {
            "plan": self.plan.to_dict(),
            "protocol": self.protocol.to_dict(),
            "block_size": self.size,
            "made_with": dict(self.made_with),
        }
        with atomic_path(self.path(0).parent / "about.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1, sort_keys=True))
        total, made = sum(count for *_, count in missing), 0
        with progress_bar(total, progress, unit=" images", desc=self.protocol.name) as bar:
            for (*_, count), computed in self._work(job, missing, min(processes, len(missing))):
                bar.update(count)
                made += count * computed
        return made

    def _work(self, job: Job, missing: Sequence[Span], processes: int) -> Iterator[tuple[Span, bool]]:
        if processes <= 1:
            networks = _networks(job, job.device)
            for span in missing:
                if computed := not self.has(span[0], span[2], job.keep_images):  # another process may have been here
                    _compute(self, job, networks, span)
                yield span, computed
            return
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
        turn = context.Value("i", 0)
        with ProcessPoolExecutor(processes, context, _start_worker, (self, job, turn)) as pool:
            waiting = {pool.submit(_compute_here, span): span for span in missing}
            try:
                for done in as_completed(waiting):
                    done.result()
                    yield waiting[done], True
            except BrokenProcessPool as error:
                raise UserError(
                    "a process of the evaluation was killed, most likely for lack of memory: run again with fewer "
                    "--processes; finished blocks are kept"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    def gather(self) -> dict[tuple[str, str], Tensor]:
        """The features of all images in the order of their seeds: (network, layer) to `(n, d)`."""
        out: dict[str, Tensor] = {}
        for index, start, count in self.spans():
            for name, value in self.read(index, count).items():
                if name not in out:
                    out[name] = value.new_empty(self.protocol.n, *value.shape[1:])
                out[name][start : start + count] = value
        return {(k.split("/")[0], k.split("/")[1]): v for k, v in out.items()}

    def pixels(self) -> Iterator[Tensor]:
        """The kept pixels block by block."""
        for index, _, count in self.spans():
            yield self.read(index, count, "pixels")["pixels"]


def _networks(job: Job, device: str) -> list[FeatureNetwork]:
    return [load_features(name, weights, device) for name, weights in job.networks]


def _in_turn(missing: Sequence[Span], place: Launch) -> list[Span]:
    """The missing blocks in the order in which one of several processes takes them: its share, then the others'."""
    others = [span for span in missing if span[0] % place.world != place.rank]
    return [span for span in missing if span[0] % place.world == place.rank] + others[::-1]


def _compute(blocks: Blocks, job: Job, networks: Sequence[FeatureNetwork], span: Span) -> None:
    """One block from seeds to its file."""
    index, start, count = span
    with one_thread(job.device):
        images = job.source.images(start, count)
        where = f"images {start} to {start + count - 1}"
        pixels = as_protocol_asks(to_uint8(images, job.protocol.rounding, start), job.protocol, where)
        features = {
            f"{network.name}/{layer}": value
            for network in networks
            for layer, value in extract(network, pixels, job.features_per_batch).items()
        }
    if job.keep_images:
        blocks.write(index, {"pixels": pixels}, "pixels")
    blocks.write(index, features)


# -- worker processes

_WORKER: dict[str, Any] = {}


def _start_worker(blocks: Blocks, job: Job, turn: Any) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    device = job.device
    if torch.device(device).type == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    source = job.source
    if hasattr(source, "device"):
        source.device = device
    _WORKER["blocks"], _WORKER["networks"] = blocks, _networks(job, device)
    _WORKER["job"] = Job(source, job.protocol, job.networks, device, job.features_per_batch, job.keep_images)


def _compute_here(span: Span) -> None:
    _compute(_WORKER["blocks"], _WORKER["job"], _WORKER["networks"], span)


def _leave_with_parent() -> None:
    """A killed parent must not leave processes behind that hold a GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
