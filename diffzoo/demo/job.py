"""A sampling in a thread of its own that says how far it is, shows x_hat on the way, and can be stopped."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from diffzoo.images import to_uint8
from diffzoo.sampling import Moment, Trajectory

__all__ = ["Stopped", "Update", "Watch", "watched"]

T = TypeVar("T")
EVERY = 0.15  # seconds between two updates at least


class Stopped(Exception):
    """Somebody asked for a sampling to stop."""


@dataclass(frozen=True)
class Update:
    """How far a sampling is.

    Args:
        pixels: what the network believes of all images now, uint8 `(n, c, h, w)`.
        done: share of the steps of all images; a cascade begins anew with its upsampler.
        left: seconds, about.
    """

    pixels: UInt8[Tensor, "n c h w"]
    done: float
    left: float


class Watch(Trajectory):
    """Hands on x_hat and progress at each step, and stops when asked.

    Args:
        images: that are sampled.
        tell: called with updates.
        stop: set when somebody wants to stop.
    """

    def __init__(self, images: int, tell: Callable[[Update], None], stop: threading.Event):
        super().__init__(images=images)
        self.tell, self.stop = tell, stop
        self.enlarging()

    def enlarging(self) -> Self:
        """This again, for images of another size."""
        self.start = self.told = time.monotonic()
        self.decode, self.latest = None, torch.empty(0, dtype=torch.uint8)
        return self

    def __call__(self, moment: Moment) -> None:
        """Take note of one step of one batch.

        Raises:
            Stopped: if somebody asked for it.
        """
        if self.stop.is_set():
            raise Stopped
        now = time.monotonic()
        if moment.step < 0 or now - self.told < EVERY:
            return
        rows, size = moment.rows, len(moment.rows)
        x = moment.x_hat.float()
        pixels = to_uint8((x if self.decode is None else self.decode(x)).nan_to_num()).cpu()
        if not len(self.latest):
            self.latest = torch.full((self.images, *pixels.shape[1:]), 255, dtype=torch.uint8)
        self.latest[rows.start : rows.stop] = pixels
        done = (rows.start + size * (moment.step + 1) / moment.steps) / self.images
        self.tell(Update(self.latest.clone(), done, (now - self.start) * (1 - done) / done))
        self.told = time.monotonic()


def watched(images: int, work: Callable[[Watch], T], stop: threading.Event) -> Iterator[Update | T]:
    """Updates while `work` runs in a thread, then what it returns; its exception is raised here.

    Closing the iterator stops the work.
    """
    said: queue.Queue[Update | None] = queue.Queue()
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work(Watch(images, said.put, stop)))
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)
        finally:
            said.put(None)

    thread = threading.Thread(target=run, name="sampling", daemon=True)
    thread.start()
    try:
        while (update := said.get()) is not None:
            if said.empty():  # the newest one is enough
                yield update
    finally:
        if not result and not errors:
            stop.set()
        thread.join()
    if errors:
        raise errors[0]
    yield result[0]
