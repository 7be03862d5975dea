/* Large pages for a tensor that is about to be written for the first time: the system hands out memory page by
 * page, and for tensors of tens of megabytes that takes longer than to fill them. */
#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

void trady_large_pages(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, from = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)start + (uintptr_t)bytes) / page * page;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE); /* advice: nothing changes where it is refused */
#else
    (void)start;
    (void)bytes;
#endif
}
