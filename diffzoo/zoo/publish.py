"""Our published form, and its way to the Hub and back.

    model.safetensors, adapter.safetensors, config.json   see `diffzoo.zoo.saving`
    model.safetensors.index.json and the shards it names, in place of these: read and passed on, never written
    recipe.yaml         the recipe of the training run, if there was one
    samples.png         a grid of images, if the run made one
    README.md           the model card

A folder in this form is uploaded as it is, so pull, push and pull again give the same bytes. Other files in it stay
where they are.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffzoo.cache import explain_disk, gigabytes, hub_cache_dir
from diffzoo.errors import UserError
from diffzoo.files import atomic_path, sha256, write_text
from diffzoo.formats import INDEX, read_header, weight_map
from diffzoo.hub import HubPlace, check_repo, explain_hub, hub_endpoint, hub_file, hub_place, is_offline
from diffzoo.models.base import Network
from diffzoo.runs import Run, run_of
from diffzoo.zoo.card import model_card
from diffzoo.zoo.licences import licence_id, named_licence
from diffzoo.zoo.loading import find_adapter, json_metadata, locate, read_adapter
from diffzoo.zoo.manifest import find_pretrained, is_pretrained
from diffzoo.zoo.metadata import Metadata, Provenance, foreign_modules
from diffzoo.zoo.saving import save_pretrained, write_model

__all__ = ["Upload", "pull", "push_network", "push_to_hub"]

WEIGHTS = ("model.safetensors", f"model{INDEX}", "adapter.safetensors")
FORM = ("model.safetensors", "config.json", "recipe.yaml", "samples.png", "README.md")


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
    if given and stated and given.lower() != (licence_id(stated) or stated).lower():
        remedy = remedy or "leave the licence out to keep it"
        raise UserError(f"{what} states the licence {stated}, not {given}: {remedy}")
    return stated or given


@dataclass(frozen=True)
class Upload:
    """What a push uploads.

    Args:
        repo: `owner/name`.
        folder: where the files lie.
        files: names, in order.
        private, revision: of the repository.
        licence: of the weights.
        message: of the commit.
        needed: modules of others that a reader must be able to import.
    """

    repo: str
    folder: Path
    files: tuple[str, ...]
    licence: str
    private: bool
    revision: str | None
    message: str
    needed: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "private" if self.private else "public"
        lines = [f"to {hub_endpoint()}/{self.repo} ({kind}, {self.revision or 'main'}), licence {self.licence}:"]
        lines.append(f"  weights: {json_metadata(self.folder / 'config.json').provenance}")
        for name in self.files:
            path = self.folder / name
            lines.append(f"  {name:<18} {gigabytes(path.stat().st_size):>12}  sha256 {sha256(path)}")
        if self.needed:
            lines.append(f"  whoever loads it needs {', '.join(self.needed)}, importable: publish that too")
        return "\n".join(lines)


def _from_run(run: Run, folder: Path) -> None:
    """Copy the recipe and the newest previews of a run."""
    if run.config.is_file():
        _write_text(folder / "recipe.yaml", run.config.read_text(encoding="utf-8"))
    previews = sorted(run.samples.glob("*.png"), key=lambda p: p.stat().st_mtime)
    if previews:
        with explain_disk(folder / "samples.png"):
            shutil.copyfile(previews[-1], folder / "samples.png")


def _evaluations(run: Run | None, given: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Results of `diffzoo eval`: those given, and those in the folder `eval` of the run."""
    results = []
    for path in [*map(Path, given), *(sorted(run.root.glob("eval/**/*.json")) if run else [])]:
        data = None
        with suppress(OSError, ValueError):
            data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "values" in data and "protocol" in data:
            results.append(data)
        elif path in map(Path, given):
            raise UserError(f"{path} is no result of `diffzoo eval`: give the JSON file that it names at its end")
    return results


