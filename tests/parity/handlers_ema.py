"""EDM2's power-function EMAs: exponents, decays and the post-hoc solver, recorded from NVlabs' code."""

from pathlib import Path

import torch
from golden_case import Handler, Json, Tensors

from diffzoo.training.reconstruction import coefficients, power_decay, power_gamma


def _is_ema(case: Json) -> bool:
    return case.get("model") == "EDM2 EMA and rate"


def _run(case: Json, t: Tensors, folder: Path) -> None:
    limit = case["tolerance"]["out"]

    def check(got: object, want: torch.Tensor) -> None:
        got = torch.as_tensor(got, dtype=torch.float64)
        # coefficients next to nothing have no correct digit on either side
        torch.testing.assert_close(got, want, rtol=limit, atol=1e-12)

    gammas = [power_gamma(std) for std in case["stds"]]
    check(gammas, t["out/exponent"])
    check([[power_decay(n // 2048, g) for g in gammas] for n in (4096, 204800, 10240000)], t["out/beta"])
    profiles = list(zip(t["in/snapshot_at"].tolist(), t["in/snapshot_std"].tolist(), strict=True))
    solved = [coefficients(profiles, 400, std) for std in case["out_stds"]]
    check(torch.stack(solved, dim=1), t["out/coefficients"])


HANDLERS: list[Handler] = [(_is_ema, _run)]
