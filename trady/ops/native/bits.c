/* One pass over memory where plain tensor operations need four: clamp an activation and
 * keep one bit an element, and later let a gradient through those bits.
 *
 * A tensor is `rows` rows of `length` elements; each row's bits start on a byte of their own.
 * Bit j of byte i is element 8 i + j. `y` may be `x`, `out` may be `gradient`.
 *
 * Letters: x, y input and output of the activation, [rows, length]; g, out gradients of output and input, [rows, length];
 * bits [rows, ceil(length / 8)]; n elements of a segment of a row, i and j positions in it.
 */
#include <stdint.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define SEGMENT 8192 /* elements a task; a multiple of 16 so that tasks never share a byte */

static inline float load_bf16(uint16_t v) {
    union { uint32_t u; float f; } c = { (uint32_t)v << 16 };
    return c.f;
}

/* `low <= x` and `x <= high` fail for NaN, so NaN passes through and keeps its gradient, as in PyTorch. */
static inline float clamp_one(float x, float low, float high, float slope) {
    if (x <= low) return slope == 0.0f ? low : slope * x;
    return x >= high ? high : x;
}

static void clamp_segment(const float *x, float *y, uint8_t *bits, int64_t n, float low, float high, float slope) {
    int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m512 lo = _mm512_set1_ps(low), hi = _mm512_set1_ps(high), sl = _mm512_set1_ps(slope);
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        __mmask16 under = _mm512_cmp_ps_mask(v, lo, _CMP_LE_OQ), over = _mm512_cmp_ps_mask(v, hi, _CMP_GE_OQ);
        __m512 r = _mm512_mask_mov_ps(v, over, hi);
        r = slope == 0.0f ? _mm512_mask_mov_ps(r, under, lo) : _mm512_mask_mul_ps(r, under, v, sl);
        _mm512_storeu_ps(y + i, r);
        if (bits) {
            uint16_t inside = (uint16_t)~(under | over);
            bits[i / 8] = (uint8_t)inside;
            bits[i / 8 + 1] = (uint8_t)(inside >> 8);
        }
    }
#elif defined(__AVX2__)
    const __m256 lo = _mm256_set1_ps(low), hi = _mm256_set1_ps(high), sl = _mm256_set1_ps(slope);
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        __m256 under = _mm256_cmp_ps(v, lo, _CMP_LE_OQ), over = _mm256_cmp_ps(v, hi, _CMP_GE_OQ);
        __m256 r = _mm256_blendv_ps(v, hi, over);
        r = _mm256_blendv_ps(r, slope == 0.0f ? lo : _mm256_mul_ps(v, sl), under);
        _mm256_storeu_ps(y + i, r);
        if (bits) bits[i / 8] = (uint8_t)~_mm256_movemask_ps(_mm256_or_ps(under, over));
    }
#endif
    for (; i < n; i += 8) {
        uint8_t byte = 0;
        for (int j = 0; j < 8 && i + j < n; j++) {
            float v = x[i + j];
            byte |= (uint8_t)(!(v <= low || v >= high) << j);
            y[i + j] = clamp_one(v, low, high, slope);
        }
        if (bits) bits[i / 8] = byte;
    }
}

static void select_segment(const float *g, float *out, const uint8_t *bits, int64_t n, float slope) {
    int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m512 sl = _mm512_set1_ps(slope);
    for (; i + 16 <= n; i += 16) {
        __mmask16 inside = (__mmask16)(bits[i / 8] | (bits[i / 8 + 1] << 8));
        __m512 v = _mm512_loadu_ps(g + i);
        _mm512_storeu_ps(out + i, slope == 0.0f ? _mm512_maskz_mov_ps(inside, v)
                                                : _mm512_mask_mul_ps(v, (__mmask16)~inside, v, sl));
    }
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 sl = _mm256_set1_ps(slope);
    for (; i + 8 <= n; i += 8) {
        __m256i b = _mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), lane);
        __m256 inside = _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, lane));
        __m256 v = _mm256_loadu_ps(g + i);
        _mm256_storeu_ps(out + i, slope == 0.0f ? _mm256_and_ps(inside, v)
                                                : _mm256_blendv_ps(_mm256_mul_ps(v, sl), v, inside));
    }
#endif
    for (; i < n; i++) {
        int inside = (bits[i / 8] >> (i % 8)) & 1;
        out[i] = inside ? g[i] : (slope == 0.0f ? 0.0f : slope * g[i]);
    }
}

#define FOR_SEGMENTS(body)                                                              \
    const int64_t per_row = (length + SEGMENT - 1) / SEGMENT, row_bytes = (length + 7) / 8; \
    _Pragma("omp parallel for schedule(static) if (rows * length > 65536)")             \
    for (int64_t task = 0; task < rows * per_row; task++) {                             \
        const int64_t row = task / per_row, start = (task % per_row) * SEGMENT;         \
        const int64_t n = length - start < SEGMENT ? length - start : SEGMENT;          \
        const int64_t at = row * length + start, byte = row * row_bytes + start / 8;    \
        body                                                                            \
    }

void trady_clamp_f32(const float *x, float *y, uint8_t *bits, int64_t rows, int64_t length,
                     float low, float high, float slope) {
    FOR_SEGMENTS(clamp_segment(x + at, y + at, bits ? bits + byte : 0, n, low, high, slope);)
}

void trady_select_f32(const float *g, float *out, const uint8_t *bits, int64_t rows, int64_t length, float slope) {
    FOR_SEGMENTS(select_segment(g + at, out + at, bits + byte, n, slope);)
}

/* bfloat16: clamping to bounds that bfloat16 holds exactly, and slope 0 only, needs no rounding. */
void trady_clamp_bf16(const uint16_t *x, uint16_t *y, uint8_t *bits, int64_t rows, int64_t length,
                      float low, float high, uint16_t low_bits, uint16_t high_bits) {
    FOR_SEGMENTS({
        for (int64_t i = 0; i < n; i += 8) {
            uint8_t packed = 0;
            for (int j = 0; j < 8 && i + j < n; j++) {
                uint16_t v = x[at + i + j];
                float f = load_bf16(v);
                packed |= (uint8_t)(!(f <= low || f >= high) << j);
                y[at + i + j] = f <= low ? low_bits : f >= high ? high_bits : v;
            }
            if (bits) bits[byte + i / 8] = packed;
        }
    })
}

void trady_select_bf16(const uint16_t *g, uint16_t *out, const uint8_t *bits, int64_t rows, int64_t length) {
    FOR_SEGMENTS({
        for (int64_t i = 0; i < n; i++)
            out[at + i] = (bits[byte + i / 8] >> (i % 8)) & 1 ? g[at + i] : 0;
    })
}
