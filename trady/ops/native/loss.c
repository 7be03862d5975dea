/* Cross-entropy of class indices, row by row, with one exponential an element in each direction.
 *
 * `x` is [rows, classes] of float32. A row whose target is `ignored` has no loss and no gradient. The caller has
 * checked that all other targets are classes. `out` may be `x`.
 *
 * Letters: x scores and out gradient, [rows, classes]; target, losses, factor [rows]; m the largest score of a row; n
 * classes; k a lane of partial sums.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16   /* partial sums side by side: a compiler may not reorder a sum by itself */
#define BLOCK 1024 /* elements that are summed up in float before the sum goes on in double */

/* exp(x) for x <= 0, to 2 units in the last place; 0 below -87, NaN for NaN. */
static inline float exponential(float x) {
    float v = x < -87.0f ? -87.0f : x;
    float n = (v * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    float r = v - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    float y = p * power;
    return x < -87.0f ? 0.0f : y;
}

static float largest(const float *x, int64_t n) {
    float lane[LANES], m = -INFINITY;
    for (int k = 0; k < LANES; k++) lane[k] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    for (int k = 0; k < LANES; k++) m = lane[k] > m ? lane[k] : m;
    return m;
}

/* Sum of exp(x - m); the terms go to `out` unless it is null. */
static double exponentials(const float *x, float *out, int64_t n, float m) {
    double total = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = start + BLOCK < n ? start + BLOCK : n, i = start;
        float lane[LANES] = {0};
        if (out)
            for (; i + LANES <= end; i += LANES)
                for (int k = 0; k < LANES; k++) {
                    float e = exponential(x[i + k] - m);
                    out[i + k] = e;
                    lane[k] += e;
                }
        else
            for (; i + LANES <= end; i += LANES)
                for (int k = 0; k < LANES; k++) lane[k] += exponential(x[i + k] - m);
        for (; i < end; i++) {
            float e = exponential(x[i] - m);
            if (out) out[i] = e;
            lane[0] += e;
        }
        for (int k = 0; k < LANES; k++) total += lane[k];
    }
    return total;
}

void trady_row_losses(const float *x, const int64_t *target, float *losses, int64_t rows, int64_t classes,
                      int64_t ignored) {
#pragma omp parallel for schedule(static) if (rows * classes > 16384)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * classes;
        if (target[r] == ignored) {
            losses[r] = 0.0f;
            continue;
        }
        float m = largest(row, classes);
        losses[r] = (float)(log(exponentials(row, 0, classes, m)) - ((double)row[target[r]] - m));
    }
}

/* out = factor[row] * (softmax(x) - onehot(target)) */
void trady_row_loss_gradient(const float *x, const int64_t *target, const float *factor, float *out, int64_t rows,
                             int64_t classes, int64_t ignored) {
#pragma omp parallel for schedule(static) if (rows * classes > 16384)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * classes;
        float *made = out + r * classes;
        if (target[r] == ignored) {
            memset(made, 0, (size_t)classes * sizeof *made);
            continue;
        }
        double total = exponentials(row, made, classes, largest(row, classes));
        float scale = (float)(factor[r] / total);
        float right = (float)((made[target[r]] / total - 1.0) * factor[r]);
        for (int64_t i = 0; i < classes; i++) made[i] *= scale;
        made[target[r]] = right;
    }
}
