#!/usr/bin/env bash
# Versions: torch 2.13.0, datasets 5.2.0
# Behaviour: `take(n)` and `skip(n)` of a streamed set are cut per DataLoader worker: each of w workers takes or skips
#   its n/w share of its own files. The two halves of a split are disjoint only if both loaders have the same number of
#   workers; with take(20) read by one process and skip(20) by four workers 15 of the 20 held-out rows are trained on.
# Guess: take(n) is the first n rows of the set and skip(n) the others, whoever reads them.
# Seen: 4 files of 25 rows, held out with take(20) and no workers; skip(20) with 0, 1, 2, 3, 4 workers gives 80 rows
#   each time, of which 0, 0, 10, 13, 15 are held out.
# Advice: write the held-out rows as files of their own, or split by a hash of the row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 datasets==5.2.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
from datasets import Dataset, disable_progress_bars, load_dataset
from torch.utils.data import DataLoader

disable_progress_bars()
files = [f"{k}.parquet" for k in range(4)]
for k, file in enumerate(files):
    Dataset.from_dict({"row": list(range(25 * k, 25 * k + 25))}).to_parquet(file)


def rows(stream, workers):
    return {int(r) for batch in DataLoader(stream, batch_size=5, num_workers=workers) for r in batch["row"]}


stream = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir="cache")
held_out, leaks = rows(stream.take(20), 0), []
for workers in range(5):
    train, same = rows(stream.skip(20), workers), rows(stream.take(20), workers)
    leaks.append(len(train & held_out))
    print(f"{workers} workers: {len(train)} rows to train on, {leaks[-1]} of them held out")
    assert len(train) == 80 and not train & same
assert leaks[:2] == [0, 0] and leaks[4] > leaks[2] > 0
PY
