/* Derivatives of smooth activations as codes of 8, 4 or 2 bits, and gradients that go through them.
 *
 * Element j of byte i is code `i * (8 / bits) + j`, lowest bits first. A derivative comes from the input and the output
 * of the activation where that is a line of arithmetic, else out of a table over the input, whose ends hold for all
 * that lies beyond it. NaN gets some code: the output is NaN as well.
 *
 * Letters: x, y input and output of the activation, [n]; code one code a byte, [n]; codes packed, [ceil(n * bits / 8)];
 * s a segment, i an element, m elements of a block.
 */
#include <stdint.h>
#include <string.h>

#define SEGMENT 8192 /* elements a task; a multiple of 4 so that tasks never share a byte */
#define BLOCK 256    /* elements between which codes lie one a byte */

enum form { TABLE, SIGMOID, TANH, SILU, HARDSWISH, ELU, GELU, GELU_TANH };

struct coding { /* as _Coding in smooth.py */
    const uint8_t *table;
    int64_t entries, bits, form;
    float low, scale;      /* of the table's places */
    float per_unit, zero;  /* of the codes */
    float alpha;
};

static inline float widen(uint16_t v) {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint16_t narrow(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return f != f ? 0x7FC0 : (uint16_t)rounded;
}

static inline int32_t bounded(float p, float last) {
    p = p > 0.0f ? p : 0.0f;
    return (int32_t)(p < last ? p : last);
}

/* exp(x) for -80 <= x <= 0, to five digits: more than a code can tell. */
static inline float exponential(float x) {
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f, r = x - n * 0.69314718f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * 0.041666667f)));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* y / x, which is 1/2 at 0 for all activations of the form x times something. */
static inline float factor(float x, float y) {
    float ratio = y / x;
    return x == 0.0f ? 0.5f : ratio;
}

static inline float clamped(float x) {
    float v = x > -12.0f ? x : -12.0f;
    return v < 12.0f ? v : 12.0f;
}

/* One code a byte for `n` elements. */
static void encode(const float *restrict x, const float *restrict y, uint8_t *restrict code, int64_t n,
                   const struct coding *c) {
    float alpha = c->alpha, per_unit = c->per_unit, zero = c->zero + 0.5f, last = (float)((1 << c->bits) - 1);
#define EACH(DERIVATIVE)                                                                                               \
    for (int64_t i = 0; i < n; i++) code[i] = (uint8_t)bounded((DERIVATIVE) * per_unit + zero, last);                  \
    break
    switch (c->form) {
    case SIGMOID: EACH(y[i] * (1.0f - y[i]));
    case TANH: EACH(1.0f - y[i] * y[i]);
    case SILU:
        for (int64_t i = 0; i < n; i++) {
            float s = factor(x[i], y[i]);
            code[i] = (uint8_t)bounded((s + y[i] * (1.0f - s)) * per_unit + zero, last);
        }
        break;
    case HARDSWISH: EACH(x[i] <= -3.0f ? 0.0f : x[i] >= 3.0f ? 1.0f : x[i] * (1.0f / 3.0f) + 0.5f);
    case ELU:
        for (int64_t i = 0; i < n; i++) {
            float below = y[i] + alpha;
            code[i] = (uint8_t)bounded((x[i] > 0.0f ? 1.0f : below) * per_unit + zero, last);
        }
        break;
    case GELU: /* Phi(x) + x phi(x) */
        for (int64_t i = 0; i < n; i++) {
            float v = clamped(x[i]), s = factor(x[i], y[i]) + v * 0.39894228f * exponential(-0.5f * v * v);
            code[i] = (uint8_t)bounded(s * per_unit + zero, last);
        }
        break;
    case GELU_TANH: /* s = (1 + tanh(u)) / 2, so 1 - tanh(u)^2 = 4 s (1 - s) */
        for (int64_t i = 0; i < n; i++) {
            float v = clamped(x[i]), s = factor(x[i], y[i]);
            float slope = 0.79788456f * (1.0f + 0.134145f * v * v);
            code[i] = (uint8_t)bounded((s + 2.0f * v * s * (1.0f - s) * slope) * per_unit + zero, last);
        }
        break;
    default: {
        float low = c->low, scale = c->scale, end = (float)(c->entries - 1);
        int32_t place[BLOCK];
        for (int64_t i = 0; i < n; i++) place[i] = bounded((x[i] - low) * scale + 0.5f, end);
        for (int64_t i = 0; i < n; i++) code[i] = c->table[place[i]];
    }
    }
}

