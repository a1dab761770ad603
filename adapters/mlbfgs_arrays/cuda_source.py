"""The bodies of the CUDA kernels, in the C of `cupy.ElementwiseKernel`.

`i` is the number of the thread or of the value. Single letters are dtypes: `T` the averages', `P` the
parameter's, `G` that of a gradient, of its whitened form or of an averaged value, `H` the history's. With
`DIAGONAL` a body forms `R` from the mean of squares; `ROOT` is the power. A pass that sums is a loop of
`threads` threads at equal distances; each adds up its own part of the sums, in the order of the leaf.
"""

from __future__ import annotations

__all__ = ["BODIES", "OWN_VALUES"]

OWN_VALUES = "for (long long k = i; k < length; k += threads)"
"""What `OWN_VALUES` stands for in a body."""

_WHITEN = """
    T products[ROWS > 0 ? ROWS : 1];
    #pragma unroll
    for (int row = 0; row < ROWS; ++row) products[row] = 0;
    T grad_square = 0, white_square = 0, scatter = 0;
    OWN_VALUES {
        const T g = static_cast<T>(grad[k]);
        T z = g;
        grad_square += g * g;
#ifdef DIAGONAL
        const T v = exp_avg_sq[k];
        const T r = ROOT(v + weight * (g * g - v) + least);
        kept[k] = r;
        z *= r;
        white_square += z * z;
#endif
#ifdef SCATTER
        T off = g - mean[k];
#ifdef DIAGONAL
        off *= r;
#endif
        scatter += off * off;
#endif
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            products[row] += static_cast<T>(history[row * length + k]) * z;
        }
    }
    #pragma unroll
    for (int row = 0; row < ROWS; ++row) sums[row * threads + i] = products[row];
    sums[ROWS * threads + i] = grad_square;
    sums[(ROWS + 1) * threads + i] = white_square;
    last = scatter;
"""

_TIMES = """
    T products[ROWS];
    #pragma unroll
    for (int row = 0; row < ROWS; ++row) products[row] = 0;
    OWN_VALUES {
        const T value = static_cast<T>(x[k]);
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            products[row] += static_cast<T>(rows[row * length + k]) * value;
        }
    }
    #pragma unroll
    for (int row = 0; row < ROWS - 1; ++row) sums[row * threads + i] = products[row];
    last = products[ROWS - 1];
"""

_DIRECT = """
    T total = 0;
    OWN_VALUES {
        T z = static_cast<T>(grad[k]);
#ifdef DIAGONAL
        const T r = kept[k];
        z *= r;
#endif
        T d = 0;
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            d += coefficients[row] * static_cast<T>(history[row * length + k]);
        }
        d += gamma * z;
#ifdef DIAGONAL
        d *= r;
#endif
        d = keep ? d : T(0);
        update[k] = d;
        total += d * d;
    }
    square = total;
"""

_PAIR = """
        T s = valid ? now_p[k] - prev_p[k] : T(0);
        T y = valid ? now_g[k] - prev_g[k] : T(0);
#ifdef DIAGONAL
        const T r = ROOT(exp_avg_sq[k] + least);
        s /= r;
        y *= r;
#endif
"""

_LARGEST = (
    """
    T s_most = 0, y_most = 0;
    OWN_VALUES {
"""
    + _PAIR
    + """        s = s < 0 ? -s : s;
        y = y < 0 ? -y : y;
        s_most = s <= s_most ? s_most : s;
        y_most = y <= y_most ? y_most : y;
    }
    s_scale = s_most;
    y_scale = y_most;
"""
)

_PAIR_PRODUCTS = (
    """
    T s_square = 0, both = 0, y_square = 0;
    OWN_VALUES {
"""
    + _PAIR
    + """        s /= s_scale > 0 ? s_scale : T(1);
        y /= y_scale > 0 ? y_scale : T(1);
        s_square += s * s;
        both += s * y;
        y_square += y * y;
    }
    ss = s_square;
    sy = both;
    yy = y_square;
"""
)

_WRITE_PAIR = (
    """
    if (keep) {
        const long long k = i;
"""
    + _PAIR
    + """        s *= inverse_norm;
        y *= inverse_norm;
        history[slot * length + k] = static_cast<H>(s);
        history[(slots + slot) * length + k] = static_cast<H>(y_weight * y + s_weight * s);
    }
"""
)

_AVERAGE = """
    if (keep) {
        const T given = static_cast<T>(value);
        const T x = isfinite(given) ? given : T(0);
#ifdef SQUARED
        mean += weight * (x * x - mean);
#else
        mean += weight * (x - mean);
#endif
    }
"""

_ROTATE = """
    if (turn) {
        before = now;
        if (restart) now = 0;
    }
"""

_APPLY = """
    if (keep) {
        T change = length * update;
#ifdef MOMENTUM
#ifdef NESTEROV
        buffer = momentum * buffer + change;
        change += momentum * buffer;
#else
        change += momentum * buffer;
        buffer = change;
#endif
#endif
        const T value = static_cast<T>(param);
        if (isfinite(value)) {
            param = static_cast<P>(value * (T(1) - lr * weight_decay) - lr * change);
        }
    }
"""

BODIES = {
    "whiten": _WHITEN,
    "times": _TIMES,
    "direct": _DIRECT,
    "largest": _LARGEST,
    "pair_products": _PAIR_PRODUCTS,
    "write_pair": _WRITE_PAIR,
    "average": _AVERAGE,
    "rotate": _ROTATE,
    "apply": _APPLY,
}
"""The bodies, by the kernels' names."""
