#!/usr/bin/env bash
# Versions: datasets 5.2.0
# Behaviour: `shuffle(...).repeat(n)` of a streamed dataset gives every repetition the same order, and so does an
#   endless `repeat(None)`, the stream of a training that counts steps. `set_epoch` changes all repetitions alike.
# Guess: the shuffle draws anew in each repetition, as it does in each epoch that set_epoch announces.
# Seen: 1,000 rows, five repetitions, one order.
# Advice: loop over epochs with set_epoch, or repeat before shuffling, with rows of neighbouring repetitions mixed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/pillow-13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pillow==13.0.0 datasets==5.2.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import itertools

import datasets

rows = datasets.Dataset.from_dict({"i": range(1000)}).to_iterable_dataset(num_shards=4)
shuffled = rows.shuffle(seed=0, buffer_size=1000)


def orders(stream, n):
    numbers = [row["i"] for row in itertools.islice(stream, 1000 * n)]
    return [tuple(numbers[i : i + 1000]) for i in range(0, len(numbers), 1000)]


five = orders(shuffled.repeat(5), 5)
endless = orders(shuffled.repeat(None), 3)
print("orders of five repetitions:", len(set(five)), "of an endless stream:", len(set(endless)))
assert len(five) == 5 and len(set(five)) == 1 and sorted(five[0]) == list(range(1000)) != list(five[0])
assert len(set(endless)) == 1
epochs = []
for epoch in range(3):
    shuffled.set_epoch(epoch)
    epochs += orders(shuffled, 1)
print("orders of three epochs:", len(set(epochs)))
assert len(set(epochs)) == 3
PY
