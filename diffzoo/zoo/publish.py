"""Our published form, and its way to the Hub and back.

    model.safetensors   weights in float32; the facts of `config.json` also in its header, under "diffzoo"
    adapter.safetensors in place of these: low-rank adapters, whose facts name the weights that they belong to
    config.json         family, config, process, class names, guidance, sampler, companions, licence, provenance
    recipe.yaml         the recipe of the training run, if there was one
    samples.png         a grid of pictures, if the run made one
    README.md           the model card

A folder in this form is uploaded as it is, so pull, push and pull again give the same bytes.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.files import atomic_path, write_text
from diffzoo.hub import explain_disk, explain_hub, gigabytes, hub_cache_dir, hub_endpoint, is_offline, offline_sentence
from diffzoo.models.base import Network
from diffzoo.process import GaussianProcess
from diffzoo.zoo.adapters import find_adapter, portable_base, read_adapter
from diffzoo.zoo.cache import sha256, to_json
from diffzoo.zoo.card import model_card
from diffzoo.zoo.facts import Facts, facts_of
from diffzoo.zoo.loading import locate

__all__ = ["Plan", "pull", "push_network", "push_to_hub", "save_pretrained", "stage"]

FORM = ("model.safetensors", "config.json", "recipe.yaml", "samples.png", "README.md")
FILES = ("adapter.safetensors", *FORM)


# -- writing


def write_weights(state: Mapping[str, Tensor], facts: Facts, path: Path) -> Path:
    """Write a safetensors file with the facts in its header, atomically; equal input gives equal bytes."""
    from safetensors.torch import save_file

    header = {"diffzoo": json.dumps(facts.to_dict(), sort_keys=True)}  # one key: safetensors does not keep an order
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    with explain_disk(path), atomic_path(path) as temporary:
        save_file(tensors, temporary, header)
    return path


def save_pretrained(
    network: Network,
    folder: str | Path,
    *,
    process: GaussianProcess | None = None,
    facts: Facts | None = None,
    **more: Any,
) -> Path:
    """Write a network to a folder as `model.safetensors` and `config.json`; `load_any(folder)` reads it back.

    Args:
        network: any network of the zoo.
        folder: made if needed.
        process: what it was trained with; default: that of the weights it was loaded from.
        facts: all facts at once; default: those of the weights it was loaded from.
        more: single fields of `Facts`, such as `class_names` or `licence`.
    """
    folder = Path(folder)
    known = facts or network.facts
    mine = facts_of(network, process)
    merged = replace(known, config=mine.config, process=mine.process or known.process) if known else mine
    merged = replace(merged, **{**more, "version": mine.version})
    write_weights(network.state_dict(), merged, folder / "model.safetensors")
    _write_text(folder / "config.json", to_json(merged.to_dict()))
    return folder


def _write_text(path: Path, text: str) -> None:
    with explain_disk(path):
        write_text(path, text)


# -- staging


@dataclass(frozen=True)
class Plan:
    """What a push uploads.

    Args:
        repo: `owner/name`.
        folder: where the files lie.
        files: names, in order.
        private, revision: of the repository.
        licence: of the weights.
        message: of the commit.
    """

    repo: str
    folder: Path
    files: tuple[str, ...]
    licence: str
    private: bool
    revision: str | None
    message: str

    def __str__(self) -> str:
        kind = "private" if self.private else "public"
        lines = [f"to {hub_endpoint()}/{self.repo} ({kind}, {self.revision or 'main'}), licence {self.licence}:"]
        for name in self.files:
            path = self.folder / name
            lines.append(f"  {name:<18} {gigabytes(path.stat().st_size):>12}  sha256 {sha256(path)}")
        return "\n".join(lines)


def _run_folder(source: Path) -> Path | None:
    """The run directory that a source belongs to."""
    for folder in (source, source.parent, source.parent.parent):
        if (folder / "checkpoints").is_dir():
            return folder
    return None


def _from_run(run: Path, folder: Path) -> None:
    """Copy the recipe and the newest pictures of a run."""
    recipe = next((run / n for n in ("config.yaml", "recipe.yaml") if (run / n).is_file()), None)
    if recipe:
        _write_text(folder / "recipe.yaml", recipe.read_text(encoding="utf-8"))
    pictures = sorted((run / "samples").glob("*.png"), key=lambda p: p.stat().st_mtime)
    if pictures:
        with explain_disk(folder / "samples.png"):
            shutil.copyfile(pictures[-1], folder / "samples.png")


def _evaluations(run: Path | None, given: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Results of `diffzoo eval`: those given, and those in the folder `eval` of the run."""
    results = []
    for path in [*map(Path, given), *(sorted(run.glob("eval/**/*.json")) if run else [])]:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if isinstance(data, dict) and "values" in data and "protocol" in data:
            results.append(data)
        elif path in map(Path, given):
            raise UserError(f"{path} is no result of `diffzoo eval`: give the JSON file that it names at its end")
    return results


