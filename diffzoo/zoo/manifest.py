"""The manifest of published weights: `checkpoints.yaml` as records.

An entry belongs to one set of weights and is named `model.tag`; the first entry of a model is its default. What nobody
could establish yet is written as null and explained in `unpinned`: such a revision or hash is recorded on the first
download and compared ever after, never skipped in silence.

Entries are read one by one, when they are asked for. `tools/check_manifest.py` checks all of them thoroughly, in the
tests.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import get_type_hints

from diffzoo import __version__
from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config
from diffzoo.models.registry import entry, matching
from diffzoo.record import from_plain
from diffzoo.zoo.metadata import Metadata, Provenance

__all__ = [
    "Fingerprint",
    "Manifest",
    "Pretrained",
    "PublishedNumber",
    "Source",
    "find_pretrained",
    "is_pretrained",
    "list_pretrained",
    "load_manifest",
    "manifest_path",
    "parse_manifest",
]

SOURCE_KINDS = {
    "repo": ("repo", "revision", "file"),  # a file of a Hub repository
    "url": ("url",),
    "drive": ("drive",),  # the id of a file on Google Drive
    "package": ("package",),  # a path inside this package
}


@dataclass(frozen=True)
class Source:
    """Where the original file lies; exactly one of `repo`, `url`, `drive` and `package` is set.

    Args:
        repo: Hub repository `owner/name`, with `file` inside it and `revision`, a 40-digit commit.
        url: address of the file.
        drive: id of a publicly shared file on Google Drive.
        package: path of a file that ships inside this package.
        converter, sha256, size: of a mirror, whose file is another one: as in `Pretrained`; None = the same converter,
            and recorded on first download.
    """

    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    url: str | None = None
    drive: str | None = None
    package: str | None = None
    converter: str | None = None
    sha256: str | None = None
    size: int | None = None

    @property
    def kind(self) -> str:
        """ "repo", "url", "drive" or "package"."""
        return next(kind for kind in SOURCE_KINDS if getattr(self, kind))

    @property
    def filename(self) -> str:
        """The name the file gets on disk."""
        if self.kind == "drive":
            return f"{self.drive}.pth"
        return str(self.file or self.url or self.package).rsplit("/", 1)[-1]

    def __str__(self) -> str:
        if self.repo:
            return f"{self.file} of the Hub repository {self.repo}" + (f" at {self.revision}" if self.revision else "")
        if self.drive:
            return f"Google Drive file {self.drive}"
        return str(self.url or f"{self.package} of the installed package")


@dataclass(frozen=True)
class Fingerprint:
    """A network's output on the seeded input of `verify.probe`, float32 on the CPU.

    Args:
        mean, std: moments of the whole output.
        first: its first values in row-major order.
        tolerance: largest absolute error of any of these that still counts as equal.
    """

    mean: float
    std: float
    first: tuple[float, ...]
    tolerance: float = 1e-4


@dataclass(frozen=True)
class PublishedNumber:
    """A number as printed, with the protocol it belongs to and the preset it was sampled with."""

    metric: str
    value: float
    protocol: str
    preset: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Pretrained:
    """One entry of the manifest.

    Args:
        name: `model.tag`.
        source: where the original file lies.
        converter: module of `diffzoo.zoo.converters`, or "diffzoo" for files in our own layout.
        code_licence: of the authors' code; that of the weights is in the metadata.
        metadata: of the weights.
        sha256: hash of the original file, 64 hex digits; None = recorded on first download.
        size: bytes of the original file; None = unknown.
        unpinned: why a hash or revision is null.
        mirrors: places of the same weights, perhaps in another layout, that are asked in turn where `source` cannot be
            had; what comes out of the converter must be the same, tensor by tensor.
        state_sha256: hash of the converted weights (`diffzoo.tensors.STATE`); None = recorded on first conversion.
        paper: {arxiv, ...}.
        published: numbers as printed.
        fingerprint: recorded output; None with `fingerprint_pending` saying why.
    """

    name: str
    source: Source
    converter: str
    code_licence: str
    metadata: Metadata
    sha256: str | None = None
    size: int | None = None
    unpinned: str | None = None
    mirrors: tuple[Source, ...] = ()
    state_sha256: str | None = None
    paper: dict[str, str] = field(default_factory=dict)
    published: tuple[PublishedNumber, ...] = ()
    fingerprint: Fingerprint | None = None
    fingerprint_pending: str | None = None

    @property
    def model(self) -> str:
        """The registered name of the network."""
        return str(self.metadata.name)

    @property
    def config(self) -> Config:
        """The config of the network."""
        return self.metadata.config

    @property
    def sources(self) -> tuple[Source, ...]:
        """All places of these weights, the authors' first, each with its converter and what is known of its file."""
        own = replace(self.source, converter=self.converter, sha256=self.sha256, size=self.size)
        return (own, *(replace(m, converter=m.converter or self.converter) for m in self.mirrors))


