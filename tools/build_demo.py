"""Build the demo set that ships: 3,374 pictures of Microsoft's Fluent emoji, 64×64, ten classes and a caption each.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0
    python tools/build_demo.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-google-16.0.0.tgz

The pictures come from the first package (MIT, Microsoft), names and categories from the second (MIT, Cal Henderson).
Seventeen of its 3,391 pictures are left out: second copies of the keycaps, © and ®, and three flags under a code that
the table does not know. Unicode has nine categories with pictures here; "People & Body" is more than half of them and
is kept as its two halves, which makes ten classes.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from diffzoo.data.demo import PATH
from diffzoo.data.transforms import decode, resize_crop
from diffzoo.rng import key

__all__ = ["build", "main"]

SIZE = 64  # pixels
QUALITY = 90  # of lossy WebP
HELD_OUT = 10  # one emoji in ten, with all its skin tones, is held out for validation
ROW_GROUP = 256
BODY = ("hand", "hands", "body")  # first word of the subcategories of "People & Body" that show no person
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


def _class_of(emoji: dict[str, Any]) -> str:
    """The Unicode category, with "People & Body" told apart by its subcategory."""
    if emoji["category"] != "People & Body":
        return str(emoji["category"])
    return "Body" if emoji["subcategory"].split("-")[0] in BODY else "People"


def _caption(emoji: dict[str, Any], tones: str) -> str:
    name = (emoji["name"] or emoji["short_name"].replace("-", " ").replace("_", " ")).lower()
    words = list(dict.fromkeys(SKIN_TONES[t] for t in tones.split("-") if t in SKIN_TONES))
    return ", ".join([name, " and ".join(words)] if words else [name])


def _table(emojis: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], str]]:
    """Code points in lower case, as the pictures are named, to (emoji, skin tones)."""
    table = {}
    for emoji in emojis:
        forms = [("", emoji), *(emoji.get("skin_variations") or {}).items()]
        for tones, form in forms:
            for code in filter(None, (form["unified"], form.get("non_qualified"))):
                table[code.lower()] = (emoji, tones)
    return table


def _encode(data: bytes) -> bytes:
    pixels = resize_crop(decode(data), SIZE, resize="adm")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()


def _rows(pictures: Path, names: Path) -> list[dict[str, Any]]:
    with tarfile.open(names) as tar:
        member = tar.extractfile("package/emoji.json")
        assert member is not None
        table = _table(json.load(member))
    rows = []
    with tarfile.open(pictures) as tar:
        for entry in sorted(tar.getmembers(), key=lambda m: m.name):
            code = Path(entry.name).stem
            if not entry.name.endswith(".webp") or code not in table:
                continue
            emoji, tones = table[code]
            member = tar.extractfile(entry)
            assert member is not None
            held_out = key("demo", emoji["unified"]) % HELD_OUT == 0
            rows.append(
                {
                    "image": {"bytes": _encode(member.read()), "path": None},
                    "label": _class_of(emoji),
                    "caption": _caption(emoji, tones),
                    "split": "validation" if held_out else "train",
                    "code": code,
                    "subcategory": emoji["subcategory"],
                }
            )
    return rows


def build(pictures: Path, names: Path, out: Path) -> int:
    """Write the Parquet file `out`; returns the number of pictures."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = _rows(pictures, names)
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
    parser.add_argument("pictures", type=Path, help="tarball of @lobehub/fluent-emoji-3d")
    parser.add_argument("names", type=Path, help="tarball of emoji-datasource-google")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    print(f"{build(args.pictures, args.names, args.out)} pictures in {args.out}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
