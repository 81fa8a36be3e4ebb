"""The public surface: every listed name resolves, and unlisted names fail with the module's name."""

import pytest

import diffzoo


@pytest.mark.parametrize("name", diffzoo.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(diffzoo, name) is not None


def test_public_names_are_listed_by_dir() -> None:
    assert set(diffzoo.__all__) <= set(dir(diffzoo))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = diffzoo.creat_model


@pytest.mark.parametrize(
    "package", ["process", "models", "sampling", "data", "training", "metrics", "evaluation", "encoders", "zoo"]
)
def test_every_package_has_a_docstring_and_exports_resolve(package: str) -> None:
    module = __import__(f"diffzoo.{package}", fromlist=["__all__"])
    assert module.__doc__
    for name in module.__all__:
        assert getattr(module, name) is not None