IN_METADATA = ("process", "guidance", "sampler", "autoencoder", "text_encoder", "class_names", "presets", "recipe")


def read_entry(name: str, data: object, file: str) -> Pretrained:
    """An entry from its plain data.

    Raises:
        UserError: for a field that does not fit, with its path.
    """
    where = f"{file}: {name}"
    if not isinstance(data, dict) or not isinstance(data.get("model"), str):
        raise UserError(f"{where}.model: expected the name of a registered model, got {data!r:.80}")
    values = dict(data)
    model = entry(values.pop("model"))
    source = from_plain(Source, values.pop("source", None), f"{where}.source")
    training = values.pop("training", {})
    metadata = {
        "network": model.network,
        "config": _config(model.config, values.pop("config", {}), f"{where}.config"),
        "name": model.name,
        "licence": values.pop("weights_licence", None),
        "provenance": Provenance(pretrained=name, source=str(source), training=training),
        "version": __version__,
        **{key: values.pop(key) for key in IN_METADATA if key in values},
    }
    known = from_plain(Metadata, metadata, where)
    return from_plain(Pretrained, {**values, "name": name, "source": source, "metadata": known}, where)


def _config(registered: Config, changes: object, where: str) -> Config:
    """The registered config with the rewrites that the weights need."""
    hints = get_type_hints(type(registered))
    if not isinstance(changes, dict):
        raise UserError(f"{where}: expected a mapping, got {changes!r}")
    given = {k: from_plain(hints[k], v, f"{where}.{k}") if k in hints else v for k, v in changes.items()}
    try:
        return registered.override(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


class Manifest(Mapping[str, Pretrained]):
    """The entries of a manifest by name, in order; each is parsed and read when it is first asked for.

    Args:
        texts: of the entries, in YAML.
        file: its name, for messages.
    """

    def __init__(self, texts: Mapping[str, str], file: str):
        self.texts, self.file = texts, file
        self._read: dict[str, Pretrained] = {}

    def data(self, name: str) -> object:
        """An entry as plain data."""
        import yaml

        try:
            # the C parser is ten times faster where it exists
            return yaml.load(self.texts[name], getattr(yaml, "CSafeLoader", yaml.SafeLoader))[name]
        except yaml.YAMLError as error:
            raise UserError(f"{self.file}: {name}: not valid YAML: {error}") from None

    def __getitem__(self, name: str) -> Pretrained:
        if name not in self._read:
            self._read[name] = read_entry(name, self.data(name), self.file)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __contains__(self, name: object) -> bool:
        return name in self.texts

    def __len__(self) -> int:
        return len(self.texts)


def parse_manifest(text: str, file: str = "checkpoints.yaml") -> Manifest:
    """The entries of a manifest's text, cut where a line begins with a name.

    Raises:
        UserError: for a line that begins with anything else.
    """
    texts: dict[str, str] = {}
    name = ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line[:1].isspace() and line[:1] not in ("", "#"):
            name, colon, _ = line.partition(":")
            if not colon or not re.fullmatch(r"[\w.]+", name):
                raise UserError(
                    f"{file}: line {number}: expected the name of an entry and a colon, got {line.strip()!r}"
                )
            texts[name] = ""
        if name:
            texts[name] += line
    return Manifest(texts, file)


def manifest_path() -> Path:
    """The manifest: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "checkpoints.yaml", package.parent / "checkpoints.yaml"):
        if path.is_file():
            return path
    raise UserError("checkpoints.yaml is missing from the installation: install diffzoo again")


@cache
def _load(path: Path) -> Manifest:
    return parse_manifest(path.read_text(encoding="utf-8"), path.name)


def load_manifest() -> Manifest:
    """The manifest of this package."""
    return _load(manifest_path())


def list_pretrained(patterns: str | Sequence[str] = "*") -> list[str]:
    """Names `model.tag` of published weights, those of one model with its default first.

    Args:
        patterns: a model, or shell patterns such as "adm_*" and "*emoji*"; all by default.
    """
    return matching(load_manifest(), patterns)


def _tagged(model: str) -> list[str]:
    return [name for name in load_manifest() if name.split(".", 1)[0] == model]


def is_pretrained(name: str) -> bool:
    """Whether `name`, a model or `model.tag`, has published weights."""
    return name in load_manifest() or bool(_tagged(name))


def find_pretrained(name: str) -> Pretrained:
    """The entry of `model.tag`, or the default entry of `model`.

    Raises:
        UserError: if there is none, naming the tags or the nearest name.
    """
    entries = load_manifest()
    model, dot, tag = str(name).partition(".")
    tags = _tagged(model)
    if name in tags or (tags and not dot):
        return entries[name if dot else tags[0]]
    if tags:
        raise UserError(f"{model} has no weights tagged {tag!r}; there are {', '.join(tags)}")
    hint = did_you_mean(name, {n.split(".", 1)[0] for n in entries}) or "; `diffzoo.list_pretrained()` names them all"
    raise UserError(f"no published weights for {name!r}{hint}")
