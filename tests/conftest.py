"""Shared test set-up: reproducible Hypothesis, one thread per process, seeds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in every process that tests start: they share few cores

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=60)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core for a whole folder of tests; this one alone for a few files, and beside a browser."""
    alone = config.option.markexpr == "browser" or any(".py" in arg for arg in config.args)
    return 0 if alone else min(os.cpu_count() or 1, 8)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test begins with the same random numbers, and those of a device only where it is."""
    if (marker := request.node.get_closest_marker("gpu")) is not None:
        device = marker.args[0] if marker.args else "cuda"
        if not (torch.backends.mps.is_available() if device == "mps" else torch.cuda.is_available()):
            pytest.skip(f"needs a device of type {device}")
    torch.manual_seed(0)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of networks that a test registers are gone after it."""
    from diffzoo.models import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """`diffzoo fit` draws no page about its run, which takes a third of the time of a small one."""
    monkeypatch.setattr("diffzoo.cli.fit.report_of_run", lambda directory: None)