def _ready(path: Path, licence: str | None, merge: bool, options: Mapping[str, object]) -> str | None:
    """The licence of a folder that is published as it is; None for a source whose published form is yet to be written.

    Args:
        path: the source.
        licence: as given.
        merge: low-rank adapters are merged, so they are not published as they are.
        options: that would change the card of a folder, which has one.

    Raises:
        UserError: for another licence than the folder's, for options, and for files that are something else.
    """
    files = published_files(path)
    if not files or (merge and "adapter.safetensors" in files):
        return None
    stated = json_metadata(path / "config.json").licence
    agreed_licence(licence, stated, str(path), "edit config.json and README.md to change it")
    if stated and "README.md" in files:
        if given := [f"--{name}" for name, value in options.items() if value]:
            raise UserError(
                f"{path} is published as it is, with its README.md, so {' and '.join(given)} would change nothing: "
                "leave it out and edit README.md, or delete README.md to have it written anew"
            )
        for name in files:
            if name.endswith(".safetensors"):
                read_header(path / name)  # raises for a file that is something else, or cut off
        return stated
    if f"model{INDEX}" in files:
        raise UserError(
            f"{path} holds weights in shards, which are published as they are: it needs a README.md, and a field "
            "licence in config.json"
        )
    return None


def _fill(
    folder: Path,
    source: str | Path,
    repo: str,
    licence: str | None,
    weights: str,
    dataset: str | None,
    evaluations: Sequence[str | Path],
    merge: bool,
) -> str:
    """Write the published form of a source; returns its licence."""
    from diffzoo import __version__

    adapter = None if merge else find_adapter(source)
    if adapter is not None:
        state, known = read_adapter(*adapter, weights)
        known = replace(known, licence=known.licence or _portable_base(known, str(source)))
    else:
        found = locate(source, weights)
        state, known = dict(found.state), found.metadata
    licence = agreed_licence(licence, known.licence, str(source))
    if not licence:
        raise UserError(
            "a model needs a licence before it is published, and there is no default: give --licence, for example "
            'apache-2.0, cc-by-4.0, cc-by-nc-4.0, or "other: NAME"'
        )
    run = run_of(source) if Path(source).exists() else None
    if run is not None:
        _from_run(run, folder)
    metadata = replace(known, licence=licence, provenance=published_provenance(known.provenance), version=__version__)
    broken = next((n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"the weights of {source} are not finite (in {broken}), so they sample nothing: not published")
    write_model(state, metadata, folder)
    card = model_card(metadata, repo, folder, evaluations=_evaluations(run, evaluations), dataset=dataset)
    _write_text(folder / "README.md", card)
    return licence


def _portable_base(metadata: Metadata, where: str) -> str | None:
    """The licence of the weights that adapters belong to, where it is known.

    Raises:
        UserError: unless these weights can be had elsewhere too.
    """
    base = metadata.adapter.base if metadata.adapter is not None else ""
    if is_pretrained(base):
        return find_pretrained(base).metadata.licence
    if hub_place(base) is None:
        raise UserError(
            f"the adapters in {where} belong to {base}, which others do not have: publish that first and train from "
            "hf-hub:OWNER/NAME, or publish whole weights with --merge"
        )
    return metadata.provenance.base.licence if metadata.provenance.base is not None else None


def published_provenance(known: Provenance) -> Provenance:
    """Provenance without the paths of this machine, which mean nothing elsewhere."""
    base, merged = known.base, known.merged
    if base is not None:
        source = base.source if base.source and not _is_local(base.source) else None
        base = replace(base, source=source, provenance=published_provenance(base.provenance))
    if merged is not None and _is_local(merged.base):
        merged = replace(merged, base="weights that were not published")
    return replace(known, file=None, base=base, merged=merged)


def _is_local(source: str) -> bool:
    return source.startswith("local-dir:") or Path(source).exists() or Path(source).is_absolute()


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
    weights: str = "ema",
    dataset: str | None = None,
    evaluations: Sequence[str | Path] = (),
    merge: bool = False,
) -> str:
    """Publish a run, a checkpoint or a folder on the Hub; returns the address of the commit, or the plan.

    Args:
        source: anything `load_any` reads.
        repo: `owner/name` or the address of its page, made if needed.
        licence: of the weights, as `named_licence` reads it; required unless the source states one, which cannot be
            changed here.
        private: publish in a private repository, made if needed; one that is public is refused.
        revision: branch to commit to, made if needed; default main.
        message: of the commit.
        dry_run: upload nothing and return what would be, with sizes and hashes.
        weights: which weights of a checkpoint: "ema", "raw" or the label of an EMA.
        dataset: what it was trained on, for the card; default: what the recipe says.
        evaluations: results of `diffzoo eval` for the card, besides those in the run's folder `eval`.
        merge: publish whole weights where the source holds low-rank adapters, which otherwise go alone.

    Raises:
        UserError: without a licence or under another than the source's, for options that a folder in published form
            leaves no room for, and one sentence for whatever the Hub refuses.
    """
    place = hub_place(repo) or HubPlace(repo)
    repo, revision = place.repo, revision or place.revision
    check_repo(repo)
    licence = named_licence(licence)
    folder = Path(str(source).removeprefix("local-dir:"))
    options = {"dataset": dataset, "evaluation": evaluations, "weights": weights not in ("ema", "average")}
    stated = _ready(folder, licence, merge, options)
    if is_pretrained(str(source)):  # before anything is fetched
        item = find_pretrained(str(source))
        agreed_licence(licence, item.metadata.licence, item.name)
    with tempfile.TemporaryDirectory(prefix="diffzoo-push-") as temporary:
        if stated is None:
            folder = Path(temporary)
            stated = _fill(folder, source, repo, licence, weights, dataset, evaluations, merge)
        message = message or f"Upload {repo.split('/')[1]}"
        needed = tuple(foreign_modules(json_metadata(folder / "config.json")))
        plan = Upload(repo, folder, published_files(folder), stated, private, revision, message, needed)
        return str(plan) if dry_run else _upload(plan)


