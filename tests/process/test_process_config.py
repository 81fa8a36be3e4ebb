"""Processes as plain data and back."""

import json

import pytest
from process_parts import PATHS, PREDICTIONS, SCHEDULES, WEIGHTINGS

from diffzoo.errors import UserError
from diffzoo.process import Cosine, GaussianProcess, Shifted, TimeConditioning, V, from_config, to_config

PROCESSES = [
    GaussianProcess(schedule, path, prediction, noise_conditioning)
    for schedule in SCHEDULES.values()
    for path in PATHS.values()
    for prediction, noise_conditioning in (
        (PREDICTIONS["v"], TimeConditioning(1000.0, -1.0)),
        (PREDICTIONS["eps"], TimeConditioning()),
    )
]


@pytest.mark.parametrize("part", [*PROCESSES, *WEIGHTINGS.values(), *PREDICTIONS.values()], ids=str)
def test_round_trip_through_json(part: object) -> None:
    text = json.dumps(to_config(part))
    assert from_config(json.loads(text)) == part
    assert json.dumps(to_config(from_config(json.loads(text)))) == text


def test_names_stand_for_defaults() -> None:
    config = {"schedule": {"class": "Shifted", "base": "Cosine", "from_resolution": 64, "to_resolution": 256}}
    assert from_config(config, default="GaussianProcess") == GaussianProcess(Shifted(Cosine(), 64, 256))
    assert from_config("V") == V()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"class": "Cosin"}, "did you mean 'Cosine'"),
        ({"class": "Cosine", "min_logsrn": 1}, "did you mean 'min_logsnr'"),
        ({"class": "GaussianProcess", "schedule": "Cosin"}, "unknown schedule 'Cosin'; did you mean 'Cosine'"),
        ("Cosin", "did you mean 'Cosine'"),
        ({"schedule": "Cosine"}, "unknown process class None"),
        ({"class": "Interpolated", "at_data": "Cosin", "at_noise": "Cosine"}, "unknown at_data 'Cosin'"),
        ({"class": "GaussianProcess", "schedule": "Eps"}, "unknown schedule 'Eps'; known: Cosine"),
        ({"class": "Cosine", "min_logsnr": 20}, "min_logsnr < max_logsnr"),
    ],
)
def test_mistakes_are_named(config: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_config(config)
