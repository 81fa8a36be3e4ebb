"""The record of an evaluation, and the comparison of two."""

import html
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffzoo.errors import UserError
from diffzoo.evaluation.image_files import ImagesPlan
from diffzoo.evaluation.measure import Value
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.files import write_text
from diffzoo.generation.plan import SamplePlan
from diffzoo.record import canonical_json, differences, digest

__all__ = ["Result", "compare", "software_versions"]

FORMAT = "diffzoo.eval/1"
PACKAGES = ("diffzoo", "torch", "numpy", "torch-fidelity", "timm", "transformers", "diffusers")


def software_versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device | str) -> str:
    """The device in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return f"{platform.machine()} CPU"


@dataclass(frozen=True)
class Result:
    """Plan, protocol, values and circumstances of one evaluation.

    `values` depends on plan, protocol, software and device alone; `timing` and `date` on the day.

    Args:
        plan: how the images were made, with hashes.
        protocol: how they were measured, with hashes.
        values: by metric.
        remarks: what a reader should know, such as a covariance that is singular.
        software: versions.
        device: in words.
        timing: seconds by phase, and images made in this run (the others were there).
        date: ISO 8601, UTC.
    """

    plan: SamplePlan | ImagesPlan
    protocol: EvalProtocol
    values: Mapping[str, Value]
    remarks: Sequence[str] = ()
    software: Mapping[str, str] = field(default_factory=software_versions)
    device: str = ""
    timing: Mapping[str, float] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_dict(self) -> dict[str, object]:
        """As JSON-ready data."""
        return {
            "format": FORMAT,
            "plan": self.plan.to_dict(),
            "plan_sha256": self.plan.sha256,
            "protocol": self.protocol.to_dict(),
            "protocol_sha256": self.protocol.sha256,
            "values": {name: value.to_dict() for name, value in self.values.items()},
            "remarks": list(self.remarks),
            "software": dict(self.software),
            "device": self.device,
            "timing": dict(self.timing),
            "date": self.date,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the result") -> "Result":
        """The inverse of `to_dict`.

        Raises:
            UserError: if it is no result, or its hashes do not fit its content: it was edited.
        """
        if data.get("format") != FORMAT:
            raise UserError(f"{where} is no result of `diffzoo eval`: expected format {FORMAT!r}")
        try:
            of_images = "images" in data["plan"]
            plan = (ImagesPlan if of_images else SamplePlan).from_dict(data["plan"])
            protocol = EvalProtocol.from_dict(data["protocol"])
            # of what was written: names of fields may have changed since
            edited = [n for n in ("plan", "protocol") if digest(data[n]) != data[f"{n}_sha256"]]
            values = {name: Value(**value) for name, value in data["values"].items()}
            rest = {k: data[k] for k in ("remarks", "software", "device", "timing", "date")}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is no whole result of `diffzoo eval`: {error} is missing or wrong") from error
        if edited:
            raise UserError(f"{where}: the hash of its {edited[0]} does not fit its content: it was changed by hand")
        return cls(plan, protocol, values, **rest)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON, and beside it the Hub's form, `.eval_results/<same name>.yaml`."""
        import yaml

        path = write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        hub = yaml.safe_dump(self.eval_results(), sort_keys=False, allow_unicode=True)
        write_text(path.parent / ".eval_results" / f"{path.stem}.yaml", hub)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Result":
        """Read what `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"could not read the result {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is no result of `diffzoo eval`: it is not JSON") from error
        if not isinstance(data, dict):
            raise UserError(f"{path} is no result of `diffzoo eval`: expected a JSON object")
        return cls.from_dict(data, str(path))

    def eval_results(self) -> list[dict[str, object]]:
        """Entries for the Hub's `.eval_results/*.yaml`: one per metric, with hashes and error in the notes."""
        protocol = self.protocol
        entries = []
        for name, value in self.values.items():
            error = f"; standard error {value.standard_error:.4g}" if value.standard_error is not None else ""
            notes = f"{name}, n = {protocol.n}{error}; protocol {protocol.sha256}, plan {self.plan.sha256}"
            dataset = {"id": protocol.reference, "task_id": f"{protocol.name}/{name}"}
            entries.append({"dataset": dataset, "value": value.value, "date": self.date, "notes": notes})
        return entries

    def table(self) -> str:
        """The values as readable text."""
        width = max(len(name) for name in self.values)
        lines = []
        for name, value in self.values.items():
            error = f" ± {value.standard_error:.3g}  ({value.method})" if value.standard_error is not None else ""
            lines.append(f"{name:<{width}}  {value.value:.6g}{error}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The values as notebooks show them."""
        rows = []
        for name, value in self.values.items():
            error = f" ± {value.standard_error:.3g}" if value.standard_error is not None else ""
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{value.value:.6g}{error}</td></tr>")
        title = html.escape(f"{self.protocol.name}, {self.protocol.n:,} images")
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self.remarks)
        return f"<table><caption>{title}</caption>{''.join(rows)}</table>{remarks}"

    def same_numbers(self) -> str:
        """Canonical JSON of all that must be equal for equal plans: everything but timing and date."""
        return canonical_json({k: v for k, v in self.to_dict().items() if k not in ("timing", "date")})


def compare(a: Result, b: Result, names: tuple[str, str] = ("A", "B")) -> str:
    """A table of two results of one protocol; the reference counts by its content, not by the name of its file.

    Raises:
        UserError: if the protocols differ; the message says in which fields.
    """
    other = b.protocol
    if other.reference_sha256 is not None and other.reference_sha256 == a.protocol.reference_sha256:
        other = replace(other, reference=a.protocol.reference)
    if a.protocol.sha256 != other.sha256:
        found = differences(a.protocol.to_dict(), other.to_dict())
        listed = "; ".join(f"{field}: {x!r} and {y!r}" for field, (x, y) in found.items())
        raise UserError(
            f"the results of {names[0]} and {names[1]} cannot be compared, their protocols differ in {listed}"
        )
    width = max(len(name) for name in a.values)
    lines = [f"protocol {a.protocol.name}, n = {a.protocol.n}, {a.protocol.sha256[:16]}"]
    plan = differences(a.plan.to_dict(), b.plan.to_dict())
    lines += [f"plans differ in {field}: {x!r} and {y!r}" for field, (x, y) in plan.items()] or ["plans are equal"]
    versions = differences(dict(a.software), dict(b.software))
    lines += [f"versions differ in {field}: {x} and {y}" for field, (x, y) in versions.items()]
    for name, first in a.values.items():
        second = b.values[name]
        errors = [v.standard_error for v in (first, second) if v.standard_error is not None]
        gap = second.value - first.value
        error = math.sqrt(sum(e * e for e in errors)) if len(errors) == 2 else None
        shown = f"{gap:+.6g}" + (f" ± {error:.3g}" if error is not None else "")
        lines.append(f"{name:<{width}}  {first.value:.6g}  {second.value:.6g}  {shown}")
    return "\n".join(lines)
