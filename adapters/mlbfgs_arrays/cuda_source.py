"""The bodies of the CUDA kernels, in the C of `cupy.ElementwiseKernel`.

`i` is the number of the thread or of the value. Single letters are dtypes: `T` that of the averages, `P` the
parameter's, `G` the gradient's, `H` the history's. A pass that sums is a loop of `threads` threads at equal
distances; each adds up its own part of the sums, in the order of the leaf.
"""

from __future__ import annotations

__all__ = ["BODIES", "OWN_VALUES"]

OWN_VALUES = "for (long long k = i; k < length; k += threads)"
"""What `OWN_VALUES` stands for in a body."""

_PROJECT = """
    T products[ROWS];
    #pragma unroll
    for (int row = 0; row < ROWS; ++row) products[row] = 0;
    T grad_square = 0, metric_square = 0, scatter = 0;
    OWN_VALUES {
        const T g = static_cast<T>(grad[k]);
        T scaled = g;
        grad_square += g * g;
#ifdef METRIC
        const T v = moment[k];
        const T q = INVERSE_POWER(v + weight * (g * g - v) + least);
        root[k] = q;
        scaled *= q;
        metric_square += scaled * scaled;
#endif
#ifdef SCATTER
        T off = g - mean[k];
#ifdef METRIC
        off *= q;
#endif
        scatter += off * off;
#endif
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            products[row] += static_cast<T>(history[row * length + k]) * scaled;
        }
    }
    #pragma unroll
    for (int row = 0; row < ROWS; ++row) sums[row * threads + i] = products[row];
    sums[ROWS * threads + i] = grad_square;
    sums[(ROWS + 1) * threads + i] = metric_square;
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

_COMBINE = """
    T total = 0;
    OWN_VALUES {
        T g = static_cast<T>(grad[k]);
#ifdef METRIC
        const T q = root[k];
        g *= q;
#endif
        T d = 0;
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            d += coefficients[row] * static_cast<T>(history[row * length + k]);
        }
        d += gamma * g;
#ifdef METRIC
        d *= q;
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
#ifdef METRIC
        s /= root[k];
        y *= root[k];
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

_UPDATE_MEANS = """
    if (keep) {
        const T p = static_cast<T>(param), g = static_cast<T>(grad);
        mean_p += weight * ((isfinite(p) ? p : T(0)) - mean_p);
        mean_g += weight * (g - mean_g);
#ifdef METRIC
        moment += moment_weight * (g * g - moment);
#endif
    }
"""

_ROTATE = """
    if (turn) {
        prev_p = now_p;
        prev_g = now_g;
        if (restart) {
            now_p = 0;
            now_g = 0;
        }
    }
"""

_DESCEND = """
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
    "project": _PROJECT,
    "times": _TIMES,
    "combine": _COMBINE,
    "largest": _LARGEST,
    "pair_products": _PAIR_PRODUCTS,
    "write_pair": _WRITE_PAIR,
    "update_means": _UPDATE_MEANS,
    "rotate": _ROTATE,
    "descend": _DESCEND,
}
"""By the kernels' names."""
