"""The 5/3 wavelet: exact inversion, PyWavelets' bior2.2, JPEG 2000's lifting written out, layout of the bands."""

import pytest
import pywt
import torch

from diffzoo.nn.wavelet import dwt, idwt


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 8, 24)])
def test_inversion_is_exact(levels: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    y = dwt(x, levels)
    b, c, h, w = shape
    assert y.shape == (b, c * 4**levels, h >> levels, w >> levels)
    torch.testing.assert_close(idwt(y, levels), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(idwt(dwt(x.float(), levels), levels), x.float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("levels", [1, 2])
def test_inverse_then_transform_is_the_identity_too(levels: int) -> None:
    y = torch.randn(2, 3 * 4**levels, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(dwt(idwt(y, levels), levels), y, rtol=0, atol=1e-13)


def test_one_level_agrees_with_pywavelets() -> None:
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x[0, 0].numpy(), "bior2.2", mode="reflect")
    ours = dwt(x, 1)[0]
    # the filter bank keeps responses beyond the border: the first is one early; its high pass has the other sign
    for band, theirs, sign in zip(ours, (low, vertical, horizontal, diagonal), (1, -1, -1, 1), strict=True):
        torch.testing.assert_close(band, sign * torch.tensor(theirs)[1:9, 1:9], rtol=0, atol=1e-12)


def test_lifting_written_out() -> None:
    row = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0], dtype=torch.float64)
    extended = {-2: 4.0, -1: 1.0, 6: 5.0, **{i: float(v) for i, v in enumerate(row)}}  # mirrored about the end samples
    high = {n: extended[2 * n + 1] - (extended[2 * n] + extended[2 * n + 2]) / 2 for n in (-1, 0, 1, 2)}
    low = [extended[2 * n] + (high[n - 1] + high[n]) / 4 for n in range(3)]
    got = dwt(row.expand(1, 1, 2, 6), 1)[0, :, 0]  # two equal rows: the vertical low pass only scales by sqrt(2)
    torch.testing.assert_close(got[0], 2 * torch.tensor(low, dtype=torch.float64))
    torch.testing.assert_close(got[1], torch.tensor([high[n] for n in range(3)], dtype=torch.float64))
    assert got[2:].abs().max() < 1e-12


def test_paper_layout_of_two_levels() -> None:
    x = torch.randn(1, 3, 32, 32)
    y = dwt(x, 2)
    assert y.shape == (1, 48, 8, 8)
    once = dwt(x, 1)
    torch.testing.assert_close(y[:, :12], dwt(once[:, :3], 1))
    finer = y[:, 12:].reshape(1, 9, 2, 2, 8, 8)  # each finer band as space-to-depth, rows before columns
    torch.testing.assert_close(finer[0, :, 1, 0], once[0, 3:, 1::2, ::2])


def test_linear_and_flat_images_have_one_band() -> None:
    a, b = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(dwt(2 * a - b, 2), 2 * dwt(a, 2) - dwt(b, 2))
    y = dwt(torch.full((1, 1, 8, 8), 0.5), 2)
    torch.testing.assert_close(y[0, 0], torch.full((2, 2), 2.0))
    assert y[0, 1:].abs().max() < 1e-6


def test_white_noise_keeps_about_unit_scale() -> None:
    y = dwt(torch.randn(8, 3, 64, 64), 2)
    assert 0.4 < y.std(dim=(0, 2, 3)).min() < y.std(dim=(0, 2, 3)).max() < 2.2


def test_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(1, 3, 16, 16).bfloat16()
    y = dwt(x, 2)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, dwt(x.float(), 2).bfloat16(), rtol=0, atol=0)
