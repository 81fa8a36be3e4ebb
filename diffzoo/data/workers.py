"""Worker processes that make batches ahead of training, with errors as sentences."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader, Dataset

from diffzoo.data.batches import RawBatch
from diffzoo.errors import UserError

__all__ = ["WorkerLoader", "auto_workers"]


Make = Callable[[int, int], RawBatch]


class _Batches(Dataset["RawBatch | UserError"]):
    """The batch of a span; a UserError travels as a batch.

    The loader deals spans to its workers in turn and takes the batches back in the same turn, so their order does not
    depend on how many workers there are.
    """

    def __init__(self, make: Make):
        self.make = make

    def __getitem__(self, span: tuple[int, int]) -> RawBatch | UserError:
        try:
            return self.make(*span)
        except UserError as error:
            return error


def _identity(batch: object) -> object:
    return batch


def _killed(error: BaseException) -> UserError:
    """The sentence for the death of a worker process."""
    seen = f"{type(error).__name__}: {error}".splitlines()[0]
    return UserError(
        "a data worker was killed, most likely because memory ran out: set fewer num_workers, a smaller "
        f"shuffle_window, or free memory, and resume from the last checkpoint ({seen})"
    )


@contextmanager
def _worker_deaths_wait() -> Iterator[None]:
    """Start workers without PyTorch's signal handler, which raises their death in the middle of whatever runs.

    Raised in an optimizer's step, it would leave half of the weights updated. Without the handler, the next request for
    a batch notices the death within seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        ours = handler if getattr(handler, "__module__", "") != "torch.utils.data._utils.signal_handling" else None
        signal.signal(signal.SIGCHLD, ours or signal.SIG_DFL)


class WorkerLoader:
    """An iterator over batches made by worker processes, with errors as sentences.

    Args:
        make: (start, count) → batch.
        spans: (start, count) of each batch; taken in this process, as far ahead as there are batches under way.
        num_workers: processes; 0 makes batches in this one.
        prefetch: batches under way per worker.
    """

    def __init__(self, make: Make, spans: Iterable[tuple[int, int]], num_workers: int, prefetch: int = 4):
        loader: DataLoader[RawBatch | UserError] = DataLoader(
            _Batches(make),
            batch_size=None,
            sampler=spans,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=prefetch if num_workers else None,
        )
        with _worker_deaths_wait():
            self._iterator: Iterator[RawBatch | UserError] = iter(loader)

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        try:
            batch = next(self._iterator)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError):
                killed = "DataLoader worker" in str(error)
            else:  # perhaps it was killed while it handed a batch over, when PyTorch still saw it alive
                killed = self._a_worker_ended()
            if not killed:
                raise
            raise _killed(error) from error
        if isinstance(batch, UserError):
            raise batch
        return dict(batch)

    def _a_worker_ended(self) -> bool:
        sentinels = [worker.sentinel for worker in getattr(self._iterator, "_workers", [])]
        return bool(wait(sentinels, timeout=2.0))

    def close(self) -> None:
        """End the workers."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._iterator = iter(())


def auto_workers(cached: bool, world: int) -> int:
    """How many worker processes suit this machine: none for cached sets, else a power of two up to 8 per rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, world)
    if cached or share < 2:
        return 0
    return next(n for n in (8, 4, 2, 1) if n < share)
