"""Power-function averages of weights and their reconstruction after training, after EDM2 (arXiv:2312.02696).

The average of a trajectory θ(τ) at time t with the power profile of exponent γ is

    θ̂_γ(t) = ∫₀ᵗ p_γ,t(τ) θ(τ) dτ,   p_γ,t(τ) = (γ + 1) τ^γ / t^(γ+1)            (1)   Eq. 1 there

and is kept up to date by θ̂ ← β θ̂ + (1 − β) θ with

    β(t) = (1 − 1/t)^(γ+1)                                                        (2)   Eq. 127, t = 1, 2, …

which is (1) exactly, for a trajectory that is constant between updates. The width of a profile is stated by its
standard deviation relative to t,

    σ = (γ+1)^½ / ((γ+2) (γ+3)^½),   0 < σ ≤ 12^-½ (the uniform average, γ = 0)   (3)   Eq. 123

A profile that was not kept is the least-squares combination of those that were: with A_ij = ⟨p_i, p_j⟩ over all
snapshots and b_i = ⟨p_i, p_target⟩, the weights solve A x = b (Section C.3) and are divided by their sum, so that
weights that never changed stay what they are. For t_a ≤ t_b,

    ⟨p_a, p_b⟩ = (γ_a + 1)(γ_b + 1) / (γ_a + γ_b + 1) · (t_a / t_b)^γ_b / t_b     (4)   Eq. 138
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.runs import list_checkpoints
from diffzoo.tensors import cast, write_tensors
from diffzoo.training.snapshots import Snapshot, list_snapshots
from diffzoo.zoo.loading import locate
from diffzoo.zoo.saving import save_weights

__all__ = [
    "coefficients",
    "mismatch",
    "power_decay",
    "power_gamma",
    "power_std",
    "reconstruct",
    "write_reconstructed",
]

MAX_STD = 12**-0.5
REACHED = 0.05  # a profile with a larger `mismatch` is not the one that was asked for


def power_std(gamma: float) -> float:
    """Relative standard deviation of the profile with exponent `gamma` — (3) above."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_gamma(std: float) -> float:
    """The exponent of the profile with relative standard deviation `std`: the inverse of (3).

    (3) is the cubic γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻² = 0, whose largest root is wanted (Viète's formula).

    Raises:
        UserError: if `std` lies outside (0, 0.2887].
    """
    if not 0 < std <= MAX_STD:
        raise UserError(f"the relative width of an average must lie in (0, {MAX_STD:.4f}], got {std:g}")
    inverse = std**-2
    p, q = -1 / 3 - inverse, 2 / 27 + 4 / 3 * inverse  # of the cubic without its square, in γ + 7/3
    angle = math.acos(max(-1.0, min(1.0, 3 * q / (2 * p) * math.sqrt(-3 / p)))) / 3
    return 2 * math.sqrt(-p / 3) * math.cos(angle) - 7 / 3


def power_decay(updates: int, gamma: float) -> float:
    """β of (2) for the update that makes `updates` of them, counted from 1."""
    return (1 - 1 / updates) ** (gamma + 1)


