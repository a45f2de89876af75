/* The C interface of proxbit's CPU kernels: plain pointers and sizes, no torch, no global state.
 *
 * Packed weights come as in the checkpoint: row-major bits, least significant first, 1 is +1, padding bits are 0. A
 * kernel may want them in another order ("tiles"); proxbit_repack makes that once, when a layer is first used. */
#ifndef PROXBIT_H
#define PROXBIT_H

#include <stdint.h>

#if defined(_WIN32)
#define PROXBIT_API __declspec(dllexport)
#else
#define PROXBIT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What activations are multiplied as. */
enum proxbit_format { PROXBIT_W1 = 0, PROXBIT_W1A8 = 1, PROXBIT_W1A1 = 2, PROXBIT_FORMATS = 3 };
/* Type of x and y. Everything else that is floating point is fp32. */
enum proxbit_dtype { PROXBIT_FLOAT32 = 0, PROXBIT_BFLOAT16 = 1 };

typedef void (*proxbit_task)(int64_t begin, int64_t end, void *context);
/* Runs the task on parts of begin..end, in any threads; the signature of torch_parallel_for. */
typedef int32_t (*proxbit_parallel_for)(int64_t begin, int64_t end, int64_t grain, proxbit_task task, void *context);

/* One call of a linear layer: y[m, n] = scale[n] * sum_k s[n, k] a[m, k] + bias[n], s the signs of the weight and
 *   W1     a = x, summed in fp32; the ISA amx takes numbers below 2^-126 for zero
 *   W1A8   a = step[m] * q[m, k], step[m] = max_k |x[m, k]| / 127, q = round(x / step) to even, summed exactly;
 *          with levels, step is the first of them for every row, and q is clipped to the other two
 *   W1A1   a = +1 where x[m, k] >= levels[k] (0 without), else -1, summed exactly
 * With a norm_weight, x is first made (x - mean) / sqrt(variance + norm_eps) * norm_weight + norm_bias, row by row.
 * A row of W1A8 that holds NaN gives NaN. Without levels one with infinity does too, and one whose largest |x| is below
 * 1e-30 counts as zero. */
struct proxbit_linear_call {
    int64_t isa;     /* index, see proxbit_isa_name */
    int64_t format;  /* enum proxbit_format */
    int64_t dtype;   /* enum proxbit_dtype */
    int64_t rows;    /* M */
    int64_t inputs;  /* K */
    int64_t outputs; /* N */
    const void *x;   /* [M, K] */
    int64_t x_stride; /* elements from row to row */
    const uint8_t *tiles;
    const float *scale;     /* [N] */
    const float *bias;      /* [N] or null */
    const float *levels;    /* W1A1: [K] or null; W1A8: step, lowest <= 0, highest >= 0, within 127, or null */
    void *y;                /* [M, N], contiguous */
    proxbit_parallel_for parallel_for; /* null: one thread */
    int64_t threads;                   /* how many the pool has */
    int64_t gelu;                      /* 1: y is x Phi(x) of the above */
    const float *norm_weight;          /* [K] or null */
    const float *norm_bias;            /* [K], null where norm_weight is */
    double norm_eps;
};

/* The ISAs (instruction sets) in this library, fastest first: their names, null past the last one, and whether this
 * processor and its system run them. */
PROXBIT_API const char *proxbit_isa_name(int64_t isa);
PROXBIT_API int32_t proxbit_isa_runs(int64_t isa);

/* Bytes of the tiles of a weight; 0 where the kernel reads the checkpoint's own order. */
PROXBIT_API int64_t proxbit_tile_bytes(int64_t isa, int64_t format, int64_t outputs, int64_t inputs);
PROXBIT_API void proxbit_repack(int64_t isa, int64_t format, const uint8_t *bits, int64_t outputs, int64_t inputs,
                               uint8_t *tiles);

PROXBIT_API void proxbit_linear(const struct proxbit_linear_call *call);

/* bits[o, j] has bit b set where values[o, 8 j + b] >= 0. */
PROXBIT_API void proxbit_pack_signs(int64_t isa, int64_t dtype, const void *values, int64_t rows, int64_t columns,
                                    int64_t stride, uint8_t *bits, proxbit_parallel_for parallel_for);
/* values[o, i] = +1 or -1, in fp32, contiguous. */
PROXBIT_API void proxbit_unpack_signs(int64_t isa, const uint8_t *bits, int64_t rows, int64_t columns, float *values,
                                      proxbit_parallel_for parallel_for);

