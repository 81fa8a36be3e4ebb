"""The model card of a published model, from what is known about it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffzoo.zoo.metadata import Metadata

__all__ = ["model_card"]

# licences that the Hub knows by an identifier; any other is "other" with a name
KNOWN = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"}
    | {"cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"}
    | {"openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"}
)

TEMPLATE = """\
---
{front}
---

# {title}

{summary}
{picture}
## How to use

```python
import diffzoo

pipe = diffzoo.pipeline("hf-hub:{repo}")
images = pipe({prompt}seeds=range(8))
images.save_png("pictures")
```

The network alone: `diffzoo.create_model("hf-hub:{repo}")`. From the command line:
`diffzoo sample hf-hub:{repo} --seeds 0-7 --out grid.png`.

## Process

{process}

## Training data

{data}

## Evaluation

{evaluation}

## Licence

The weights: {licence}.

## Provenance

```json
{provenance}
```
"""


def model_card(
    metadata: Metadata,
    repo: str,
    folder: Path,
    evaluations: Sequence[dict[str, Any]] = (),
    dataset: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        facts: with a licence.
        repo: where it will lie, `owner/name`.
        folder: of the published form, for its recipe and its pictures.
        evaluations: results of `diffzoo eval` as data.
        dataset: what it was trained on; default: what the recipe says.
    """
    return TEMPLATE.format(
        front=_front(metadata),
        title=repo.split("/")[1],
        repo=repo,
        summary=_summary(metadata),
        picture="\n![Pictures drawn by this model](samples.png)\n" if (folder / "samples.png").is_file() else "",
        prompt=_prompt(metadata),
        process=_process(metadata),
        data=dataset or _recipe_data(folder / "recipe.yaml") or "Not stated.",
        evaluation=_evaluation(evaluations),
        licence=metadata.licence,
        provenance=json.dumps(metadata.provenance, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _front(metadata: Metadata) -> str:
    import yaml

    licence = str(metadata.licence)
    front: dict[str, Any] = {"library_name": "diffzoo", "tags": ["diffzoo", "diffusion", metadata.family.lower()]}
    front["pipeline_tag"] = "text-to-image" if metadata.text_encoder else "unconditional-image-generation"
    if licence.lower() in KNOWN:
        front["license"] = licence.lower()
    else:
        front |= {"license": "other", "license_name": licence}
    return str(yaml.safe_dump(front, sort_keys=True, allow_unicode=True)).strip()


def _summary(metadata: Metadata) -> str:
    size, classes = metadata.config.get("image_size"), metadata.config.get("num_classes")
    space = "latents" if metadata.autoencoder else "pixels"
    kind = f"{classes} classes" if classes else ("captions" if metadata.text_encoder else "unconditional")
    name = f" `{metadata.name}`" if metadata.name else ""
    return f"A {metadata.family}{name} of diffzoo: {size}x{size} {space}, {kind}."


def _prompt(metadata: Metadata) -> str:
    if not metadata.config.get("num_classes"):
        return ""
    if isinstance(metadata.class_names, tuple) and metadata.class_names:
        return f"[{metadata.class_names[0]!r}], "
    return '["golden retriever", 207], ' if metadata.class_names == "imagenet-1k" else "[0], "


def _process(metadata: Metadata) -> str:
    lines = []
    for name, part in (("Process", metadata.process), ("Sampler", metadata.sampler), ("Guidance", metadata.guidance),
                       ("Autoencoder", metadata.autoencoder)):  # fmt: skip
        if part:
            lines.append(f"- {name}: `{json.dumps(part, sort_keys=True, ensure_ascii=False)}`")
    return "\n".join(lines) or "Not stated."


def _recipe_data(path: Path) -> str | None:
    import yaml

    if not path.is_file():
        return None
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if not data:
        return None
    return f"As in `recipe.yaml`:\n\n```yaml\n{yaml.safe_dump(data, sort_keys=False).strip()}\n```"


def _evaluation(records: Sequence[dict[str, Any]]) -> str:
    """A row per metric, with its error, the protocol and how the images were drawn."""
    rows = []
    for record in records:
        protocol, plan = record["protocol"], record.get("plan") or {}
        name = f"{protocol.get('name')}, {protocol.get('n')} images against {protocol.get('reference')}"
        drawn = ", ".join(
            part
            for part in (
                f"{(plan.get('sampler') or {}).get('class')}, {plan.get('steps')} steps" if plan.get("steps") else "",
                f"guidance {json.dumps(plan['guidance'], sort_keys=True)}" if plan.get("guidance") else "",
            )
            if part
        )
        digest = str(record.get("protocol_sha256", ""))[:16]
        rows += [
            f"| {metric} | {_number(value)} | {name} (`{digest}`) | {drawn} |"
            for metric, value in record["values"].items()
        ]
    head = ["| metric | value | protocol | drawn with |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else "Not evaluated."


def _number(value: dict[str, Any]) -> str:
    error = value.get("standard_error")
    return f"{value['value']:.5g}" + (f" ± {error:.2g}" if error is not None else "")
