#!/usr/bin/env bash
# Versions: torch 2.13.0, albumentations 2.0.8
# Behaviour: Compose has a generator of its own, made when it is built. DataLoader workers get copies of it, which no
#   worker's seed reaches, with `seed` given or not: all workers draw the same numbers, and as workers start anew in
#   each epoch, every epoch does. With shuffling the images change places, so that it is not noticed.
# Guess: as with torchvision's transforms, each worker and each epoch draws its own.
# Seen: 64 images, 10 epochs, crops at 33 x 33 places with brightness: without workers about 630 of 640 differ.
#   4 workers make 16 different ones in all 10 epochs, 160 if they persist.
# Advice: a worker_init_fn that calls get_worker_info().dataset.transform.set_random_seed(torch.initial_seed() % 2**32),
#   which gives 627.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 albumentations==2.0.8
cd "$folder"
NO_ALBUMENTATIONS_UPDATE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import albumentations as A
import numpy as np
import torch


class Images(torch.utils.data.Dataset):
    """One image 64 times, each pixel the number of its place."""

    def __init__(self, seed):
        self.transform = A.Compose([A.RandomCrop(32, 32), A.RandomBrightnessContrast(p=1)], seed=seed)
        self.image = np.linspace(0, 1, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.from_numpy(self.transform(image=self.image)["image"][8, 8].astype(np.float64))


def draws(workers, seed=None, reseed=False, **kw):
    """Number of different augmentations in ten epochs."""
    torch.manual_seed(0)
    images = Images(seed)

    def own_seed(worker):
        torch.utils.data.get_worker_info().dataset.transform.set_random_seed(torch.initial_seed() % 2**32)

    loader = torch.utils.data.DataLoader(
        images, batch_size=4, shuffle=True, num_workers=workers, worker_init_fn=own_seed if reseed else None, **kw
    )
    return torch.cat([batch for _ in range(10) for batch in loader]).unique(dim=0).shape[0]


for seed in (None, 7):
    alone, workers, persistent = draws(0, seed), draws(4, seed), draws(4, seed, persistent_workers=True)
    own = draws(4, seed, reseed=True)
    print(f"seed={seed}: {alone} different of 640 without workers, {workers} with 4, {persistent} where they persist")
    print(f"  with seeds of their own {own}")
    assert alone > 600 and own > 600 and workers <= 16 and persistent <= 160
PY
