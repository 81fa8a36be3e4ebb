#!/usr/bin/env bash
# Versions: datasets 5.2.0
# Behaviour: load_dataset("parquet") over files whose class names stand in another order takes the names of the first
#   file and keeps every file's numbers: the second file's cats become dogs, streamed or not. concatenate_datasets of
#   the same two sets refuses.
# Guess: an error, as from concatenate_datasets, or a mapping by name.
# Seen: concatenate_datasets: ValueError; load_dataset: rows (cat, cat), (dog, dog), (cat, dog), (dog, cat) as (class by
#   number, true class).
# Advice: compare ClassLabel names of all files before training on shards from more than one source.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet datasets==5.2.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets, disable_progress_bars, load_dataset

disable_progress_bars()

def shard(names):
    features = Features({"label": ClassLabel(names=names), "truth": Value("string")})
    return Dataset.from_dict({"label": [0, 1], "truth": names}, features=features)


shards = shard(["cat", "dog"]), shard(["dog", "cat"])
try:
    concatenate_datasets(list(shards))
except ValueError:
    print("concatenate_datasets: ValueError")
else:
    raise SystemExit("concatenate_datasets takes them now")
for n, s in enumerate(shards):
    s.to_parquet(f"{n}.parquet")
for streaming in (False, True):
    files = ["0.parquet", "1.parquet"]
    rows = load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir="cache")
    seen = [(rows.features["label"].int2str(row["label"]), row["truth"]) for row in rows]
    print("streaming" if streaming else "whole", seen)
    assert seen == [("cat", "cat"), ("dog", "dog"), ("cat", "dog"), ("dog", "cat")]
PY
