"""Labels and captions: the columns that hold them, their valid values, and the files beside images that state them."""

import csv
import io
import json
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from diffzoo.errors import UserError, did_you_mean

__all__ = ["AUTO", "METADATA", "PREFIX", "Annotations", "Classes", "Columns", "caption_texts", "pick", "text_lines"]

Row = dict[str, object]  # the metadata of an image, by column

AUTO = "auto"
PREFIX = "prefix"  # as the label: the file name without its number
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences")
USUAL = frozenset((*IMAGE_COLUMNS, *LABEL_COLUMNS, *CAPTION_COLUMNS))
TEXT_FIELDS = ("raw", "text", "caption", "sentence", "value")  # of captions that are structs
# they describe the images below their folder: of Hugging Face's `imagefolder`, and of EDM's and StyleGAN's tools
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "dataset.json")


def pick(wanted: str | None, usual: Sequence[str], known: Sequence[str]) -> str | None:
    """The column itself, or for "auto" the first usual name that is there."""
    return next((c for c in usual if c in known), None) if wanted == AUTO else wanted


def check_column(kind: str, name: str, known: Sequence[str], where: str) -> None:
    """Refuse a column that is not there."""
    if name not in known:
        near = did_you_mean(name, known)
        said = "" if near.startswith("; known") else near
        raise UserError(f"no {kind} column {name!r} in {where}; its columns are {', '.join(known)}{said}")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; "auto" finds the usual names, and for images the only column that holds some.

    image:   encoded images (Hugging Face `Image` or bytes).
    label:   class indices or class names; None for no labels.
    caption: one text or a list of texts; None for no captions.
    """

    image: str = AUTO
    label: str | None = None
    caption: str | None = None

    def among(self, *known: Sequence[str]) -> "Columns":
        """The same with labels and captions by their names: for "auto" of the first list that has a usual one."""

        def named(wanted: str | None, usual: Sequence[str]) -> str | None:
            return next((found for columns in known if (found := pick(wanted, usual, columns))), None)

        return replace(self, label=named(self.label, LABEL_COLUMNS), caption=named(self.caption, CAPTION_COLUMNS))

    def check(self, known: Sequence[str], where: str, besides: Sequence[str] = ()) -> None:
        """Refuse a column that is neither among the known ones, which the message lists, nor among those besides."""
        for kind, name in (("image", self.image), ("label", self.label), ("caption", self.caption)):
            if name is not None and name not in (AUTO, *besides):
                check_column(kind, name, known, where)


# ---- labels


def sorted_names(names: Iterable[str]) -> list[str]:
    """Names of classes in alphabetical order; numbers by their value."""
    known = set(names)
    return sorted(known, key=lambda n: (int(n), n)) if all(n.isdecimal() for n in known) else sorted(known)


def _sparse(numbers: Sequence[int]) -> bool:
    """Whether ascending labels are identities rather than numbers of classes, such as 2024000017."""
    return bool(numbers) and numbers[-1] >= 1000 + 4 * len(numbers)


def label_of(value: object, where: str) -> str | int | None:
    """A label as a text or a whole number; None where there is none.

    Raises:
        UserError: it is a fraction, or neither.
    """
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if number != number:  # a missing number in a column of floats
            return None
        if number.is_integer():
            return int(number)
    raise UserError(
        f"{where} has labels that are neither texts nor whole numbers, such as {str(value)[:40]}: choose another label "
        "column, or none to leave labels out"
    )


def _texts_or_numbers(values: Iterable[object], where: str) -> tuple[set[str], list[int]]:
    """All texts among labels, or all numbers in ascending order; one of the two is empty."""
    present = {label_of(v, where) for v in values} - {None}
    texts = {v for v in present if isinstance(v, str)}
    numbers = sorted(v for v in present if isinstance(v, int))
    if texts and numbers:
        raise UserError(
            f"{where} mixes texts and numbers in its labels, such as {min(texts)!r} and {numbers[0]}: make them "
            "one kind, choose another label column, or none to leave labels out"
        )
    return texts, numbers


@dataclass(frozen=True)
class Classes:
    """The classes of a source, and which of them a label means.

    names:   of the classes.
    numbers: the class of each label; None where labels are the numbers of classes.
    where:   the source, for messages.
    """

    names: list[str]
    numbers: Mapping[object, int] | None
    where: str

    @classmethod
    def of(cls, values: Iterable[object], names: Sequence[str] | None, where: str) -> "Classes":
        """The classes that labels mean.

        Args:
            values: labels, texts or numbers; None is none.
            names: the classes, if they are known, such as those of the training rows; None: texts in alphabetical
                order, numbers by their value. Whole numbers far larger than their count are names too.
            where: the source, for messages.

        Raises:
            UserError: labels are of mixed kinds, or no labels, or a text is not among the names.
        """
        texts, numbers = _texts_or_numbers(values, where)
        by_number = not texts
        if by_number:
            known = sorted(map(int, names)) if names and all(n.isdecimal() for n in names) else []
            if not _sparse(known or ([] if names else numbers)):
                return cls(list(names or map(str, range(max(numbers, default=-1) + 1))), None, where)
            texts = set(map(str, numbers))
        named = list(names or sorted_names(texts))
        unknown = sorted(texts - set(named))
        if unknown:
            raise UserError(
                f"{where} has a class {unknown[0]!r}, which is not among the {len(named)} classes of the training "
                f"split or of class_names{did_you_mean(unknown[0], named)}"
            )
        return cls(named, {int(n) if by_number else n: i for i, n in enumerate(named)}, where)

    def index(self, value: object) -> int | None:
        """The class that a label means; None where there is none.

        Raises:
            UserError: it means none of them.
        """
        label = label_of(value, self.where)
        if label is None:
            return None
        try:
            index = int(label) if self.numbers is None else self.numbers[label]
        except (ValueError, KeyError):
            raise UserError(f"{self.where} has a label {label!r}, which is neither a class nor its number") from None
        if not 0 <= index < len(self.names):
            raise UserError(f"{self.where} has a label {index}, but {len(self.names)} classes")
        return index


# ---- captions


def caption_texts(value: object, where: str) -> tuple[str, ...]:
    """The captions in one value of a column: a text, a struct with captions, or a list of these; one "" where none is.

    Raises:
        UserError: it is anything else.
    """
    return tuple(_captions(value, where)) or ("",)


def _captions(value: object, where: str) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
        return
    if isinstance(value, Mapping) and (fields := [value[f] for f in TEXT_FIELDS if f in value]):
        value = [next((v for v in fields if v is not None), None)]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _captions(inner, where)
        return
    value = f"a struct of {', '.join(map(str, value))}" if isinstance(value, Mapping) else value
    raise UserError(
        f"{where} has captions that are no texts, such as {str(value)[:60]}: choose another caption column, or none to "
        "leave captions out"
    )


def text_lines(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a text file, one per line; one "" where it is empty.

    Raises:
        ValueError: it is no text in UTF-8, or in UTF-16 with its mark.
    """
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is no text in UTF-8") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def json_fields(data: bytes) -> Row:
    """The fields of a JSON file; none where it is no object.

    Raises:
        ValueError: it is no JSON.
    """
    found = json.loads(data)
    return found if isinstance(found, dict) else {}