@contextmanager
def stage(
    source: str | Path,
    repo: str,
    licence: str | None,
    *,
    prefer: str = "average",
    dataset: str | None = None,
    evaluations: Sequence[str | Path] = (),
    merge: bool = False,
) -> Iterator[tuple[Path, str]]:
    """The published form of a source in a folder, and its licence; the folder lasts as long as the block.

    Args:
        source, repo, licence, prefer, dataset, evaluations: as for `push_to_hub`.
        merge: low-rank adapters are merged into the weights they belong to.

    Raises:
        UserError: without a licence, or when it contradicts the one that a published folder states.
    """
    path = Path(str(source).removeprefix("local-dir:"))
    forms = ["model.safetensors"] if merge else ["model.safetensors", "adapter.safetensors"]
    if any((path / name).is_file() for name in forms) and (path / "config.json").is_file():
        stated = json.loads((path / "config.json").read_text(encoding="utf-8")).get("licence")
        if licence and stated and licence != stated:
            raise UserError(
                f"{path} states the licence {stated}, not {licence}: edit config.json and README.md to change it"
            )
        if stated and (path / "README.md").is_file():
            yield path, stated
            return
        licence = licence or stated
    if not licence:
        raise UserError(
            "a model needs a licence before it is published, and there is no default: give --licence, for example "
            "apache-2.0, cc-by-4.0, cc-by-nc-4.0, or a name of your own"
        )
    with tempfile.TemporaryDirectory(prefix="diffzoo-push-") as name:
        folder = Path(name)
        _fill(folder, source, repo, licence, prefer, dataset, evaluations, merge)
        yield folder, licence


def _fill(
    folder: Path,
    source: str | Path,
    repo: str,
    licence: str,
    prefer: str,
    dataset: str | None,
    evaluations: Sequence[str | Path],
    merge: bool,
) -> None:
    from diffzoo import __version__

    adapter = None if merge else find_adapter(source)
    if adapter is not None:
        state, known = read_adapter(*adapter, prefer)
        portable_base(known, str(source))
    else:
        weights = locate(source, prefer)
        state, known = dict(weights.state), weights.facts
    origin = {k: v for k, v in known.provenance.items() if k != "file"}  # a path means nothing elsewhere
    if Path(str(origin.get("base", ""))).exists():
        origin["base"] = "weights that were not published"
    run = _run_folder(Path(source)) if Path(source).exists() else None
    if run is not None:
        _from_run(run, folder)
    facts = replace(known, licence=licence, provenance=origin, version=__version__)
    write_weights(state, facts, folder / ("model.safetensors" if adapter is None else "adapter.safetensors"))
    _write_text(folder / "config.json", to_json(facts.to_dict()))
    card = model_card(facts, repo, folder, evaluations=_evaluations(run, evaluations), dataset=dataset)
    _write_text(folder / "README.md", card)


# -- the Hub


def _check_repo(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"expected a repository 'owner/name', got {repo!r}")