static void pack(const uint8_t *restrict code, uint8_t *restrict out, int64_t n, int bits) {
    if (bits == 8) {
        memcpy(out, code, (size_t)n);
    } else if (bits == 4) {
        for (int64_t i = 0; i < n / 2; i++) out[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
        if (n % 2) out[n / 2] = code[n - 1];
    } else {
        for (int64_t i = 0; i < n / 4; i++)
            out[i] = (uint8_t)(code[4 * i] | code[4 * i + 1] << 2 | code[4 * i + 2] << 4 | code[4 * i + 3] << 6);
        if (n % 4) out[n / 4] = 0;
        for (int64_t i = n / 4 * 4; i < n; i++) out[n / 4] |= (uint8_t)(code[i] << (i % 4 * 2));
    }
}

static void unpack(const uint8_t *restrict in, uint8_t *restrict code, int64_t n, int bits) {
    if (bits == 4)
        for (int64_t i = 0; i < (n + 1) / 2; i++) {
            code[2 * i] = in[i] & 15;
            code[2 * i + 1] = in[i] >> 4;
        }
    else
        for (int64_t i = 0; i < (n + 3) / 4; i++)
            for (int j = 0; j < 4; j++) code[4 * i + j] = (in[i] >> (2 * j)) & 3;
}

#define PLAIN(v) (v)
#define IN_SEGMENTS _Pragma("omp parallel for schedule(static) if (n > 32768)") for (int64_t s = 0; s < n; s += SEGMENT)
#define IN_BLOCKS                                                                                                      \
    for (int64_t i = s, m, end = s + SEGMENT < n ? s + SEGMENT : n; m = end - i < BLOCK ? end - i : BLOCK, i < end;    \
         i += BLOCK)

void trady_encode_f32(const float *x, const float *y, uint8_t *codes, int64_t n, const struct coding *c) {
    IN_SEGMENTS {
        IN_BLOCKS {
            uint8_t code[BLOCK];
            encode(x + i, y + i, code, m, c);
            pack(code, codes + i * c->bits / 8, m, (int)c->bits);
        }
    }
}

void trady_encode_bf16(const uint16_t *x, const uint16_t *y, uint8_t *codes, int64_t n, const struct coding *c) {
    struct coding by_table = *c; /* the output is rounded too much to tell the derivative */
    by_table.form = TABLE;
    IN_SEGMENTS {
        IN_BLOCKS {
            uint8_t code[BLOCK];
            float wide[BLOCK];
            for (int64_t j = 0; j < m; j++) wide[j] = widen(x[i + j]);
            encode(wide, wide, code, m, &by_table);
            pack(code, codes + i * c->bits / 8, m, (int)c->bits);
        }
    }
    (void)y;
}

/* out = gradient * (code - zero) * step; `out` may be `gradient`. */
#define DECODE(NAME, TYPE, LOAD, STORE)                                                                                \
    void NAME(const TYPE *gradient, const uint8_t *restrict codes, TYPE *out, int64_t n, int64_t bits, float zero, \
              float step) {                                                                                            \
        IN_SEGMENTS {                                                                                                  \
            IN_BLOCKS {                                                                                                \
                uint8_t each[BLOCK + 4];                                                                               \
                const uint8_t *restrict code = codes + i * bits / 8;                                                   \
                if (bits < 8) unpack(code, each, m, (int)bits), code = each;                                           \
                TYPE made[BLOCK];                                                                                      \
                for (int64_t j = 0; j < m; j++)                                                                        \
                    made[j] = STORE(LOAD(gradient[i + j]) * (((float)code[j] - zero) * step));                          \
                memcpy(out + i, made, (size_t)m * sizeof *out);                                                        \
            }                                                                                                          \
        }                                                                                                              \
    }

DECODE(trady_decode_f32, float, PLAIN, PLAIN)
DECODE(trady_decode_bf16, uint16_t, widen, narrow)
