"""A run, or several, as one HTML file that opens offline: recipe, curves, loss by noise level, samples, evaluations.

It reads what a run directory holds and writes nothing into it but the report, so it may be made while the run goes on:
a last line of `metrics.csv` that is not whole yet is left out.
"""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RunRecord", "read_run", "write_report"]

POINTS = 400  # of a curve: longer ones are averaged over neighbours
IMAGE_BYTES = 4_500_000  # of all sample grids together; base64 makes a third more of them
NOISE_LEVEL = "train/loss_logsnr_"


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Args:
        folder: of the run.
        columns: of metrics.csv by name: pairs of step and value, in order.
        recipe: config.yaml with one entry for each value, by dotted key.
        grids: previews, oldest first.
        evaluations: results of `diffzoo eval` that lie in the run.
        starts: step, time and environment of each start.
        memorisation: the sheet of nearest training images, if there is one.
    """

    folder: Path
    columns: Mapping[str, Sequence[tuple[int, float]]]
    recipe: Mapping[str, str]
    grids: Sequence[Path] = ()
    evaluations: Sequence[Mapping[str, object]] = ()
    memorisation: Path | None = None
    starts: Sequence[Mapping[str, object]] = ()

    @property
    def resumed(self) -> list[int]:
        """Steps at which the run went on."""
        return [int(str(start["step"])) for start in self.starts if start["step"]]


def read_run(folder: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: if it is not the directory of a run, or has logged nothing yet.
    """
    places = Run(folder)
    if not places.config.is_file():
        raise UserError(f"{folder} is not the directory of a run: it holds no config.yaml")
    if not places.metrics.is_file():
        raise UserError(f"{folder} has logged nothing yet: its first row comes after trainer.log_every_n_steps steps")
    import yaml

    columns = _columns(places.metrics.read_text(encoding="utf-8"))
    sheet = folder / "memorisation.png"
    return RunRecord(
        folder=folder,
        columns=columns,
        recipe=dict(_flat(yaml.safe_load(places.config.read_text(encoding="utf-8")) or {})),
        grids=sorted(places.samples.glob("*.png"), key=lambda path: (path.stem == "final", path.stem)),
        evaluations=_evaluations(folder),
        memorisation=sheet if sheet.is_file() else None,
        starts=_starts(places.starts),
    )


def _starts(path: Path) -> list[dict[str, object]]:
    """One for each whole line; runs of earlier versions have none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _columns(text: str) -> dict[str, list[tuple[int, float]]]:
    whole = text[: text.rfind("\n") + 1]
    found: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(io.StringIO(whole)):
        for name, value in row.items():
            if name != "step" and value and (row["step"] or "").isdigit():
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def _flat(data: object, key: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys; lists are one value."""
    if isinstance(data, Mapping) and data:
        return [pair for name, value in data.items() for pair in _flat(value, f"{key}.{name}" if key else str(name))]
    return [(key, json.dumps(data, ensure_ascii=False, default=str))]