def _products(
    t_a: Float64[Tensor, " a"],
    gamma_a: Float64[Tensor, " a"],
    t_b: Float64[Tensor, " b"],
    gamma_b: Float64[Tensor, " b"],
) -> Float64[Tensor, "a b"]:
    """Inner products (4) of every profile of the first list with every one of the second."""
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    later = torch.where(t_a < t_b, gamma_b, gamma_a)
    ratio = torch.minimum(t_a, t_b) / torch.maximum(t_a, t_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factor * ratio**later / torch.maximum(t_a, t_b)


def _vectors(profiles: Sequence[tuple[float, float]]) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    table = torch.tensor(profiles, dtype=torch.float64).reshape(-1, 2)
    return table[:, 0], torch.tensor([power_gamma(s) for s in table[:, 1].tolist()], dtype=torch.float64)


def coefficients(profiles: Sequence[tuple[float, float]], updates: float, std: float) -> Float64[Tensor, " n"]:
    """Weights of the snapshots, each (updates, relative width), that come closest to a profile; their sum is 1."""
    t, gamma = _vectors(profiles)
    t_target, gamma_target = _vectors([(updates, std)])
    matrix = _products(t, gamma, t, gamma) * updates  # in units of the target's time: all entries near 1
    vector = _products(t, gamma, t_target, gamma_target) * updates
    x = torch.linalg.lstsq(matrix, vector, driver="gelsd").solution[:, 0]
    return x / x.sum()


def mismatch(profiles: Sequence[tuple[float, float]], updates: float, std: float) -> float:
    """How far the reconstruction of a profile is from it: ‖Σ xᵢ pᵢ − p‖ / ‖p‖, where x are its `coefficients`."""
    x = coefficients(profiles, updates, std)
    t, gamma = _vectors(profiles)
    t_target, gamma_target = _vectors([(updates, std)])
    own = float(_products(t_target, gamma_target, t_target, gamma_target))
    cross = float(x @ _products(t, gamma, t_target, gamma_target)[:, 0])
    square = own - 2 * cross + float(x @ _products(t, gamma, t, gamma) @ x)
    return math.sqrt(max(square, 0.0) / own)


def _combine(paths: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of the files, one file open at a time, summed in float64."""
    from safetensors import safe_open

    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path, weight in zip(paths, weights, strict=True):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if total and names != set(total):
                odd = sorted(names ^ set(total))[0]
                raise UserError(
                    f"the snapshots hold different parameters ({odd!r} is not in all): are they of one run?"
                )
            for name in names:
                value = file.get_tensor(name)
                dtypes[name] = torch.promote_types(value.dtype, torch.float32)
                if name not in total:
                    total[name] = torch.zeros(value.shape, dtype=torch.float64)
                total[name].add_(value.double(), alpha=weight)
    return {name: total[name].to(dtypes[name]) for name in sorted(total)}


def reconstruct(snapshots: Sequence[Snapshot], std: float, updates: int | None = None) -> dict[str, Tensor]:
    """The power-function average of relative width `std`, from snapshots of other widths and times.

    Args:
        snapshots: of one run, at least one (`list_snapshots`).
        std: relative width, in (0, 0.2887].
        updates: time of the average; default: that of the last snapshot. Later snapshots are not used.

    Returns:
        name to tensor, float32.
    """
    end = max(s.updates for s in snapshots) if updates is None else updates
    used = [s for s in snapshots if s.updates <= end]
    if not used:
        raise UserError(f"no snapshot at or before update {end}: the first is at {min(s.updates for s in snapshots)}")
    x = coefficients([(s.updates, s.std) for s in used], end, std)
    return _combine([s.path for s in used], x.tolist())


def write_reconstructed(
    run: str, stds: Sequence[float], updates: int | None = None, output: str | Path | None = None
) -> list[Path]:
    """Reconstruct EMAs of some relative widths, write each as a file that can be loaded, and say where.

    `updates` is their time in optimizer steps, None = the last snapshot; `output` None = `averages/reconstructed` in
    the run.
    """
    snapshots = list_snapshots(run)
    end = updates or max(s.updates for s in snapshots)
    folder = Path(output) if output else snapshots[0].path.parent / "reconstructed"
    paths = []
    for std in stds:
        tensors = reconstruct(snapshots, std, end)
        used = [(s.updates, s.std) for s in snapshots if s.updates <= end]
        error = mismatch(used, end, std)
        path = folder / f"power_{std:.3f}_{end:08d}.safetensors"
        _write(run, tensors, path, {"std": std, "updates": end, "mismatch": error})
        print(f"width {std:g} at update {end}: {path}  ({len(used)} snapshots, profile off by {100 * error:.2g} %)")
        if error > REACHED:
            print(f"  width {std:g} is not reached: ask for one nearer to those of the snapshots, or keep more of them")
        paths.append(path)
    return paths


def _write(run: str, tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, float]) -> None:
    """Write an average: complete, and saying which network it is of, if the run has a checkpoint that knows."""
    found = list_checkpoints(run)
    if not found:
        write_tensors(path, tensors, {"format": "pt", **{k: str(v) for k, v in metadata.items()}})
        return
    raw = locate(found[0], "raw")
    state = dict(raw.state) | {n: cast(n, v, raw.state[n].dtype, run) for n, v in tensors.items()}
    save_weights(state, raw.metadata.derived(reconstructed=metadata, weights=None, file=None), path)
