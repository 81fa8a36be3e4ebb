"""A manifest entry that tests alter field by field."""

from typing import Any

ENTRY: dict[str, Any] = {
    "model": "dimr_tiny",
    "sha256": None,
    "unpinned": "it is a test",
    "code_licence": "Apache-2.0",
    "weights_licence": "research only",
    "converter": "dimr",
    "process": {"prediction": "Eps", "noise_conditioning": {"class": "TimeConditioning", "scale": 8.0, "offset": -4.0}},
    "guidance": {"formula": "cond + s * (cond - uncond)", "scale": 0.4},
    "sampler": {"class": "DPMSolver", "steps": 6},
    "class_names": ["cat", "dog, hound", *(f"thing {i}" for i in range(8))],
    "fingerprint_pending": "it is a test",
}
