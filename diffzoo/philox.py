"""Random numbers as a function of a key and a counter, in integer arithmetic: the same bits on every device.

    words    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, section 3.3): four
             32-bit words of a 64-bit key and a 128-bit counter (element, draw, place). There is no state to keep, to
             seed or to checkpoint.
    normals  Box and Muller's transform of two pairs of words. Logarithm, sine and cosine are polynomials in float32.
             Each product, sum and root is rounded by itself and correctly, never fused with the next. So compiled and
             eager code agree bit for bit, as do a CPU and a GPU, whatever the size of the batch. (On MPS, which has
             no float64, the root is that of float32: equal to the last digit or two.)

Words are held in int64, since PyTorch has no arithmetic of unsigned integers on most devices. Products wrap modulo
2^64; the high half is masked after the shift, whose sign bits are meaningless.

On a CPU or a GPU everything becomes one kernel once that pays: after about as much work as the compilation costs.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["compile_now", "normals", "words"]

Word = Int[Tensor, "..."]
Keys = Int[Tensor, "10 2"]
RoundKeys = Sequence[Sequence[int | Tensor]]

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # what the two halves of the key grow by from round to round

# Chebyshev interpolants, lowest power first: of 2 log((3 + x) / 2), errors below 1.3e-8; and of sin and cos of 45
# degrees times sqrt(x), the sine divided by sqrt(x), errors below 2.5e-9 and 2e-10
_LOG = (
    0.8109302078, 0.6666666693, -0.111110691, 0.02469123015, -0.006176167866,
    0.001647102647, -0.0004481284413, 0.000127869891, -4.803063348e-05, 1.430558041e-05,
)  # fmt: skip
_SINE = (0.785398161, -0.08074543485, 0.002490006853, -3.595417365e-05)
_COSINE = (1, -0.308425135, 0.01585432515, -0.0003259386867, 3.529712558e-06)
_TWO_LOG_2 = 2 * math.log(2)

_CHUNK = 1 << 16  # numbers at a time in eager code on a CPU: what its cache holds
_CALL = 1 << 16  # what calling a few hundred operations costs, in numbers drawn
_COMPILE_AFTER = 1 << 28  # numbers drawn in eager code in the time that compilation takes


@cache
def round_keys(key: int) -> list[tuple[int, int]]:
    """The two 32-bit keys of each round from a key of 64 bits; its low half is the first word."""
    low, high = key & _MASK, key >> 32 & _MASK
    return [((low + r * _WEYL[0]) & _MASK, (high + r * _WEYL[1]) & _MASK) for r in range(_ROUNDS)]


@cache
def _key_tensor(key: int, device: torch.device) -> Keys:
    return torch.tensor(round_keys(key), dtype=torch.int64, device=device)


def words(key: int, element: Word, draw: Word, place: Word) -> tuple[Word, Word, Word, Word]:
    """Four words in [0, 2^32) for each counter.

    Args:
        key: 64 bits.
        element, draw: words 0 and 1 of the counter, in [0, 2^32); any shapes that broadcast.
        place: words 2 and 3, low half first.

    Returns:
        int64, of the broadcast shape.
    """
    return _rounds(round_keys(key), element, draw, place)


def _rounds(keys: RoundKeys, element: Word, draw: Word, place: Word) -> tuple[Word, Word, Word, Word]:
    a, b, c, d = element, draw, place & _MASK, place >> 32 & _MASK
    for first, second in keys:
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = ((right >> 32) ^ b ^ first) & _MASK
        c = ((left >> 32) ^ d ^ second) & _MASK
        b, d = right, left  # their high halves are cut off below
    return a, b & _MASK, c, d & _MASK


def normals(key: int, place: Int[Tensor, " s"], draw: Int[Tensor, " s"], count: int) -> Float[Tensor, "s n"]:
    """`count` standard normal numbers, float32, for each of s counters, on the device of `place`.

    Args:
        key: 64 bits.
        place: 64 bits each.
        draw: in [0, 2^32).
        count: below 2^34.
    """
    quads = -(-count // 4)
    out = _compiled(key, place, draw, quads)
    if out is None:
        out = _eager(round_keys(key), place, draw, quads)
    return out.flatten(1)[:, :count]


def _eager(keys: RoundKeys, place: Word, draw: Word, quads: int) -> Float[Tensor, "s 4 quads"]:
    element = torch.arange(quads, device=place.device)
    if place.device.type != "cpu" or 4 * quads * len(place) <= _CHUNK:
        return _quads(keys, place, draw, element)
    out = torch.empty(len(place), 4, quads, dtype=torch.float32)
    rows, columns = max(1, _CHUNK // (4 * quads)), _CHUNK // 4
    for i in range(0, len(place), rows):
        part = slice(i, i + rows)
        for k in range(0, quads, columns):
            out[part, :, k : k + columns] = _quads(keys, place[part], draw[part], element[k : k + columns])
    return out


def _quads(keys: RoundKeys, place: Word, draw: Word, element: Word) -> Float[Tensor, "s 4 quads"]:
    """Number i of quarter j belongs to word j of counter i, so that each word is written to consecutive memory."""
    a, b, c, d = _rounds(keys, element, draw[:, None], place[:, None])
    if torch.compiler.is_compiling():
        # all that follows depends on the row, so that the compiler keeps rows and columns apart, and to one loop
        row = place[:, None] & 0
        a, b, c, d = a | row, b | row, c | row, d | row
    return torch.stack([*_normal_pair(a, b), *_normal_pair(c, d)], 1)


def _normal_pair(first: Word, second: Word) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers from two words: (sqrt(-2 log u) cos v, sqrt(-2 log u) sin v).

    u = (first + 1/2) / 2^32. The lowest 30 bits of the second word are an angle within 45 degrees of an axis, the
    highest two say of which.
    """
    # u = m 2^(e - 33) with m in [1, 2], e from the bits of a float
    u = (first << 1) | 1
    e = (u.to(torch.float32).view(torch.int32) >> 23) - 127
    y = (((u << 25) >> e.to(torch.int64)) - (3 << 24)).to(torch.float32) * 2.0**-24  # 2 m - 3
    squared = (33 - e).to(torch.float32) * _TWO_LOG_2 - _polynomial(_LOG, y)
    radius = _root(squared.clamp(min=0))
    angle = (((second & 0x3FFFFFFF) << 1) - 0x3FFFFFFF).to(torch.float32) * 2.0**-30  # in units of 45 degrees
    square = angle * angle
    sine, cosine = _polynomial(_SINE, square) * angle, _polynomial(_COSINE, square)
    cosine = torch.where(second >= 1 << 31, -cosine, cosine)
    swap = (second & 1 << 30) != 0
    return radius * torch.where(swap, sine, cosine), radius * torch.where(swap, cosine, sine)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule."""
    total = x * coefficients[-1] + coefficients[-2]
    for c in reversed(coefficients[:-2]):
        total = total * x + c
    return total


def _root(x: Tensor) -> Tensor:
    """The square root, correctly rounded: eager float32 on a CPU is off by a digit (MKL)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.double().sqrt().float()
    return x.sqrt()


