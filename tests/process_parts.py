"""One of each kind: every property test runs over these lists, and a part that is not listed fails a test."""

from diffzoo.process import (
    EDM,
    ELBO,
    X0,
    BoundaryV,
    Cosine,
    DiscreteBetas,
    EDMWeight,
    Eps,
    Flow,
    Interpolated,
    LinearBeta,
    LinearLogSNR,
    LinearTime,
    MinSNR,
    OffsetCosine,
    Path,
    Prediction,
    Schedule,
    Shifted,
    Sigmoid,
    Straight,
    UniformEps,
    UniformFlow,
    UniformV,
    V,
    VarianceExploding,
    VariancePreserving,
    Weighting,
)

SCHEDULES: dict[str, Schedule] = {
    "cosine": Cosine(),
    "cosine, narrow": Cosine(-9.0, 11.0),
    "shifted 64 -> 256": Shifted(Cosine(), 64, 256),
    "shifted up": Shifted(Cosine(), 128, 32),
    "interpolated 32 -> 512": Interpolated(Shifted(Cosine(), 256, 512), Shifted(Cosine(), 32, 512)),
    "interpolated flow": Interpolated(LinearTime(), Shifted(LinearTime(), 32, 128)),
    "linear time": LinearTime(),
    "linear log-SNR": LinearLogSNR(),
    "linear beta": LinearBeta(),
    "offset cosine": OffsetCosine(),
    "DDPM": DiscreteBetas("linear"),
    "DDPM, 250 steps": DiscreteBetas("linear", 250),
    "Stable Diffusion": DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012),
    "improved DDPM": DiscreteBetas("cosine"),
    "zero terminal SNR": DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True),
}
# where a schedule in true time is capped, or continues its table: outside there is nothing to invert
INSIDE: dict[str, tuple[float, float]] = {
    "linear beta": (1e-6, 1.0),
    "offset cosine": (1e-6, 0.9999),
    "DDPM": (1e-3, 1.0),
    "DDPM, 250 steps": (4e-3, 1.0),
    "Stable Diffusion": (1e-3, 1.0),
    "improved DDPM": (1e-3, 0.999),
    "zero terminal SNR": (1e-3, 1.0),
}
PATHS: dict[str, Path] = {"preserving": VariancePreserving(), "straight": Straight(), "exploding": VarianceExploding()}
# the same classes and their other switches
EVERY_PATH: dict[str, Path] = {**PATHS, "straight, twice the noise": Straight(2.0)}
PREDICTIONS: dict[str, Prediction] = {"eps": Eps(), "x0": X0(), "v": V(), "flow": Flow(), "boundary v": BoundaryV(1e-4)}
WEIGHTINGS: dict[str, Weighting] = {
    "uniform eps": UniformEps(),
    "uniform v": UniformV(),
    "uniform flow": UniformFlow(),
    "uniform flow with a floor": UniformFlow(0.05, 2.0),
    "sigmoid": Sigmoid(2.0),
    "sigmoid in time": Sigmoid(-1.0, "time"),
    "min-SNR": MinSNR(),
    "EDM": EDM(),
    "EDMWeight": EDMWeight(),
    "ELBO": ELBO(),
}