# ---- beside image files


class Annotations:
    """Labels and captions of image files, from their metadata, their folders or names, and text files beside them.

    Args:
        files: image of each row.
        rows: metadata of each row, by column.
        folders: class of each image by its folder or name; None: there are none.
        texts: whether there are text files beside images.
        name: for messages.
        wanted: which columns. Besides those of the metadata there are "label", the folder, and "txt", the text.
        class_names: names of the classes, or of those of the training rows.
        tables: the metadata files; "": metadata are those of the JSON file beside each image.

    Attributes:
        class_names: names of the classes; empty without labels.
        labels: class index of each row, or None where a row has none; None without labels.
        captions: texts of each row; None if they are not in metadata.
        beside: whether captions are the texts beside the images.
        labels_from, captions_from: column and files; "" for labels by folder, and where there are none.

    Raises:
        UserError: a column is missing, or a class is unknown.
    """

    def __init__(
        self,
        files: Sequence[str],
        rows: Sequence[Row],
        folders: Mapping[str, str] | None,
        texts: bool,
        name: str,
        wanted: Columns,
        class_names: Sequence[str] | None = None,
        tables: str = "",
    ):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        by_name = PREFIX if wanted.label == PREFIX else "label"
        known = [*columns, *[by_name] * (folders is not None), *["txt"] * texts]
        first = ["txt"] * (texts and not tables)  # before the fields of a JSON file, as in WebDataset
        chosen = wanted.among(first, known)
        chosen.check(known, name)
        told = f"the column {{}} of {tables}" if tables else "the field {} of the files .json"
        self.class_names: list[str] = []
        self.labels: list[int | None] | None = None
        self.labels_from = self.captions_from = ""
        if (label := chosen.label) is not None:
            values: list[object] = [row.get(label) for row in rows]
            if label in columns:
                self.labels_from = told.format(label)
            else:
                values = [(folders or {})[file] for file in files]
            classes = Classes.of(values, class_names, name)
            self.class_names, self.labels = classes.names, [classes.index(value) for value in values]
        self.beside = chosen.caption == "txt" and "txt" not in columns
        self.captions: list[tuple[str, ...]] | None = None
        if self.beside:
            self.captions_from = "text files beside the images"
        elif chosen.caption is not None:
            self.captions = [caption_texts(row.get(chosen.caption), name) for row in rows]
            self.captions_from = told.format(chosen.caption)


