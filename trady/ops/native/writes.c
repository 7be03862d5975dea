/* Whether slices of weights are what copies of them hold, many layers in one call.
 *
 * A weight is [outer, channels, inner], a copy of n of its channels [n, outer, inner]; inner is in bytes.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
    const char *weight, *copy;
    const int64_t *index;
    int64_t outer, channels, inner, n;
} Slices;

int trady_same_slices(const Slices *layers, int64_t count) {
    for (const Slices *l = layers; l < layers + count; l++)
        for (int64_t j = 0; j < l->n; j++) {
            const char *weight = l->weight + l->index[j] * l->inner, *copy = l->copy + j * l->outer * l->inner;
            for (int64_t o = 0; o < l->outer; o++)
                if (memcmp(weight + o * l->channels * l->inner, copy + o * l->inner, (size_t)l->inner)) return 0;
        }
    return 1;
}