# -- one kernel


class _Kernel:
    """The compiled function of one device type, made once enough has been drawn without it.

    Its first numbers are compared with those of eager code: not every version of torch rounds alike on a GPU.
    """

    def __init__(self) -> None:
        self.work, self.failed, self.checked = 0, False, False
        self.function: Callable[[Keys, Word, Word, int], Tensor] | None = None

    def __call__(self, key: int, place: Word, draw: Word, quads: int) -> Tensor | None:
        # one row or one counter would be compiled apart from any number of them
        if self.failed or len(place) < 2 or quads < 2 or torch.compiler.is_compiling():
            return None
        if self.function is None:
            self.work += max(4 * quads * len(place), _CALL)
            if self.work < _COMPILE_AFTER:
                return None
            self.function = compiled_quads()
        try:
            numbers = self.function(_key_tensor(key, place.device), place, draw, quads)
            if not self.checked and not torch.equal(numbers, _eager(round_keys(key), place, draw, quads)):
                raise ArithmeticError("it rounds otherwise than eager code")
        except Exception as error:  # no compiler, or one that fails: whatever it raises, the numbers are the same
            warnings.warn(f"noise is drawn without a compiled kernel: {type(error).__name__}: {error}", stacklevel=2)
            self.failed = True
            return None
        self.checked = True
        return numbers


_KERNELS = {"cpu": _Kernel(), "cuda": _Kernel()}


def compile_now(device_type: Literal["cpu", "cuda"]) -> None:
    """Draw with the compiled kernel from the next call on, without waiting until that pays."""
    _KERNELS[device_type].work = _COMPILE_AFTER


def _compiled(key: int, place: Word, draw: Word, quads: int) -> Tensor | None:
    kernel = _KERNELS.get(place.device.type)
    return kernel(key, place, draw, quads) if kernel is not None else None


def compiled_quads() -> Callable[[Keys, Word, Word, int], Tensor]:
    """All of `normals` as one kernel for any number of counters and numbers."""

    def quads(keys: Keys, place: Word, draw: Word, count: int) -> Tensor:
        return _quads([key.unbind() for key in keys.unbind()], place, draw, torch.arange(count, device=place.device))

    options: dict[str, str | int | bool | Callable[..., object]] = {
        # nothing between the first word and the last product may be written to memory
        "realize_opcount_threshold": 1 << 20,
        "realize_reads_threshold": 1 << 20,
        # on a GPU, where a product and a sum otherwise become one operation, rounded once: other bits than eager code
        "emulate_precision_casts": True,
    }
    return torch.compile(quads, dynamic=True, options=options)
