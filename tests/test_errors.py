"""Messages that name what was meant."""

from pathlib import Path

import pytest

from diffzoo import create_model, list_models
from diffzoo.errors import UserError, did_you_mean, nearest
from diffzoo.models.registry import build
from diffzoo.zoo.loading import locate
from diffzoo.zoo.manifest import find_pretrained


def test_the_nearest_names_are_given_as_they_are_written() -> None:
    labels = ["Smileys & Emotion", "Animals & Nature", "Objects"]
    assert did_you_mean("Smileys", labels) == "; did you mean 'Smileys & Emotion'?"
    assert did_you_mean("ddim", ["DDIM", "EulerMaruyama"]) == "; did you mean 'DDIM'?"
    assert did_you_mean("emma", ["Ema", "EMA", "raw"]) in ("; did you mean 'EMA'?", "; did you mean 'Ema'?")


def test_few_names_are_listed_and_many_are_not() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", [f"name{i}" for i in range(13)]) == ""
    assert did_you_mean("zzz", []) == ""


def test_dashes_make_no_options_alike() -> None:
    options = ["--init", "--npz", "--seeds"]
    assert nearest("--n", options) == ""
    assert nearest("--seed", options) == "; did you mean '--seeds'?"


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda: build("nowhere"), "unknown model 'nowhere'; `diffzoo list` shows all names"),
        (
            lambda: find_pretrained("nowhere"),
            "no published weights for 'nowhere'; `diffzoo.list_pretrained()` names them all",
        ),
        (lambda: find_pretrained("dimr_xl_265"), "no published weights for 'dimr_xl_265'; did you mean 'dimr_xl_256'"),
        (lambda: find_pretrained("adm_*"), "no published weights for 'adm_*'; did you mean 'adm_"),
        (lambda: find_pretrained(""), "no published weights for ''"),
        (lambda: create_model("*"), "unknown model '*'"),
        (lambda: create_model(None), "expected the name of a model, got None"),
        (lambda: create_model(""), "unknown model ''"),
        (lambda: create_model(3), "expected the name of a model, got 3"),
        (lambda: create_model("adm_64", pretrained=" "), "pretrained is an empty text"),
        (lambda: locate(None), "expected a source of weights, a name or a path, got None"),
        (
            lambda: locate("https://example.org/w.pt"),
            "https://example.org/w.pt is no page of the Hub: download the file",
        ),
        (lambda: locate("/no/where"), "there is no file or folder /no/where"),
        (lambda: locate(Path("nowhere")), "there is no file or folder nowhere"),
        (lambda: list_models(filter="adm*"), "list_models has no argument 'filter'"),
        (lambda: list_models("*", "adm"), "list_models has no argument 'module'"),
        (lambda: list_models(3), "expected shell patterns such as 'simple_*', got 3"),
        (lambda: list_models(kind="x"), "expected kind to be one of 'denoiser', 'classifier', got 'x'"),
        (
            lambda: list_models(kind="classifer"),
            "expected kind to be one of 'denoiser', 'classifier', got 'classifer'; did you mean 'classifier'?",
        ),
    ],
)
def test_an_unknown_name_says_where_the_names_are(look, message: str) -> None:
    with pytest.raises(UserError) as caught:
        look()
    assert str(caught.value).startswith(message)
