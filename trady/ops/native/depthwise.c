/* Depthwise convolution, plane by plane: forward, gradient of the input, gradient of the weight.
 *
 * A plane is copied, padded, into sh * sw phases (every sh-th row and sw-th column), each with rows of the same
 * pitch. There every tap of the kernel reads one straight run of memory at a fixed shift, whatever the stride, and
 * the inner loops know neither borders nor rows. The columns between the output's width and the pitch are junk in
 * the output and zeros in the gradient.
 *
 * Letters of Geometry: h, w height and width of the input, oh, ow of the output, kh, kw of the kernel; sh, sw stride;
 * top, left zeros in front; dh, dw dilation. a, b row and column of a phase, t a tap (row kh * column kw), c a channel,
 * n a sample, r a row, s a selected channel.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK (4 * LANES) /* results that stay in registers */
#define MOST_TAPS 256

typedef float Lanes __attribute__((vector_size(LANES * 4)));

typedef struct {
    int64_t samples, channels, h, w, oh, ow, kh, kw, sh, sw, top, left, dh, dw;
} Geometry;

typedef struct {
    int64_t rows, pitch, phase, phases, margin, taps, slack; /* slack: what may be read after the last phase */
    int64_t phase_of[MOST_TAPS], shift[MOST_TAPS];
} Plan;

