#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1, Pillow 13.0.0
# Behaviour: VaeImageProcessor, which resizes the inputs of diffusers' image-to-image pipelines, uses its `resample`
#   (Lanczos by default) for Pillow images only. Arrays and tensors of the same image go through F.interpolate's
#   default, the nearest pixel: to a quarter of the size, 15 of 16 pixels are thrown away.
# Guess: one image, one result, whether it comes as Pillow image, array or tensor.
# Seen: uniform noise, 256 to 64 pixels: deviation 0.13 as a Pillow image, 0.58 as array or tensor, which are every
#   fourth pixel; `resample` changes nothing there.
# Advice: resize before the pipeline, or hand over Pillow images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 pillow==13.0.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
array = pixels[None] / np.float32(255)
forms = {"Pillow": Image.fromarray(pixels), "array": array, "tensor": torch.from_numpy(array).permute(0, 3, 1, 2)}
seen = {
    (resample, form): VaeImageProcessor(resample=resample).preprocess(image, 64, 64)
    for resample in ("lanczos", "bilinear")
    for form, image in forms.items()
}
print({key: round(value.std().item(), 2) for key, value in seen.items()})
every_fourth = forms["tensor"][..., ::4, ::4] * 2 - 1
assert all(torch.allclose(x, every_fourth) == (form != "Pillow") for (_, form), x in seen.items())
assert seen["lanczos", "Pillow"].std() < 0.2 < 0.5 < seen["lanczos", "tensor"].std()
PY