def push_network(network: Network, repo: str, *, licence: str | None = None, **options: Any) -> str:
    """`push_to_hub` for a network in memory; `process`, `class_names` and other metadata may be given too.

    Args:
        network: any network of the zoo.
        repo: `owner/name`.
        licence: of the weights; required unless the network's metadata states one.
        options: those of `push_to_hub` except `weights`, for it holds one set of weights; others go to
            `save_pretrained`.
    """
    if "weights" in options:
        raise UserError(
            "weights chooses among the weights of a checkpoint, and a network in memory holds one set: leave it out, "
            "or publish the checkpoint with push_to_hub(SOURCE, REPO, weights=...)"
        )
    names = ("private", "revision", "message", "dry_run", "dataset", "evaluations", "merge")
    upload = {name: options.pop(name) for name in names if name in options}
    with tempfile.TemporaryDirectory(prefix="diffzoo-push-") as name:
        save_pretrained(network, name, **options)
        return push_to_hub(name, repo, licence=licence, **upload)


def _upload(plan: Upload) -> str:
    from huggingface_hub import HfApi

    if is_offline():
        raise UserError(f"offline (HF_HUB_OFFLINE=1), so {plan.repo} cannot be published: unset that")
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
        repo: `owner/name`, with or without "hf-hub:" before and "@revision" behind, or the address of its page.
        folder: where its files go; default: they stay in the Hub's cache.
        revision: branch, tag or commit.

    Returns:
        The folder, which `load_any` and `push` read.

    Raises:
        UserError: one sentence for whatever is missing or refused, and for a repository that is not in our form.
    """
    from huggingface_hub import snapshot_download

    place = hub_place(repo) or HubPlace(*repo.split("@", 1))
    repo, given, file = place
    check_repo(repo)
    if "/" in (file or ""):
        raise UserError(f"expected a repository, got the place {file} in one: `diffzoo sample` and load_any read that")
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
