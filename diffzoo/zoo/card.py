"""The model card of a published model, from what is known about it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffzoo.hub import hub_place
from diffzoo.record import to_plain
from diffzoo.zoo.licences import licence_id
from diffzoo.zoo.metadata import Base, Metadata, Provenance, foreign_modules

__all__ = ["model_card"]

TEMPLATE = """\
---
{front}
---

# {title}

{summary}{base}
{image}
## How to use

```python
import diffzoo

pipe = diffzoo.pipeline("hf-hub:{repo}")
images = pipe({prompt}seeds=range(8))
images.save_png("images")
```

The network alone: `diffzoo.create_model("hf-hub:{repo}")`. From the command line:
`diffzoo sample hf-hub:{repo} --seeds 0-7 --out grid.png`.

## Process

{process}

## Training

{training}

## Training data

{data}

## Evaluation

{evaluation}

## Licence

{licence}

## Provenance

```json
{provenance}
```
"""


def model_card(
    metadata: Metadata, repo: str, folder: Path, evaluations: Sequence[dict[str, Any]] = (), dataset: str | None = None
) -> str:
    """The text of README.md.

    Args:
        metadata: with a licence.
        repo: where it will lie, `owner/name`.
        folder: of the published form, for its recipe and its images.
        evaluations: results of `diffzoo eval` as data.
        dataset: what it was trained on; default: what the recipe says.
    """
    return TEMPLATE.format(
        front=_front(metadata),
        title=repo.split("/")[1],
        repo=repo,
        summary=_summary(metadata),
        base=_base(metadata.provenance.base),
        image=_image(folder / "samples.png", repo),
        prompt=_prompt(metadata),
        process=_process(metadata),
        training=_training(metadata.provenance, folder),
        data=dataset or _recipe_data(folder / "recipe.yaml") or "Not stated.",
        evaluation=_evaluation(evaluations),
        licence=_licence(metadata),
        provenance=json.dumps(to_plain(metadata.provenance, sparse=True), indent=2, sort_keys=True, ensure_ascii=False),
    )


def _image(path: Path, repo: str) -> str:
    """The preview, and the command that makes it again."""
    from PIL import Image

    if not path.is_file():
        return ""
    with Image.open(path) as opened:
        made = json.loads(opened.info.get("diffzoo", "{}"))
    lines = ["", "![Images sampled from this model](samples.png)", ""]
    if made.get("options"):
        command = shlex.join(["diffzoo", "sample", f"hf-hub:{repo}", *made["options"]])
        lines += [
            f"Sampled at step {made['step']:,} of training, as this command does:",
            "",
            f"```bash\n{command}\n```",
            "",
        ]
    return "\n".join(lines)


def _training(known: Provenance, folder: Path) -> str:
    """What trained the weights, and which of a run they are."""
    lines = ["`diffzoo fit -c recipe.yaml`, with the recipe in this repository."] * (folder / "recipe.yaml").is_file()
    if known.global_step is not None:
        lines.append(f"Weights: {known.weights or 'raw'}, at step {known.global_step:,}.")
    return " ".join(lines) or "Not stated."


def _front(metadata: Metadata) -> str:
    import yaml

    licence, family = str(metadata.licence), metadata.network.__name__.lower()
    front: dict[str, object] = {"library_name": "diffzoo", "tags": ["diffzoo", "diffusion", family]}
    front["pipeline_tag"] = "text-to-image" if metadata.text_encoder else "unconditional-image-generation"
    base = metadata.provenance.base
    place = hub_place(base.source or "") if base is not None else None
    if place is not None:
        front["base_model"] = place.repo
    if (known := licence_id(licence)) is not None:
        front["license"] = known
    else:
        front |= {"license": "other", "license_name": licence}
    return str(yaml.safe_dump(front, sort_keys=True, allow_unicode=True)).strip()


def _summary(metadata: Metadata) -> str:
    (height, width), classes = metadata.config.sides, metadata.config.num_classes
    space = "latents" if metadata.autoencoder else "pixels"
    kind = f"{classes} classes" if classes else ("captions" if metadata.text_encoder else "unconditional")
    name = f" `{metadata.name}`" if metadata.name else ""
    text = f"A {metadata.network.__name__}{name} of diffzoo: {height}x{width} {space}, {kind}."
    needed = foreign_modules(metadata)
    if needed:
        text += f" To load it, these modules must be importable: {', '.join(f'`{name}`' for name in needed)}."
    return text


def _name(base: Base) -> str:
    if base.source is not None:
        return f"`{base.source}`"
    return f"weights of `{base.name}` that were not published" if base.name else "weights that were not published"


def _base(base: Base | None) -> str:
    """The weights that training began from, back to the first."""
    if base is None:
        return ""
    earlier = base.provenance.base
    return f" Trained from {_name(base)}" + (f", which were{_base(earlier).lower()}" if earlier is not None else ".")


def _licence(metadata: Metadata) -> str:
    lines, base = [f"Licence of the weights: {metadata.licence}."], metadata.provenance.base
    while base is not None:
        if base.licence:
            lines.append(f"Those that training began from, {_name(base)}: {base.licence}.")
        base = base.provenance.base
    return "\n".join(lines)


def _prompt(metadata: Metadata) -> str:
    if not metadata.config.num_classes:
        return ""
    if isinstance(metadata.class_names, tuple) and metadata.class_names:
        return f"[{metadata.class_names[0]!r}], "
    return '["golden retriever", 207], ' if metadata.class_names == "imagenet-1k" else "[0], "


def _process(metadata: Metadata) -> str:
    parts = {"Process": metadata.process, "Sampler": metadata.sampler, "Guidance": metadata.guidance,
             "Autoencoder": metadata.autoencoder, "Text encoder": metadata.text_encoder}  # fmt: skip
    lines = [
        f"- {name}: `{json.dumps(to_plain(part, sparse=True), sort_keys=True, ensure_ascii=False)}`"
        for name, part in parts.items()
        if part is not None
    ]
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
    """A row per metric, with its error, the protocol, the reference and how the images were sampled."""
    rows: dict[str, None] = {}  # a result may lie in several files
    for record in records:
        protocol, plan = record["protocol"], record.get("plan") or {}
        reference = f"{protocol.get('reference')} (`{str(protocol.get('reference_sha256'))[:16]}`)"
        name = f"{protocol.get('name')} (`{str(record.get('protocol_sha256', ''))[:16]}`)"
        sampler = plan.get("sampler") or {}
        steps = plan.get("steps", sampler.get("steps"))  # beside the sampler in results of version 0.1
        sampled = [f"{str(sampler.get('class')).rpartition('.')[2]}, {steps} steps"] if steps else []
        if plan.get("guidance"):
            stated = {k: v for k, v in plan["guidance"].items() if v is not None and (k, v) != ("rescale", 0.0)}
            sampled.append(f"guidance {json.dumps(stated, sort_keys=True)}")
        for metric, value in record["values"].items():
            what = f"{name}, {protocol.get('n')} images against {reference}"
            rows[f"| {metric} | {_number(value)} | {what} | {', '.join(sampled)} |"] = None
    head = ["| metric | value | protocol | sampled with |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else "Not evaluated."


def _number(value: dict[str, Any]) -> str:
    error = value.get("standard_error")
    return f"{value['value']:.5g}" + (f" ± {error:.2g}" if error is not None else "")
