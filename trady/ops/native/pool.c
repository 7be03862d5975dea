/* Max pooling that writes the place of each maximum inside its window, one byte an output.
 *
 * Geometry g: planes, channels that lie side by side at a position (1: contiguous layout), input height and width h, w,
 * output height and width oh, ow, then kernel kh, kw, stride sh, sw, padding ph, pw, dilation dh, dw. o is a row of the
 * output, a and b row and column in the window, c the channels, code = a * kw + b the place of an input in its window.
 * The first maximum in window order wins and NaN wins over everything, as in PyTorch.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define STRIP 128 /* outputs that are compared at once: values and places stay in the nearest cache */

typedef struct {
    int64_t planes, channels, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;
} Geometry;

static inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

#define DEFINE_POOL(T, I, NAME)                                                                                      \
    /* Outputs whose inputs lie `step` apart. */                                                                     \
    static inline __attribute__((always_inline)) void compare_##NAME(const T *x, int64_t step, T *best, I *place,    \
                                                                     int64_t outputs, I code) {                      \
        for (int64_t i = 0; i < outputs; i++) {                                                                      \
            const T v = x[i * step];                                                                                 \
            const int wins = (v > best[i]) | (v != v);                                                               \
            best[i] = wins ? v : best[i];                                                                            \
            place[i] = wins ? code : place[i];                                                                       \
        }                                                                                                            \
    }                                                                                                                \
                                                                                                                     \
    static void put_##NAME(const T *best, const I *place, T *y, uint8_t *local, int64_t outputs) {                   \
        memcpy(y, best, (size_t)outputs * sizeof(T));                                                                \
        if (local)                                                                                                   \
            for (int64_t i = 0; i < outputs; i++) local[i] = (uint8_t)place[i];                                      \
    }                                                                                                                \
                                                                                                                     \
    /* One row of outputs of one plane. */                                                                           \
    static void row_##NAME(const T *x, T *y, uint8_t *local, int64_t o, const Geometry *g) {                         \
        T best[STRIP];                                                                                               \
        I place[STRIP];                                                                                              \
        const int64_t top = o * g->sh - g->ph;                                                                       \
        const int64_t first = ceil_div(-top, g->dh);                                                                 \
        for (int64_t from = 0; from < g->ow; from += STRIP) {                                                        \
            const int64_t n = g->ow - from < STRIP ? g->ow - from : STRIP;                                           \
            for (int64_t i = 0; i < n; i++) {                                                                        \
                const int64_t left = (from + i) * g->sw - g->pw;                                                     \
                best[i] = -(T)INFINITY;                                                                              \
                place[i] = (I)(first * g->kw + ceil_div(-left, g->dw));                                              \
            }                                                                                                        \
            for (int64_t a = first; a < g->kh && top + a * g->dh < g->h; a++) {                                      \
                const T *line = x + (top + a * g->dh) * g->w;                                                        \
                for (int64_t b = 0; b < g->kw; b++) {                                                                \
                    const int64_t shift = b * g->dw - g->pw; /* input column of output 0 */                          \
                    int64_t low = ceil_div(-shift, g->sw), high = ceil_div(g->w - shift, g->sw);                     \
                    low = (low > from ? low : from) - from;                                                          \
                    high = (high < from + n ? high : from + n) - from;                                               \
                    if (high <= low) continue;                                                                       \
                    const T *start = line + (from + low) * g->sw + shift;                                            \
                    const I code = (I)(a * g->kw + b);                                                               \
                    if (g->sw == 1) compare_##NAME(start, 1, best + low, place + low, high - low, code);             \
                    else if (g->sw == 2) compare_##NAME(start, 2, best + low, place + low, high - low, code);        \
                    else compare_##NAME(start, g->sw, best + low, place + low, high - low, code);                    \
                }                                                                                                    \
            }                                                                                                        \
            put_##NAME(best, place, y + from, local ? local + from : 0, n);                                          \
        }                                                                                                            \
    }                                                                                                                \
                                                                                                                     \
    /* One row of outputs whose channels lie side by side. */                                                        \
    static void row_last_##NAME(const T *x, T *y, uint8_t *local, int64_t o, const Geometry *g) {                    \
        T best[STRIP];                                                                                               \
        I place[STRIP];                                                                                              \
        const int64_t top = o * g->sh - g->ph, c = g->channels;                                                      \
        const int64_t first = ceil_div(-top, g->dh);                                                                 \
        for (int64_t p = 0; p < g->ow; p++) {                                                                        \
            const int64_t left = p * g->sw - g->pw, start = ceil_div(-left, g->dw);                                  \
            for (int64_t from = 0; from < c; from += STRIP) {                                                        \
                const int64_t n = c - from < STRIP ? c - from : STRIP;                                               \
                for (int64_t i = 0; i < n; i++) {                                                                    \
                    best[i] = -(T)INFINITY;                                                                          \
                    place[i] = (I)(first * g->kw + start);                                                           \
                }                                                                                                    \
                for (int64_t a = first; a < g->kh && top + a * g->dh < g->h; a++)                                    \
                    for (int64_t b = start; b < g->kw && left + b * g->dw < g->w; b++)                               \
                        compare_##NAME(x + ((top + a * g->dh) * g->w + left + b * g->dw) * c + from, 1, best, place, \
                                       n, (I)(a * g->kw + b));                                                       \
                put_##NAME(best, place, y + p * c + from, local ? local + p * c + from : 0, n);                      \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
                                                                                                                     \
    void trady_max_pool_##NAME(const T *x, T *y, uint8_t *local, const Geometry *g) {                                \
        const int64_t inputs = g->h * g->w * g->channels, line = g->ow * g->channels;                                \
        _Pragma("omp parallel for schedule(static) if (g->planes * g->oh * line > 8192)")                            \
        for (int64_t task = 0; task < g->planes * g->oh; task++) {                                                   \
            const int64_t plane = task / g->oh, o = task % g->oh;                                                    \
            const T *from = x + plane * inputs;                                                                      \
            uint8_t *kept = local ? local + task * line : 0;                                                         \
            if (g->channels == 1) row_##NAME(from, y + task * line, kept, o, g);                                     \
            else row_last_##NAME(from, y + task * line, kept, o, g);                                                 \
        }                                                                                                            \
    }                                                                                                                \
                                                                                                                     \
    /* A task owns whole planes, or some channels of one: no two write to the same place. */                         \
    void trady_max_pool_gradient_##NAME(const T *gradient, const uint8_t *local, T *out, const Geometry *g) {        \
        const int64_t c = g->channels, parts = (c + STRIP - 1) / STRIP;                                              \
        int64_t down[256], right[256];                                                                               \
        for (int64_t i = 0; i < 256; i++) {                                                                           \
            down[i] = i / g->kw * g->dh;                                                                             \
            right[i] = i % g->kw * g->dw;                                                                            \
        }                                                                                                            \
        _Pragma("omp parallel for schedule(static) if (g->planes * g->h * g->w * c > 8192)")                         \
        for (int64_t task = 0; task < g->planes * parts; task++) {                                                   \
            const int64_t plane = task / parts, from = task % parts * STRIP;                                         \
            const int64_t n = c - from < STRIP ? c - from : STRIP;                                                   \
            T *target = out + plane * g->h * g->w * c + from;                                                        \
            if (parts == 1) memset(target, 0, (size_t)(g->h * g->w * c) * sizeof(T));                                \
            else                                                                                                     \
                for (int64_t i = 0; i < g->h * g->w; i++) memset(target + i * c, 0, (size_t)n * sizeof(T));          \
            for (int64_t o = 0; o < g->oh; o++)                                                                      \
                for (int64_t p = 0; p < g->ow; p++) {                                                                \
                    const int64_t at = ((plane * g->oh + o) * g->ow + p) * c + from;                                 \
                    const int64_t top = o * g->sh - g->ph, left = p * g->sw - g->pw;                                 \
                    for (int64_t i = 0; i < n; i++) {                                                                \
                        const int64_t row = top + down[local[at + i]], column = left + right[local[at + i]];         \
                        if (row >= 0 && row < g->h && column >= 0 && column < g->w) /* else an empty window */       \
                            target[(row * g->w + column) * c + i] += gradient[at + i];                               \
                    }                                                                                                \
                }                                                                                                    \
        }                                                                                                            \
    }

DEFINE_POOL(float, int32_t, f32)
DEFINE_POOL(double, int64_t, f64)