def read_metadata(
    metadata: Mapping[str, bytes], images: Collection[str], name: str, folder: str
) -> tuple[list[str], list[Row]]:
    """(images, their metadata) of all rows, sorted by image; images that no row names are left out.

    Each row names an image by its path from the file's own folder, in `file_name`.

    Args:
        metadata: content of each metadata file, by its path; ".." stands for the place of `folder`.
        images: paths of all images, below one folder.
        name: for messages.
        folder: the name of that folder, by which metadata files above it name what is in it.

    Raises:
        UserError: a file is damaged, or names an image that is not there.
    """
    rows: list[tuple[str, Row]] = []
    for path, content in sorted(metadata.items()):
        try:
            named = [(str(row.pop("file_name")), row) for row in _table(path, content)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} of {name} cannot be read ({type(error).__name__}: {error}): expected rows with a column "
                "file_name, the path of an image from the folder of this file"
            ) from error
        above = path.startswith("../")
        for file, row in named:
            image = posixpath.normpath(posixpath.join("/", folder, posixpath.dirname(path), file))
            image = posixpath.relpath(image, posixpath.join("/", folder))
            if image in images:
                rows.append((image, row))
            elif not above or not image.startswith("../"):  # a file above the split names images of other splits too
                raise UserError(f"{path} of {name} names {file!r}, but there is no such image")
    rows.sort(key=lambda row: row[0])
    return [image for image, _ in rows], [row for _, row in rows]


def names_images(path: str, content: bytes) -> bool | None:
    """Whether a file with a name of `METADATA` names images; None if it is no metadata, as not every `dataset.json` is.

    A `dataset.json` without labels names none, and means all of them.
    """
    labels = _edm_labels(content) if path.endswith(".json") else [path]
    return None if labels is None else bool(labels)


def _edm_labels(content: bytes) -> list[tuple[str, object]] | None:
    """(image, label) in a `dataset.json` of EDM's and StyleGAN's tools; None if it is something else."""
    try:
        labels = json.loads(content)["labels"]
        return [(str(file), label) for file, label in dict(labels or {}).items()]
    except (ValueError, KeyError, TypeError):
        return None


def _table(path: str, content: bytes) -> list[Row]:
    """Rows of a metadata file. In CSV a column of whole numbers, also 1.0, becomes numbers, an empty cell None."""
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        return list(pq.read_table(io.BytesIO(content)).to_pylist())
    if path.endswith(".json"):
        return [{"file_name": file, "label": label} for file, label in _edm_labels(content) or ()]
    text = content.decode("utf-8-sig")
    if path.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    lines: list[Row] = [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    for column in lines[0] if lines else ():
        values = [row[column] or None for row in lines]
        number = column != "file_name" and all(v is None or re.fullmatch(r"-?\d+(\.0*)?", str(v)) for v in values)
        for row, value in zip(lines, values, strict=True):
            row[column] = int(str(value).partition(".")[0]) if number and value is not None else value
    return lines


def prefix_of(path: str) -> str:
    """The name of a file without its number: "great_dane" of "great_dane_012.jpg"."""
    stem = posixpath.splitext(posixpath.basename(path))[0]
    return re.sub(r"[\s._()-]*\d+\)?$", "", stem) or stem
