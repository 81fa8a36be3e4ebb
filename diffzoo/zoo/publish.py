"""Our published form, and its way to the Hub and back.

    model.safetensors   weights in float32; the facts of `config.json` also in its header, under "diffzoo"
    adapter.safetensors in place of these: low-rank adapters, whose facts name the weights that they belong to
    model.safetensors.index.json and the shards it names, in place of these: read and passed on, never written
    config.json         family, config, process, class names, guidance, sampler, companions, licence, provenance
    recipe.yaml         the recipe of the training run, if there was one
    samples.png         a grid of pictures, if the run made one
    README.md           the model card

A folder in this form is uploaded as it is, so pull, push and pull again give the same bytes. Other files in it stay
where they are.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffzoo.cache import explain_disk, gigabytes, hub_cache_dir
from diffzoo.errors import UserError
from diffzoo.files import atomic_path, sha256, to_json, write_text
from diffzoo.hub import check_repo, explain_hub, hub_endpoint, hub_file, is_offline, offline_error
from diffzoo.models.base import Network
from diffzoo.process import GaussianProcess
from diffzoo.tensors import write_tensors
from diffzoo.zoo.adapters import find_adapter, portable_base, read_adapter
from diffzoo.zoo.card import model_card
from diffzoo.zoo.formats import INDEX, weight_map
from diffzoo.zoo.loading import json_metadata, locate
from diffzoo.zoo.manifest import checkpoint, has_checkpoint
from diffzoo.zoo.metadata import Metadata, metadata_of

__all__ = ["Plan", "pull", "push_network", "push_to_hub", "save_pretrained", "stage"]

WEIGHTS = ("model.safetensors", f"model{INDEX}", "adapter.safetensors")
FORM = ("model.safetensors", "config.json", "recipe.yaml", "samples.png", "README.md")


# -- writing


def write_weights(state: Mapping[str, Tensor], metadata: Metadata, path: Path) -> Path:
    """Write a safetensors file with the facts in its header, atomically; equal input gives equal bytes."""
    return write_tensors(path, state, {"diffzoo": json.dumps(metadata.to_dict(), sort_keys=True)})


def save_pretrained(
    network: Network,
    folder: str | Path,
    *,
    process: GaussianProcess | None = None,
    metadata: Metadata | None = None,
    **more: Any,
) -> Path:
    """Write a network to a folder as `model.safetensors` and `config.json`; `load_any(folder)` reads it back.

    Args:
        network: any network of the zoo.
        folder: made if needed.
        process: what it was trained with; default: that of the weights it was loaded from.
        facts: all facts at once; default: those of the weights it was loaded from.
        more: single fields of `Metadata`, such as `class_names` or `licence`.
    """
    folder = Path(folder)
    known = metadata or network.metadata
    mine = metadata_of(network, process)
    merged = replace(known, config=mine.config, process=mine.process or known.process) if known else mine
    merged = replace(merged, **{**more, "version": mine.version})
    write_weights(network.state_dict(), merged, folder / "model.safetensors")
    _write_text(folder / "config.json", to_json(merged.to_dict()))
    return folder


def _write_text(path: Path, text: str) -> None:
    with explain_disk(path):
        write_text(path, text)


# -- staging


def published_files(folder: Path) -> tuple[str, ...]:
    """The names of a folder's files that belong to the published form, weights first; empty if it is not in this form.

    Raises:
        UserError: if a shard that an index names is missing.
    """
    weights = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        return ()
    shards = sorted(set(weight_map(folder / weights).values())) if weights.endswith(INDEX) else []
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / weights} needs the shard {missing[0]}, which is missing: fetch it again")
    return (*shards, weights, *(name for name in FORM if name != "model.safetensors" and (folder / name).is_file()))


def agreed_licence(given: str | None, stated: str | None, what: str, remedy: str = "") -> str | None:
    """The licence that weights state, or the one given where they state none.

    Raises:
        UserError: if both are there and differ: nobody changes the licence of another's weights in passing.
    """
    if given and stated and given.lower() != stated.lower():
        remedy = remedy or "leave the licence out to keep it"
        raise UserError(f"{what} states the licence {stated}, not {given}: {remedy}")
    return stated or given


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
    files = published_files(path)
    if files and not (merge and "adapter.safetensors" in files):
        stated = json_metadata(path / "config.json").licence
        licence = agreed_licence(licence, stated, str(path), "edit config.json and README.md to change it")
        if stated and "README.md" in files:
            options = {"dataset": dataset, "evaluation": evaluations, "weights": prefer != "average"}
            _refuse_options(path, options)
            yield path, stated
            return
        if f"model{INDEX}" in files:
            raise UserError(
                f"{path} holds weights in shards, which are published as they are: it needs a README.md, and a field "
                "licence in config.json"
            )
    elif has_checkpoint(str(source)):  # before anything is fetched
        item = checkpoint(str(source))
        licence = agreed_licence(licence, item.weights_licence, item.name)
    if not str(source).startswith("hf-hub:"):
        _require_licence(licence)
    with tempfile.TemporaryDirectory(prefix="diffzoo-push-") as name:
        folder = Path(name)
        yield folder, _fill(folder, source, repo, licence, prefer, dataset, evaluations, merge)


def _refuse_options(path: Path, options: Mapping[str, Any]) -> None:
    """A folder that has its card is published as it is, so nothing can be said about it in passing."""
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise UserError(
            f"{path} is published as it is, with its README.md, so {' and '.join(given)} would change nothing: leave "
            "it out and edit README.md, or delete README.md to have it written anew"
        )


def _require_licence(licence: str | None) -> str:
    if not licence:
        raise UserError(
            "a model needs a licence before it is published, and there is no default: give --licence, for example "
            "apache-2.0, cc-by-4.0, cc-by-nc-4.0, or a name of your own"
        )
    return licence


def _fill(
    folder: Path,
    source: str | Path,
    repo: str,
    licence: str | None,
    prefer: str,
    dataset: str | None,
    evaluations: Sequence[str | Path],
    merge: bool,
) -> str:
    """Write the published form of a source; returns its licence."""
    from diffzoo import __version__

    adapter = None if merge else find_adapter(source)
    if adapter is not None:
        state, known = read_adapter(*adapter, prefer)
        portable_base(known, str(source))
    else:
        weights = locate(source, prefer)
        state, known = dict(weights.state), weights.metadata
    licence = _require_licence(agreed_licence(licence, known.licence, str(source)))
    origin = {k: v for k, v in known.provenance.items() if k != "file"}  # a path means nothing elsewhere
    if Path(str(origin.get("base", ""))).exists():
        origin["base"] = "weights that were not published"
    run = _run_folder(Path(source)) if Path(source).exists() else None
    if run is not None:
        _from_run(run, folder)
    metadata = replace(known, licence=licence, provenance=origin, version=__version__)
    write_weights(state, metadata, folder / ("model.safetensors" if adapter is None else "adapter.safetensors"))
    _write_text(folder / "config.json", to_json(metadata.to_dict()))
    card = model_card(metadata, repo, folder, evaluations=_evaluations(run, evaluations), dataset=dataset)
    _write_text(folder / "README.md", card)
    return licence


# -- the Hub


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
        licence: of the weights; required unless the source states one, which cannot be changed here.
        private: publish in a private repository, made if needed; one that is public is refused.
        revision: branch to commit to, made if needed; default main.
        message: of the commit.
        dry_run: upload nothing and return what would be, with sizes and hashes.
        prefer: which weights of a checkpoint: "average", "raw" or a label.
        dataset: what it was trained on, for the card; default: what the recipe says.
        evaluations: results of `diffzoo eval` for the card, besides those in the run's folder `eval`.
        merge: publish whole weights where the source holds low-rank adapters, which otherwise go alone.

    Raises:
        UserError: without a licence or under another than the source's, for options that a folder in published form
            leaves no room for, and one sentence for whatever the Hub refuses.
    """
    check_repo(repo)
    options: dict[str, Any] = {"prefer": prefer, "dataset": dataset, "evaluations": evaluations, "merge": merge}
    with stage(source, repo, licence, **options) as (folder, stated):
        message = message or f"Upload {repo.split('/')[1]}"
        plan = Plan(repo, folder, published_files(folder), stated, private, revision, message)
        return str(plan) if dry_run else _upload(plan)


