"""The log of a run: loss, also by noise level, gradient norm, images, speed, memory; always in a plain CSV too.

Everything is summed on the device and read by the host at the logging interval only.
"""

import csv
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.training.batch_format import size_of
from diffzoo.training.gpus import GIB, GPU, present_gpu
from diffzoo.training.guards import GradientGuard
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.planning import flops_per_image
from diffzoo.training.steps import StepCallback, callback_of, is_trial, loss_of

__all__ = ["CsvLog", "TrainingLog"]


class CsvLog(Logger):
    """`metrics.csv` of a run directory: one row per call, one column per quantity, `step` first.

    A resumed run goes on in the same file, without the rows of the steps that it repeats (`rewind`). Rows that do not
    fit on a full disk are lost; later ones are written again.

    Args:
        directory: where the file goes.
    """

    name = "csv"
    version = ""

    def __init__(self, directory: str | Path):
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._columns: list[str] = []
        self._whole = False  # whether the file ends with a row and has the columns `_columns`

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """The recipe is in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **{k: _short(float(v)) for k, v in metrics.items() if k not in ("step", "epoch")}}
        if len(row) > 1:
            write_or_warn(self.path, lambda: self._append(row))

    def _append(self, row: Mapping[str, float | None]) -> None:
        whole, self._whole = self._whole, False
        if not whole or not row.keys() <= set(self._columns):
            rows = _read(self.path)
            known = self._columns if whole else list(rows[0]) if rows else []
            self._columns = known + [k for k in row if k not in known]
            _write(self.path, self._columns, rows)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self._whole = True

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of steps after `step`, and a last line that a kill cut short."""
        rows = [r for r in _read(self.path) if (r.get("step") or "").isdigit() and int(r["step"]) <= step]
        self._columns, self._whole = list(rows[0]) if rows else [], False
        if rows:
            write_or_warn(self.path, lambda: _write(self.path, self._columns, rows))
        else:
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a table, without a last line that was cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _short(value: float) -> float | int:
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


class TrainingLog(StepCallback):
    """Logs the numbers of training to every logger of the run, and always to `metrics.csv`.

    train/loss                    mean over samples and processes since the last row
    train/loss_logsnr_A_B         the same for samples whose log-SNR lies in [A, B)
    train/gradient_norm           before clipping, of the last step (from `GradientGuard`)
    train/learning_rate           of the first parameter group
    train/skipped_steps           by `GradientGuard`, since the start of the run
    speed/images_seen             since the start of the run
    speed/images_per_second       over all processes, validation left out
    speed/mfu                     model FLOPs utilisation, on known GPUs
    speed/memory_gib              peak of this device since the last row

    Args:
        every_n_steps: interval in optimizer steps; default: the trainer's `log_every_n_steps`.
        logsnr_edges: borders of the noise-level bins; the outermost bins reach to infinity.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        logsnr_edges: tuple[float, ...] = (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0),
    ):
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if list(logsnr_edges) != sorted(set(logsnr_edges)):
            raise UserError(f"logsnr_edges must increase, got {list(logsnr_edges)}")
        self.every_n_steps, self.edges = every_n_steps, tuple(logsnr_edges)
        self.images_seen = 0
        self._gpu: GPU | None = None
        self._flops = 0.0
        self._sums: Tensor | None = None
        self._borders: Tensor | None = None  # `edges` on the device
        self._loaded: Tensor | None = None
        self._images = 0
        self._stamp = self._pause = 0.0

    @property
    def bins(self) -> list[str]:
        """Names of the noise-level bins, from the noisiest."""
        borders = ["min", *(f"{e:g}" for e in self.edges), "max"]
        return [f"train/loss_logsnr_{a}_{b}" for a, b in itertools.pairwise(borders)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not is_trial(trainer) and not any(isinstance(g, CsvLog) for g in trainer.loggers):
            trainer.loggers = [*trainer.loggers, CsvLog(trainer.default_root_dir)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, CsvLog):
                logger.rewind(self._step)
        self._gpu = present_gpu() if pl_module.device.type == "cuda" else None
        if self._gpu is not None:
            try:
                self._flops = 3 * flops_per_image(pl_module.network)  # type: ignore[arg-type]
            except Exception as error:  # a user's network that looks at values: no MFU, but the run goes on
                rank_zero_warn(f"the operations of this network cannot be counted ({error}): no MFU is logged")
        self._restart()
        if self._loaded is not None and trainer.is_global_zero:  # rank 0's sums were saved: they count once
            self._sums = self._loaded.to(pl_module.device)
        self._loaded = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stamp += time.perf_counter() - self._pause

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._take_in(pl_module, outputs, size_of(batch) * trainer.world_size)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        if self._step % (self.every_n_steps or max(1, getattr(trainer, "log_every_n_steps", 50))) == 0:
            values = self.collect(trainer, module)
            for logger in trainer.loggers:
                logger.log_metrics(values, self._step)

    @torch.no_grad()
    def _take_in(self, pl_module: LightningModule, outputs: object, images: int) -> None:
        self.images_seen += images
        self._images += images
        pair: tuple[Tensor, Tensor] | None = getattr(pl_module, "last_losses", None)
        logsnr, loss = pair or (None, loss_of(outputs))  # of a module that is not ours, the mean loss alone
        if loss is None:
            return
        if self._sums is None:
            self._sums = torch.zeros(2, len(self.edges) + 2, dtype=torch.float64, device=loss.device)
        each = loss.double().reshape(-1)
        add = torch.stack([each, torch.ones_like(each)])
        self._sums[:, -1] += add.sum(1)
        if logsnr is not None:
            if self._borders is None:
                self._borders = torch.tensor(self.edges, dtype=logsnr.dtype, device=logsnr.device)
            self._sums.index_add_(1, torch.bucketize(logsnr, self._borders, right=True), add)

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The values since the last call; every process must call it."""
        values: dict[str, float] = {}
        if self._sums is not None:
            total = trainer.strategy.reduce(self._sums, reduce_op="sum")
            assert isinstance(total, Tensor)
            for name, loss, count in zip([*self.bins, "train/loss"], *total.tolist(), strict=True):
                if count:
                    values[name] = loss / count
        guard = callback_of(trainer, GradientGuard)
        if guard is not None and guard.last_norm is not None:
            values["train/gradient_norm"] = float(guard.last_norm)
            values["train/skipped_steps"] = guard.skipped
        values["train/learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        rate = self._images / max(time.perf_counter() - self._stamp, 1e-9)
        values["speed/images_seen"], values["speed/images_per_second"] = self.images_seen, rate
        if self._gpu is not None:
            if self._flops:
                values["speed/mfu"] = rate * self._flops / (self._gpu.tflops * 1e12 * trainer.world_size)
            values["speed/memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / GIB
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._restart()
        return values

    def _restart(self) -> None:
        self._sums, self._images, self._stamp = None, 0, time.perf_counter()

    def state_dict(self) -> dict[str, object]:
        return {"images_seen": self.images_seen, "sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # with the sums since the last row, a resumed run logs the loss curve of an uninterrupted one
        self.images_seen, self._loaded = state_dict["images_seen"], state_dict["sums"]
