"""Functions of numbers that hardware lacks, or has with fewer digits, and rounding, for Triton."""

import triton
import triton.language as tl


@triton.jit
def exp(x, DTYPE: tl.constexpr):
    """Compute exp(x) for x <= 0 to about one unit in the last place, subnormal results too."""
    if tl.float64 == DTYPE:
        result = tl.exp(x)
    else:
        # The hardware's own is off by |x| / 2 units. ln 2 in two parts, then a polynomial.
        x = tl.where(x < -110.0, -110.0, x)
        n = tl.floor(x * 1.44269504 + 0.5)
        f = (x - n * 0.693359375) + n * 2.12194440e-4
        p = 0.0083741564 + f * 0.0013843653
        p = 0.16666432 + f * (0.041668002 + f * p)
        p = 1.0 + f * (1.0 + f * (0.49999994 + f * p))
        # Two factors: one alone could not be subnormal.
        half = tl.floor(n * 0.5)
        result = p * _power_of_two(half) * _power_of_two(n - half)
    return result


@triton.jit
def term(gap):
    """Compute exp(gap), for a sum beside 1: what is subnormal in float32 may be 0.

    Hardware has the power of two. `tl.exp` takes three instructions more for subnormal numbers.
    """
    return tl.exp(gap) if gap.dtype == tl.float64 else tl.exp2(gap * 1.44269504)


@triton.jit
def _power_of_two(n):
    """Compute 2^n for whole numbers in float32, by its bits."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log1p(x, DTYPE: tl.constexpr):
    """Compute log(1 + x) for x >= 0, keeping all digits where x is small."""
    u = 1.0 + x
    if tl.float64 == DTYPE:
        small = u == 1.0
        result = tl.where(small, x, tl.log(u) * (x / tl.where(small, 1.0, u - 1.0)))
    else:
        # u = 2^k (1 + f) with 1 + f near 1; the rounding error of u is corrected to first order.
        lost = tl.where(x >= 1.0, 1.0 - (u - x), x - (u - 1.0)) / u
        bits = u.to(tl.int32, bitcast=True)
        k = (bits >> 23) - 127
        f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        high = f > 1.41421356
        f = tl.where(high, f * 0.5, f) - 1.0
        k = tl.where(high, k + 1, k).to(tl.float32)
        s = f / (2.0 + f)
        z = s * s
        series = z * (0.66666663 + z * (0.40000972 + z * (0.28498787 + z * 0.24279079)))
        half_square = 0.5 * f * f
        tail = k * 9.0580006e-6 + lost
        small = s * (half_square + series) + tail
        result = k * 0.69313812 + (f - (half_square - small))
        result = tl.where(u == u, result, u)
    return result


@triton.jit
def tanh(x, DTYPE: tl.constexpr):
    """Compute tanh(x), keeping all digits near 0."""
    z = x * x
    if tl.float64 == DTYPE:
        p = -1614.6876844170845 + z * (-99.28772310019185 + z * -0.9643991794250523)
        q = 4844.063053251255 + z * (2235.4883906010045 + z * (112.81167849163293 + z))
        near = x + x * (z * (p / q))
    else:
        p = -0.053739715 + z * (0.020639088 + z * -0.0057049887)
        near = x + x * (z * (-0.33333282 + z * (0.13331442 + z * p)))
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = 1.0 - 2.0 * (e / (1.0 + e))
    far = tl.where(x < 0.0, -far, far)
    return tl.where(size < 0.625, near, far)


@triton.jit
def split(x):
    """Split a number into two of half its digits."""
    spread = x * (134217729.0 if x.dtype == tl.float64 else 4097.0)
    high = spread - (spread - x)
    return high, x - high


@triton.jit
def narrow(x, TYPE: tl.constexpr, EMULATED: tl.constexpr):
    """Round once, to the dtype that is stored."""
    if x.dtype == tl.float64 and TYPE.primitive_bitwidth < 32:
        x = _rounded_to_odd(x)
    elif tl.bfloat16 == TYPE:
        x = x.to(tl.float32)
    if EMULATED and tl.bfloat16 == TYPE:
        # Triton's interpreter cuts off where hardware rounds to the nearest, ties to even.
        bits = tl.where(x == x, x, float("nan")).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        result = (bits >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        result = x.to(TYPE)
    return result


@triton.jit
def _rounded_to_odd(x):
    """Round a float64 to a float32 that any narrower format rounds as it would the float64.

    Where digits are lost, round to the neighbour with an odd last bit, not to the nearest.
    """
    near = x.to(tl.float32)
    back = near.to(tl.float64)
    larger = (tl.abs(back) > tl.abs(x)).to(tl.int32)
    odd = ((near.to(tl.int32, bitcast=True) - larger) | 1).to(tl.float32, bitcast=True)
    return tl.where((back == x) | (x != x), near, odd)
