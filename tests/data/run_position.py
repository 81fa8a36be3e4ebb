"""Training runs in processes of their own that write down what they are shown, so that they can be killed."""

import contextlib
import json
import multiprocessing
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from data.stand_ins import Recorder, Shards, quiet_trainer, signature

from diffzoo.runs import find_resume
from diffzoo.training.checkpointing import Checkpointing

SETTINGS = {"batch_size": 8, "crop": "random", "shuffle_window": 64, "lanes": 16}


class Printing(Recorder):
    """Prints the number of every step with the samples it is shown, and takes its time."""

    def __init__(self, sleep: float):
        super().__init__()
        self.sleep = sleep

    def training_step(self, batch, batch_idx):
        print(f"step {self.global_step} {json.dumps(signature(batch))}", flush=True)
        time.sleep(self.sleep)
        return self.weight.sum()


def train(run: Path, files: list[str], steps: int, workers: int, sleep: float) -> None:
    """Train, or go on from the newest checkpoint of the folder."""
    multiprocessing.set_start_method("fork", force=True)  # as in a process that is started from a command line
    multiprocessing.current_process()._config["daemon"] = False  # which must not have workers of its own
    warnings.simplefilter("ignore")
    trainer = quiet_trainer(run, max_steps=steps, callbacks=[Checkpointing(2, 0, 2)], enable_checkpointing=True)
    data = Shards(files, num_workers=workers, **SETTINGS)
    trainer.fit(Printing(sleep), datamodule=data, ckpt_path=find_resume(run, print), weights_only=True)


class BadImagesOf(L.Callback):
    """Notes at the beginning of every step how many bad images this process knows of."""

    def __init__(self, data: Shards):
        self.data, self.known = data, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.known.append(sorted(self.data.bad_images))


def two_ranks(out: Path, files: list[str], ckpt: str | None, steps: int, workers: int) -> None:
    """One of two processes that train together; started again by itself as the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recorder, data = Recorder(), Shards(files, num_workers=workers, **SETTINGS)
    bad = BadImagesOf(data)
    trainer = quiet_trainer(out, strategy="ddp", devices=2, max_steps=steps, callbacks=[bad])
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(out / "last.ckpt")
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps({"seen": recorder.seen, "bad": bad.known}))
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import sys

    arguments = json.loads(sys.argv[1])
    two_ranks(Path(arguments.pop("out")), **arguments)
