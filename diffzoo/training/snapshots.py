"""Snapshots of power-function EMAs: one safetensors file for each width and time, in the folder `averages` of a run.

`EMA` writes them. `reconstruction.py` makes EMAs of other widths from them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.tensors import write_tensors

__all__ = ["Snapshot", "list_snapshots", "set_aside", "snapshot_file", "write_snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its file, the number of updates it has seen, its relative width and the optimizer step."""

    path: Path
    updates: int
    std: float
    step: int


def list_snapshots(folder: str | Path) -> list[Snapshot]:
    """The power-function snapshots in a folder, or in its subfolder `averages`, by time and width.

    Raises:
        UserError: if there are none.
    """
    from safetensors import SafetensorError, safe_open

    given = Path(folder)
    place = given / "averages" if (given / "averages").is_dir() else given
    found = []
    for path in sorted(place.glob("step_*_power_*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            found.append(Snapshot(path, int(metadata["updates"]), float(metadata["std"]), int(metadata["step"])))
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged or no snapshot of an average ({error}): move it away") from error
    foreign = [p for p in place.glob("*.pt") if re.fullmatch(r"\d+\.\d+", p.stem)]
    if foreign and not found:
        raise UserError(
            f"{place} holds snapshots of ema-pytorch, such as {foreign[0].name}: reconstruct with its PostHocEMA. By "
            "default it averages every 100th step: a width of 0.05 then has its centre at 0.15 of the run, not at 0.95"
        )
    if not found:
        raise UserError(
            f"no snapshots of averages in {place}: train with the callback EMA and "
            "`stds: [0.05, 0.1]`, which writes them"
        )
    return sorted(found, key=lambda s: (s.updates, s.std))


def snapshot_file(folder: Path, label: str, step: int) -> Path:
    """Where the EMA `label`, such as "power_0.050", lies at an optimizer step."""
    return folder / f"step_{step:08d}_{label}.safetensors"


def write_snapshot(snapshot: Snapshot, label: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the file of a snapshot, with the tensors by name."""
    about = {"label": label, "std": snapshot.std, "updates": snapshot.updates, "step": snapshot.step}
    write_tensors(snapshot.path, tensors, {"format": "pt", **{k: str(v) for k, v in about.items()}})


def set_aside(folder: Path, step: int) -> int:
    """Move away the snapshots of later steps, which an earlier attempt at this run wrote; returns how many."""
    late = [p for p in folder.glob("step_*_power_*.safetensors") if int(p.name.split("_")[1]) > step]
    for path in late:
        (folder / "stale").mkdir(exist_ok=True)
        path.replace(folder / "stale" / path.name)
    return len(late)