def push_network(network: Network, repo: str, *, licence: str | None = None, **options: Any) -> str:
    """`push_to_hub` for a network in memory; `process`, `class_names` and other facts may be given too.

    Args:
        network: any network of the zoo.
        repo: `owner/name`.
        licence: of the weights; required unless the network's facts state one.
        options: those of `push_to_hub` except `prefer`, for it holds one set of weights; others go to
            `save_pretrained`.
    """
    if "prefer" in options:
        raise UserError(
            "prefer chooses among the weights of a checkpoint, and a network in memory holds one set: leave it out, "
            "or publish the checkpoint with push_to_hub(SOURCE, REPO, prefer=...)"
        )
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
        raise offline_error(f"a connection to publish {plan.repo}")
    api = HfApi(endpoint=hub_endpoint(), library_name="diffzoo")
    with explain_hub(plan.repo):
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        if plan.private and not api.repo_info(plan.repo).private:
            raise UserError(
                f"{plan.repo} exists and is public, so nothing was uploaded: make it private at "
                f"{hub_endpoint()}/{plan.repo}/settings, choose another name, or leave --private out"
            )
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
    check_repo(repo)
    with explain_hub(repo):
        snapshot = Path(
            snapshot_download(
                repo,
                revision=revision or given or None,
                cache_dir=hub_cache_dir(),
                endpoint=hub_endpoint(),
                local_files_only=is_offline(),
                library_name="diffzoo",
                allow_patterns=[*FORM, *WEIGHTS],
            )
        )
    if not (snapshot / "config.json").is_file():
        raise UserError(f"{repo} is not a model of diffzoo: it has no config.json")
    json_metadata(snapshot / "config.json", f"{repo}/config.json")
    index = snapshot / f"model{INDEX}"
    if index.is_file() and not (snapshot / "model.safetensors").is_file():
        for shard in sorted(set(weight_map(index).values())):
            hub_file(repo, shard, snapshot.name)
    files = published_files(snapshot)
    if not files:
        raise UserError(f"{repo} is not a model of diffzoo: it has no model.safetensors")
    return snapshot if folder is None else _copy_out(snapshot, files, Path(folder))


def _copy_out(snapshot: Path, files: Sequence[str], folder: Path) -> Path:
    for source in (snapshot / name for name in files):
        target = folder / source.name
        if target.exists() and sha256(target) != sha256(source):
            raise UserError(f"{target} exists and differs: choose an empty folder")
        with explain_disk(target), atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return folder