static inline __attribute__((always_inline)) Lanes load(const float *p) {
    Lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline __attribute__((always_inline)) void store(float *p, Lanes v) { memcpy(p, &v, sizeof v); }

static void make_plan(const Geometry *g, Plan *p) {
    const int64_t down = (g->kh - 1) * g->dh / g->sh, right = (g->kw - 1) * g->dw / g->sw;
    p->rows = g->oh + down;
    p->pitch = g->ow + right;
    p->phase = p->rows * p->pitch;
    p->phases = g->sh * g->sw;
    p->margin = down * p->pitch + right;
    p->taps = g->kh * g->kw;
    p->slack = right + BLOCK;
    for (int64_t t = 0; t < p->taps; t++) {
        const int64_t y = t / g->kw * g->dh, x = t % g->kw * g->dw;
        p->phase_of[t] = y % g->sh * g->sw + x % g->sw;
        p->shift[t] = y / g->sh * p->pitch + x / g->sw;
    }
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* memcpy of a few numbers without a call: rows of small planes are short. */
static inline __attribute__((always_inline)) void copy(float *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    if (n - i >= 8) { memcpy(to + i, from + i, 32); i += 8; }
    if (n - i >= 4) { memcpy(to + i, from + i, 16); i += 4; }
    if (n - i >= 2) { memcpy(to + i, from + i, 8); i += 2; }
    if (n - i >= 1) to[i] = from[i];
}

/* Copy one plane of the input into its phases; the zeros around it are there already and stay. */
static void split(const float *x, float *out, const Geometry *g, const Plan *p) {
    for (int64_t a = 0; a < g->sh; a++) {
        const int64_t first = smaller(ceil_div(g->top - a, g->sh), p->rows);
        const int64_t last = smaller(ceil_div(g->h + g->top - a, g->sh), p->rows);
        for (int64_t b = 0; b < g->sw; b++) {
            const int64_t shift = b - g->left; /* input column of column 0 */
            const int64_t low = smaller(ceil_div(-shift, g->sw), p->pitch);
            const int64_t n = smaller(ceil_div(g->w - shift, g->sw), p->pitch) - low;
            if (n <= 0) continue;
            float *row = out + (a * g->sw + b) * p->phase + first * p->pitch + low;
            const float *line = x + (first * g->sh + a - g->top) * g->w + low * g->sw + shift;
            for (int64_t r = first; r < last; r++, row += p->pitch, line += g->sh * g->w) {
                if (g->sw == 1) copy(row, line, n);
                else if (g->sw == 2 && n >= 2 * LANES) for (int64_t i = 0; i < n; i++) row[i] = line[2 * i];
                else {
                    int64_t i = 0; /* by hand: what a compiler makes of the plain loop is slow for short rows */
                    for (; i + 4 <= n; i += 4) {
                        row[i] = line[g->sw * i];
                        row[i + 1] = line[g->sw * (i + 1)];
                        row[i + 2] = line[g->sw * (i + 2)];
                        row[i + 3] = line[g->sw * (i + 3)];
                    }
                    for (; i < n; i++) row[i] = line[g->sw * i];
                }
            }
        }
    }
}

/* Copy one plane of the gradient to rows of the pitch; the zeros after each are there already and stay. */
static void spread(const float *gradient, float *out, const Geometry *g, const Plan *p) {
    for (int64_t r = 0; r < g->oh; r++) copy(out + r * p->pitch, gradient + r * g->ow, g->ow);
}

/* out[i] = bias + sum of weight[t] * at[t][i]; may write up to BLOCK - 1 results too many. */
static inline __attribute__((always_inline)) void sum_taps(const float *const *at, const float *weight, int64_t taps,
                                                           float bias, float *out, int64_t length) {
    int64_t i = 0;
    for (; i + 2 * LANES < length; i += BLOCK) {
        Lanes s0 = {0}, s1, s2, s3;
        s0 += bias;
        s1 = s2 = s3 = s0;
        for (int64_t t = 0; t < taps; t++) {
            const float *from = at[t] + i;
            const float w = weight[t];
            s0 += w * load(from);
            s1 += w * load(from + LANES);
            s2 += w * load(from + 2 * LANES);
            s3 += w * load(from + 3 * LANES);
        }
        store(out + i, s0);
        store(out + i + LANES, s1);
        store(out + i + 2 * LANES, s2);
        store(out + i + 3 * LANES, s3);
    }
    for (; i < length; i += LANES) {
        Lanes s0 = {0};
        s0 += bias;
        for (int64_t t = 0; t < taps; t++) s0 += weight[t] * load(at[t] + i);
        store(out + i, s0);
    }
}

/* y: [samples, channels, oh, ow]; returns whether there was memory for it. */
int trady_depthwise(const float *x, const float *weight, const float *bias, float *y, const Geometry *g) {
    Plan plan;
    int failed = 0;
    make_plan(g, &plan);
    const Plan *p = &plan;
    const int64_t inputs = p->phases * p->phase + p->slack, outputs = g->oh * p->pitch + BLOCK;
    _Pragma("omp parallel if (g->samples * g->channels * g->oh * g->ow > 8192)") {
        float *scratch = calloc((size_t)(inputs + outputs), sizeof(float)), *made = scratch + inputs;
        if (!scratch) failed = 1;
        _Pragma("omp for schedule(static)") for (int64_t task = 0; task < g->samples * g->channels; task++) {
            if (!scratch) continue;
            const int64_t c = task % g->channels;
            const float *at[MOST_TAPS];
            split(x + task * g->h * g->w, scratch, g, p);
            for (int64_t t = 0; t < p->taps; t++) at[t] = scratch + p->phase_of[t] * p->phase + p->shift[t];
            sum_taps(at, weight + c * p->taps, p->taps, bias ? bias[c] : 0.0f, made, g->oh * p->pitch);
            for (int64_t r = 0; r < g->oh; r++)
                copy(y + (task * g->oh + r) * g->ow, made + r * p->pitch, g->ow);
        }
        free(scratch);
    }
    return !failed;
}

/* Write the phases of one plane back to where they came from. */
static void join(const float *phases, float *out, float *line, const Geometry *g, const Plan *p) {
    const int64_t rows = smaller(p->rows * g->sh - g->top, g->h), columns = smaller(p->pitch * g->sw - g->left, g->w);
    for (int64_t y = 0; y < g->h; y++) {
        float *row = out + y * g->w;
        if (y >= rows || columns <= 0) {
            memset(row, 0, (size_t)g->w * sizeof(float));
            continue;
        }
        const int64_t r = (y + g->top) / g->sh, a = (y + g->top) % g->sh;
        const float *from = phases + a * g->sw * p->phase + r * p->pitch;
        if (g->sw == 1) copy(row, from + g->left, columns);
        else {
            if (g->sw == 2)
                for (int64_t i = 0; i < p->pitch; i++) {
                    line[2 * i] = from[i];
                    line[2 * i + 1] = from[p->phase + i];
                }
            else
                for (int64_t b = 0; b < g->sw; b++)
                    for (int64_t i = 0; i < p->pitch; i++) line[g->sw * i + b] = from[b * p->phase + i];
            copy(row, line + g->left, columns);
        }
        for (int64_t i = columns; i < g->w; i++) row[i] = 0.0f;
    }
}

/* out: [samples, channels, h, w]; returns whether there was memory for it. */
int trady_depthwise_input(const float *gradient, const float *weight, float *out, const Geometry *g) {
    Plan plan;
    int failed = 0;
    make_plan(g, &plan);
    const Plan *p = &plan;
    const int64_t spreads = p->margin + p->phase + BLOCK, joins = p->phases * p->phase + BLOCK;
    const int64_t total = spreads + joins + p->pitch * g->sw;
    _Pragma("omp parallel if (g->samples * g->channels * g->oh * g->ow > 8192)") {
        float *scratch = calloc((size_t)total, sizeof(float)), *made = scratch + spreads;
        if (!scratch) failed = 1;
        _Pragma("omp for schedule(static)") for (int64_t task = 0; task < g->samples * g->channels; task++) {
            if (!scratch) continue;
            const float *taps = weight + task % g->channels * p->taps, *at[MOST_TAPS];
            float chosen[MOST_TAPS];
            spread(gradient + task * g->oh * g->ow, scratch + p->margin, g, p);
            for (int64_t phase = 0; phase < p->phases; phase++) {
                int64_t count = 0;
                for (int64_t t = 0; t < p->taps; t++)
                    if (p->phase_of[t] == phase) {
                        at[count] = scratch + p->margin - p->shift[t];
                        chosen[count++] = taps[t];
                    }
                sum_taps(at, chosen, count, 0.0f, made + phase * p->phase, p->phase);
            }
            join(made, out + task * g->h * g->w, made + joins, g, p);
        }
        free(scratch);
    }
    return !failed;
}

/* sums[t] += sum over i of at[t][i] * gradient[i], for up to 4 taps; `length` is a multiple of LANES. */
static inline __attribute__((always_inline)) void multiply(const float *const *at, const float *gradient,
                                                           int64_t length, int64_t taps, double *sums) {
    Lanes s[4] = {{0}, {0}, {0}, {0}};
    for (int64_t i = 0; i < length; i += LANES) {
        const Lanes v = load(gradient + i);
        for (int64_t t = 0; t < taps; t++) s[t] += v * load(at[t] + i);
    }
    for (int64_t t = 0; t < taps; t++)
        for (int64_t lane = 0; lane < LANES; lane++) sums[t] += s[t][lane];
}

/* Add the weight's gradient of `count` channels to out [count, kh, kw].
 *
 * inputs: [samples, count, h, w]; gradient: [samples, channels, oh, ow], of which `index` names the channels. The
 * samples are summed in `parts` chunks, whatever the number of threads, so that results repeat.
 */
int trady_depthwise_weight(const float *inputs, const float *gradient, const int64_t *index, int64_t count, float *out,
                           const Geometry *g) {
    Plan plan;
    int failed = 0;
    make_plan(g, &plan);
    const Plan *p = &plan;
    const int64_t parts = smaller(g->samples, 8), length = ceil_div(g->oh * p->pitch, LANES) * LANES;
    const int64_t splits = p->phases * p->phase + p->slack;
    double *sums = calloc((size_t)(count * parts * p->taps), sizeof(double));
    if (!sums) return 0;
    _Pragma("omp parallel if (g->samples * count * g->oh * g->ow > 8192)") {
        float *scratch = calloc((size_t)(splits + length), sizeof(float)), *spreads = scratch + splits;
        if (!scratch) failed = 1;
        _Pragma("omp for schedule(static)") for (int64_t task = 0; task < count * parts; task++) {
            if (!scratch) continue;
            const int64_t s = task / parts, part = task % parts;
            double *total = sums + task * p->taps;
            const float *at[MOST_TAPS];
            for (int64_t t = 0; t < p->taps; t++) at[t] = scratch + p->phase_of[t] * p->phase + p->shift[t];
            for (int64_t n = g->samples * part / parts; n < g->samples * (part + 1) / parts; n++) {
                split(inputs + (n * count + s) * g->h * g->w, scratch, g, p);
                spread(gradient + (n * g->channels + index[s]) * g->oh * g->ow, spreads, g, p);
                int64_t t = 0;
                for (; t + 4 <= p->taps; t += 4) multiply(at + t, spreads, length, 4, total + t);
                for (; t < p->taps; t++) multiply(at + t, spreads, length, 1, total + t);
            }
        }
        free(scratch);
    }
    if (!failed)
        for (int64_t task = 0; task < count * parts; task++)
            for (int64_t t = 0; t < p->taps; t++) out[task / parts * p->taps + t] += (float)sums[task * p->taps + t];
    free(sums);
    return !failed;
}
