"""Input transforms: names, factors, inversion; patching plus a 1x1 convolution is the convolution of size p."""

import pytest
import torch
from torch.nn import functional as F

from diffzoo.errors import UserError
from diffzoo.nn.patches import InputTransform, transform_factor

FACTORS = {"none": 1, "patch-1": 1, "patch-2": 2, "patch-4": 4, "dwt-1": 2, "dwt-2": 4}


@pytest.mark.parametrize("name", FACTORS)
def test_factor_and_inverse(name: str) -> None:
    transform, f = InputTransform(name), FACTORS[name]
    assert transform_factor(name) == transform.factor == f
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = transform(x)
    assert y.shape == (2, 3 * f * f, 8 // f, 8 // f)
    torch.testing.assert_close(transform.inverse(y), x)
    assert not list(transform.parameters())
    assert not list(transform.buffers())


@pytest.mark.parametrize("name", ["patch", "patch-0", "dwt", "dwt-x", "Patch-2", "haar-1", ""])
def test_unknown_names_say_the_forms(name: str) -> None:
    with pytest.raises(UserError, match=r"expected 'none', 'patch-p' .* or 'dwt-levels'"):
        InputTransform(name)


@pytest.mark.parametrize("p", [2, 4])
def test_patching_is_a_strided_convolution_and_back_a_transposed_one(p: int) -> None:
    transform, x = InputTransform(f"patch-{p}"), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    kernel = torch.randn(5, 3, p, p, dtype=torch.float64)
    patches = F.conv2d(transform(x), kernel.reshape(5, -1, 1, 1))
    torch.testing.assert_close(patches, F.conv2d(x, kernel, stride=p))
    back = transform.inverse(F.conv2d(patches, kernel.reshape(5, -1).T[:, :, None, None]))
    torch.testing.assert_close(back, F.conv_transpose2d(patches, kernel, stride=p))
