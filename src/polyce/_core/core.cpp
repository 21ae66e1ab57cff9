#include "core.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "isa.hpp"
#include "order.hpp"
#include "threads.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace polyce {
namespace {

// A thread that helps costs some microseconds to wake, as much as this many logits; one of torch's,
// which is mostly awake, a microsecond or two.
constexpr std::int64_t numbers_per_thread = 32768, numbers_per_torch_thread = 16384;
constexpr std::int64_t rows_in_label_block = 16384;
// A gradient larger than this has left the caches before anyone reads it.
constexpr std::int64_t bytes_worth_streaming = 16 << 20;
constexpr std::int64_t bytes_worth_huge_pages = 4 << 20;
constexpr std::int64_t huge_page = 2 << 20;

int threads_for(std::int64_t numbers, bool with_torch) {
    const std::int64_t worthwhile = numbers / (with_torch ? numbers_per_torch_thread : numbers_per_thread);
    const int most = thread_count();
    return worthwhile < 1 ? 1 : worthwhile < most ? int(worthwhile) : most;
}

// Partial sums are added in the order of the rows, pairwise, so that nothing depends on which
// thread was first.
double pairwise(const double* values, std::int64_t count) {
    if (count <= 8) {
        double sum = 0.0;
        for (std::int64_t i = 0; i < count; ++i) sum += values[i];
        return sum;
    }
    const std::int64_t half = count / 2;
    return pairwise(values, half) + pairwise(values + half, count - half);
}

void ask_for_huge_pages(void* memory, std::int64_t bytes) {
#if defined(__linux__)
    // Advice that may be refused, as some systems do: then the pages are small.
    const auto start = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t first = (start + huge_page - 1) / huge_page * huge_page;
    const std::uintptr_t end = (start + std::uintptr_t(bytes)) / huge_page * huge_page;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Makes the system give all pages of fresh memory now, on all threads. Were each given when it is
// first written, its zeros would push out of the caches what is being computed with.
void fill_with_pages(char* memory, std::int64_t bytes, bool with_torch) {
    const auto touch = [](void* start, std::int64_t page, char*) {
        static_cast<char*>(start)[page * huge_page] = 0;
    };
    const std::int64_t pages = (bytes + huge_page - 1) / huge_page;
    share_tiles(pages, threads_for(bytes, with_torch), with_torch, 64, touch, memory);
}

}  // namespace

void read_target(Job& job) {
    const bool by_labels = has_labels(job), counts_rows = !by_labels && !job.sample_weight;
    const bool needs_weight = job.reduction == Reduction::mean && !job.normalized && !counts_rows;
    double weight = 0.0;
    job.bad_label = -1;
    // torch divides the number of logits by C, and so finds no rows where there is no class.
    if (counts_rows) weight = job.classes ? double(job.rows) : 0.0;
    if (needs_weight || job.check_labels) {
        const std::int64_t blocks = (job.rows + rows_in_label_block - 1) / rows_in_label_block;
        const std::unique_ptr<LabelSummary[]> found(new LabelSummary[std::size_t(blocks ? blocks : 1)]);
        struct Context {
            const Job& job;
            LabelSummary* found;
            const Kernels& kernels;
        } context{job, found.get(), current_kernels()};
        const auto task = [](void* shared, std::int64_t b, char*) {
            const Context& c = *static_cast<Context*>(shared);
            const std::int64_t first = b * rows_in_label_block, left = c.job.rows - first;
            c.found[b] = c.kernels.read_labels(
                c.job, first, left < rows_in_label_block ? left : rows_in_label_block);
        };
        share_tiles(blocks, threads_for(job.rows / 2, job.on_torch), job.on_torch, 64, task, &context);
        const std::unique_ptr<double[]> weights(new double[std::size_t(blocks ? blocks : 1)]);
        for (std::int64_t b = 0; b < blocks; ++b) {
            weights[b] = found[b].weight;
            if (job.check_labels && job.bad_label < 0) job.bad_label = found[b].bad_label;
        }
        if (!counts_rows) weight = pairwise(weights.get(), blocks);
    }
    if (!by_labels && job.classes == 0) weight = 0.0;
    job.denominator = job.reduction != Reduction::mean ? 1.0 : job.normalized ? job.normalizer : weight;
    if (job.reduction == Reduction::mean) job.cotangent /= job.denominator;
}

void run(Job& job) {
    order_rows(job);
    const std::int64_t bytes = job.rows * job.classes * size_of(job.grad.dtype);
    if (job.fresh && bytes >= bytes_worth_huge_pages) ask_for_huge_pages(job.grad.data, bytes);
    if (job.grad.data && bytes >= bytes_worth_streaming) {
        // What is overwritten in place is in the caches already.
        const std::int64_t size = size_of(job.grad.dtype);
        const bool is_dense = job.grad.class_stride == size || (job.axes && job.grad.row_stride[job.axes - 1] == size);
        job.streams = is_dense && job.grad.data != job.logits.data;
        if (job.fresh) fill_with_pages(job.grad.data, bytes, job.on_torch);
    }
    const Kernels& kernels = current_kernels();
    const std::int64_t tiles = kernels.tiles(job);
    const std::unique_ptr<double[]> sums(new double[std::size_t(tiles ? tiles : 1)]);
    struct Context {
        const Job& job;
        double* sums;
        const Kernels& kernels;
    } context{job, sums.get(), kernels};
    const auto task = [](void* shared, std::int64_t tile, char* scratch) {
        const Context& c = *static_cast<Context*>(shared);
        c.sums[tile] = c.kernels.run_tile(c.job, tile, scratch);
    };
    const int threads = threads_for(job.rows * job.classes, job.on_torch);
    share_tiles(tiles, threads, job.on_torch, kernels.scratch_bytes(job), task, &context);
    job.total = pairwise(sums.get(), tiles);
}

void store_reduced(const Job& job) {
    if (!job.reduced) return;
    const double loss = job.reduction == Reduction::mean ? job.total / job.denominator : job.total;
    current_kernels().store(job.result_dtype, loss, job.reduced);
}

void log_softmax(Job job) {
    if (job.classes == 0) return;  // nothing to write, and no largest class to read
    order_rows(job);
    const Kernels& kernels = current_kernels();
    const std::int64_t bytes = job.rows * job.classes * size_of(job.grad.dtype);
    if (job.fresh && bytes >= bytes_worth_huge_pages) ask_for_huge_pages(job.grad.data, bytes);
    struct Context {
        const Job& job;
        const Kernels& kernels;
    } context{job, kernels};
    const auto task = [](void* shared, std::int64_t tile, char* scratch) {
        const Context& c = *static_cast<Context*>(shared);
        c.kernels.log_softmax_tile(c.job, tile, scratch);
    };
    const int threads = threads_for(job.rows * job.classes, job.on_torch);
    share_tiles(kernels.tiles(job), threads, job.on_torch, kernels.scratch_bytes(job), task, &context);
}

}  // namespace polyce