def push_to_hub(
    source: str | Path,
    repo: str,
    *,
    licence: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    prefer: str = "average",
    dataset: str | None = None,
    evaluations: Sequence[str | Path] = (),
    merge: bool = False,
) -> str:
    """Publish a run, a checkpoint or a folder on the Hub; returns the address of the commit, or the plan.

    Args:
        source: anything `load_any` reads.
        repo: `owner/name`, made if needed.
        licence: of the weights; required unless `source` is a folder that states one.
        private: make the repository private, if this makes it.
        revision: branch to commit to, made if needed; default main.
        message: of the commit.
        dry_run: upload nothing and return what would be, with sizes and hashes.
        prefer: which weights of a checkpoint: "average", "raw" or a label.
        dataset: what it was trained on, for the card; default: what the recipe says.
        evaluations: results of `diffzoo eval` for the card, besides those in the run's folder `eval`.
        merge: publish whole weights where the source holds low-rank adapters, which otherwise go alone.

    Raises:
        UserError: without a licence, and one sentence for whatever the Hub refuses.
    """
    _check_repo(repo)
    options: dict[str, Any] = {"prefer": prefer, "dataset": dataset, "evaluations": evaluations, "merge": merge}
    with stage(source, repo, licence, **options) as (folder, stated):
        files = tuple(n for n in FILES if (folder / n).is_file())
        plan = Plan(repo, folder, files, stated, private, revision, message or f"Upload {repo.split('/')[1]}")
        return str(plan) if dry_run else _upload(plan)


def push_network(network: Network, repo: str, *, licence: str | None = None, **options: Any) -> str:
    """`push_to_hub` for a network in memory; `process`, `class_names` and other facts may be given too.

    Args:
        network: any network of the zoo.
        repo: `owner/name`.
        licence: of the weights, required.
        options: those of `push_to_hub`; others go to `save_pretrained`.
    """
    upload = {
        k: options.pop(k)
        for k in ("private", "revision", "message", "dry_run", "dataset", "evaluations", "merge")
        if k in options
    }
    with tempfile.TemporaryDirectory(prefix="diffzoo-push-") as name:
        save_pretrained(network, name, **options)
        return push_to_hub(name, repo, licence=licence, **upload)


def _upload(plan: Plan) -> str:
    from huggingface_hub import HfApi

    if is_offline():
        raise UserError(offline_sentence(f"a connection to publish {plan.repo}"))
    api = HfApi(endpoint=hub_endpoint(), library_name="diffzoo")
    with explain_hub(plan.repo):
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        if plan.revision and plan.revision != "main":
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            allow_patterns=list(plan.files),
            revision=plan.revision,
            commit_message=plan.message,
        )
    return str(done.commit_url)


def pull(repo: str, folder: str | Path | None = None, revision: str | None = None) -> Path:
    """Fetch a model from the Hub.

    Args:
        repo: `owner/name`, with or without "hf-hub:" before and "@revision" behind.
        folder: where its files go; default: they stay in the Hub's cache.
        revision: branch, tag or commit.

    Returns:
        The folder, which `load_any` and `push` read.

    Raises:
        UserError: one sentence for whatever is missing or refused, and for a repository that is not in our form.
    """
    from huggingface_hub import snapshot_download

    repo, _, given = repo.removeprefix("hf-hub:").partition("@")
    _check_repo(repo)
    with explain_hub(repo):
        snapshot = Path(
            snapshot_download(
                repo,
                revision=revision or given or None,
                cache_dir=hub_cache_dir(),
                endpoint=hub_endpoint(),
                local_files_only=is_offline(),
                library_name="diffzoo",
                allow_patterns=[*FILES, "model-*.safetensors", "model.safetensors.index.json"],
            )
        )
    if not (snapshot / "config.json").is_file():
        raise UserError(f"{repo} is not a model of diffzoo: it has no config.json")
    Facts.from_dict(json.loads((snapshot / "config.json").read_text(encoding="utf-8")), f"{repo}/config.json")
    return snapshot if folder is None else _copy_out(snapshot, Path(folder))


def _copy_out(snapshot: Path, folder: Path) -> Path:
    for source in sorted(p for p in snapshot.iterdir() if p.is_file()):
        target = folder / source.name
        if target.exists() and _digest(target) != _digest(source):
            raise UserError(f"{target} exists and differs: choose an empty folder")
        with explain_disk(target), atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