def _evaluations(folder: Path) -> list[dict[str, object]]:
    found = []
    for path in sorted(folder.glob("eval*/**/*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # being written
            continue
        if isinstance(data, dict) and "values" in data and "protocol" in data:
            found.append(data)
    return found


# -- plots


def _thin(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, neighbours averaged where there are more than `POINTS`."""
    group = -(-len(points) // POINTS)
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return [sum(s for s, _ in p) / len(p) for p in parts], [sum(v for _, v in p) / len(p) for p in parts]


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    drawn = text.getvalue()
    return f"<div class=plot>{drawn[drawn.index('<svg') :]}</div>"


def _axes(title: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure  # not pyplot, which would take the caller's windows and notebooks
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer steps", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return figure, axes


def _curves(runs: Sequence[RunRecord], title: str, names: Sequence[str], log: bool = False) -> str:
    """One plot of some columns of all runs; nothing where no run has them."""
    drawn = [(run, name) for name in names for run in runs if name in run.columns]
    if not drawn:
        return ""
    figure, axes = _axes(title)
    for run, name in drawn:
        points, several = run.columns[name], len(runs) > 1
        label = f"{run.folder.name}, {name}" if several else name
        color = f"C{runs.index(run) if several else names.index(name)}"
        style = "--" if name.startswith("val/") else "-"
        marker = "." if len(points) < 3 else ""
        axes.plot(*_thin(points), label=label, color=color, linestyle=style, linewidth=1.2, marker=marker)
    for run in runs:
        for step in run.resumed:
            axes.axvline(step, color="gray", linestyle=":", linewidth=0.8)
    if log:
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks("{x:g}")
    if len(drawn) > 1:
        axes.legend(fontsize=7)
    return _svg(figure)


def _heat_map(run: RunRecord) -> str:
    """Loss by noise level over time, each level relative to its own first row."""
    levels = [name for name in run.columns if name.startswith(NOISE_LEVEL)]
    steps = sorted({step for name in levels for step, _ in run.columns[name]})
    if not levels or len(steps) < 2:
        return ""
    import numpy as np

    grid = np.full((len(levels), len(steps)), np.nan)
    place = {step: k for k, step in enumerate(steps)}
    for i, name in enumerate(levels):
        for step, value in run.columns[name]:
            grid[i, place[step]] = value / run.columns[name][0][1] if run.columns[name][0][1] else np.nan
    figure, axes = _axes(f"loss by noise level, relative to its first row ({run.folder.name})")
    axes.grid(visible=False)
    drawn = axes.pcolormesh(steps, range(len(levels)), grid, shading="nearest", rasterized=True)
    axes.set_yticks(range(len(levels)), [n.removeprefix(NOISE_LEVEL).replace("_", " to ") for n in levels], fontsize=7)
    axes.set_ylabel("log-SNR", fontsize=8)
    figure.colorbar(drawn, ax=axes)
    return _svg(figure)


# -- the page

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ border: 1px solid #ddd; padding: .2rem .5rem; text-align: left }}
.plot svg {{ width: 100%; height: auto }}
.grid {{ margin: 0 }} .grid img {{ max-width: 100% }} .grid input {{ width: 50% }}
code, td {{ overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
{body}
<script>
document.querySelectorAll("figure.grid").forEach(f => {{
  const frames = f.querySelectorAll("img"), slider = f.querySelector("input"), caption = f.querySelector("output");
  const show = () => frames.forEach((g, i) => {{ if (!(g.hidden = i != slider.value)) caption.value = g.title; }});
  if (slider) {{ slider.oninput = show; show(); }}
}});
</script>
</html>
"""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of some runs to `out`; returns it.

    Raises:
        UserError: for a folder that is no run.
    """
    runs = [read_run(folder) for folder in folders]
    title = ", ".join(str(run.folder) for run in runs)
    parts = [
        _overview(runs),
        "<h2>Curves</h2>",
        _curves(runs, "loss", ["train/loss", "val/loss"], log=True),
        *(_heat_map(run) for run in runs),
        _curves(runs, "gradient norm", ["train/gradient_norm"], log=True),
        _curves(runs, "images per second", ["speed/images_per_second"]),
        _curves(runs, "memory, GiB", ["speed/memory_gib"]),
        *(_samples(run, IMAGE_BYTES // len(runs)) for run in runs),
        _evaluated(runs),
        *(_memorised(run) for run in runs),
        _recipe(runs),
        *(_environment(run) for run in runs),
    ]
    write_text(out, _PAGE.format(title=html.escape(title), body="\n".join(filter(None, parts))))
    return out


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["<tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)]
    cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
    return "<table>" + "\n".join(cells) + "</table>"


def _overview(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        last = {name: points[-1][1] for name, points in run.columns.items()}
        step = max((points[-1][0] for points in run.columns.values()), default=0)
        shown = [f"{last[name]:.5g}" if name in last else "–" for name in ("train/loss", "val/loss")]
        seen = f"{int(last['speed/images_seen']):,}" if "speed/images_seen" in last else "–"
        rows.append([str(run.folder), f"{step:,}", seen, *shown, ", ".join(f"{s:,}" for s in run.resumed) or "never"])
    return _table(["run", "step", "images seen", "loss", "held-out loss", "resumed at"], rows)


def _data_url(path: Path, most: int) -> str:
    """An image inside the page; one of more than `most` bytes is made smaller and kept with losses."""
    data, kind = path.read_bytes(), "png"
    if len(data) > most:
        from PIL import Image

        file = io.BytesIO()
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((2048, 2048))
        small.save(file, "WEBP", quality=80)
        data, kind = file.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _samples(run: RunRecord, budget: int) -> str:
    """The previews behind a slider, as many, evenly spread, as fit into `budget` bytes."""
    grids = list(run.grids)
    while len(grids) > 1 and sum(path.stat().st_size for path in grids) > budget:
        grids = grids[::-2][::-1]  # every second, the last among them
    if not grids:
        return ""
    images = "".join(
        f'<img src="{_data_url(path, budget)}" alt="{html.escape(path.stem)}" title="{html.escape(path.stem)}"'
        f"{' hidden' if k + 1 < len(grids) else ''}>"
        for k, path in enumerate(grids)
    )
    last = len(grids) - 1
    slider = f'<input type="range" max="{last}" value="{last}"><output></output><br>' if last else ""
    return f"<h2>Samples of {html.escape(str(run.folder))}</h2><figure class=grid>{slider}{images}</figure>"


def _evaluated(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        for result in run.evaluations:
            protocol, values = result["protocol"], result["values"]
            assert isinstance(protocol, Mapping)
            assert isinstance(values, Mapping)
            for name, value in values.items():
                number = value.get("value") if isinstance(value, Mapping) else value
                rows.append([run.folder.name, str(protocol.get("name")), str(protocol.get("n")), name, f"{number:.6g}"])
    return "<h2>Evaluations</h2>" + _table(["run", "protocol", "images", "metric", "value"], rows) if rows else ""


def _memorised(run: RunRecord) -> str:
    if run.memorisation is None:
        return ""
    title, source = html.escape(str(run.folder)), _data_url(run.memorisation, IMAGE_BYTES // 9)
    return (
        f"<h2>Nearest training images of {title}</h2>"
        f'<figure class=grid><img src="{source}" alt="samples and nearest images"></figure>'
    )


def _environment(run: RunRecord) -> str:
    """On what the run was started, a column for each start."""
    if not run.starts:
        return ""
    places = {key: None for start in run.starts for key in start if key not in ("step", "time")}
    rows = [[key, *(str(start.get(key, "–")) for start in run.starts)] for key in places]
    head = ["", *(f"step {start['step']}, {start['time']}" for start in run.starts)]
    table = _table(head, rows)
    return (
        f"<h2>Environment of {html.escape(str(run.folder))}</h2><details><summary>Versions</summary>{table}</details>"
    )


def _recipe(runs: Sequence[RunRecord]) -> str:
    """The recipe; of several runs first what differs."""
    keys = list(dict.fromkeys(key for run in runs for key in run.recipe))
    different = [key for key in keys if len({run.recipe.get(key) for run in runs}) > 1]
    head = ["setting", *(run.folder.name for run in runs)]
    parts = ["<h2>Recipe</h2>"]
    if different:
        rows = [[key, *(run.recipe.get(key, "–") for run in runs)] for key in different]
        parts += ["<p>What differs:</p>", _table(head, rows)]
    rows = [[key, runs[0].recipe[key]] for key in keys if key not in different and key in runs[0].recipe]
    return "".join(
        [*parts, "<details><summary>All settings</summary>", _table(["setting", "value"], rows), "</details>"]
    )