/* Forward and backward quantizers; u, w / divisor of latent weights, and mu are their arguments. */
enum proxbit_function {
    PROXBIT_ONE = 0,               /* 1 */
    PROXBIT_BOX = 1,               /* 1 where |u| <= 1, else 0 */
    PROXBIT_SIGN = 2,              /* +1 where u (w of latent weights) >= 0, else -1 */
    PROXBIT_CLIP = 3,              /* x = min(max(mu u, -1), 1) */
    PROXBIT_POLYNOMIAL = 4,        /* x (2 - |x|) */
    PROXBIT_POLYNOMIAL_SLOPE = 5,  /* mu max(2 - 2 |mu u|, 0) */
    PROXBIT_TANH = 6,              /* tanh(mu u) */
    PROXBIT_TANH_SLOPE = 7,        /* mu (1 - tanh(mu u)^2) */
    PROXBIT_SIGN_SWISH = 8,        /* t + h (1 - t^2), h = mu u / 2, t = tanh(h) */
    PROXBIT_SIGN_SWISH_SLOPE = 9,  /* mu (1 - t^2) (1 - h t) */
    PROXBIT_DECAY = 10,            /* k tanh(mu u), k = max(1 / mu, 1) */
    PROXBIT_DECAY_SLOPE = 11,      /* k mu (1 - tanh(mu u)^2) */
    PROXBIT_SERIES = 12,           /* 4 / pi times the sum of a_i sin((2 i + 1) y) / (2 i + 1), */
    PROXBIT_SERIES_SLOPE = 13,     /* 2 / pi times the sum of a_i cos((2 i + 1) y), over i = 0 .. 31, where */
    PROXBIT_FUNCTIONS = 14,        /* y = min(max(u, -pi), pi) / 2 and a_i = min(max(mu + 1 - i, 0), 1) */
};

/* One call of proxbit_quantize: result[o, k] = factor[o] * f(u), u = latent[o, k] / divisor[o], or of proxbit_gradient:
 * result[o, k] = f(u) * (factor[o] / divisor[o]) * grad[o, k]. Matrices are contiguous, [rows, columns]. */
struct proxbit_latent_call {
    int64_t isa;
    int64_t function;    /* enum proxbit_function */
    int64_t rows;
    int64_t columns;
    const double *mu;    /* one number */
    const float *latent;
    const float *grad;   /* null for proxbit_quantize */
    float *divisor;      /* [rows] */
    float *factor;       /* [rows] */
    float *result;       /* of proxbit_gradient it may be grad */
    int64_t find_divisor; /* 1: divisor[o] is first set to the mean of |latent[o]| */
    int64_t find_factor;  /* 1: factor[o] is first set to <f, latent[o]> / <f, f>; both only in proxbit_quantize */
    proxbit_parallel_for parallel_for;
};
PROXBIT_API void proxbit_quantize(const struct proxbit_latent_call *call);
PROXBIT_API void proxbit_gradient(const struct proxbit_latent_call *call);

/* What activations become in training: scale * code.
 *   INT8         code = round(x / scale) to even, each row with the scale of W1A8 without levels
 *   GRID         code = round(clip(x / scale)) to even
 *   SIGNS        u = (x - threshold) / scale;          code = f(u), or +1 where x >= threshold, else -1
 *   ZERO_OR_ONE  u = 2 (x - threshold) / scale - 1;    code = (f(u) + 1) / 2, or 1 where x >= threshold + scale / 2 */
enum proxbit_kind {
    PROXBIT_INT8 = 0,
    PROXBIT_GRID = 1,
    PROXBIT_SIGNS = 2,
    PROXBIT_ZERO_OR_ONE = 3,
    PROXBIT_KINDS = 4,
};
/* Rows whose sums are added up one after the other. */
enum { PROXBIT_PART_ROWS = 32 };

/* One call; matrices are contiguous, [rows, columns]. With b(u) of two levels, or 1 where GRID does not clip, else 0:
 *   grad = grad * b;  sums[part] = sum of that over rows, [columns], and then of
 *   grad * (code - b x / scale) (GRID), grad * code (SIGNS), grad * (code - b (u + 1) / 2) (ZERO_OR_ONE). */
struct proxbit_activations_call {
    int64_t isa;
    int64_t kind;           /* enum proxbit_kind */
    int64_t forward;        /* f, of two levels: enum proxbit_function, or -1 for the levels themselves */
    int64_t backward;       /* b, of two levels: enum proxbit_function */
    int64_t lowest;         /* codes of GRID */
    int64_t highest;
    int64_t rows;
    int64_t columns;
    const double *mu;       /* one number; as the next two, null for INT8 */
    const float *scale;     /* one number */
    const float *threshold; /* [columns]; null but for two levels */
    const float *x;
    float *values;
    float *grad;            /* null, as for INT8 */
    float *sums;            /* [ceil(rows / PROXBIT_PART_ROWS), columns + 1]; null with grad */
    proxbit_parallel_for parallel_for;
};
PROXBIT_API void proxbit_activations(const struct proxbit_activations_call *call);

/* What this library was built from, 0 past the last one: the bytes of the calls of linear layers, of latent weights and
 * of activations, and the numbers of formats, of functions and of kinds, and PROXBIT_PART_ROWS. */
PROXBIT_API const int64_t *proxbit_interface(void);

#ifdef __cplusplus
}
#endif
#endif
