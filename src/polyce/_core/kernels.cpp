// One instruction set's kernels: this file is compiled once for each, with POLYCE_ISA as its name.

#define POLYCE_TEXT(x) #x
#define POLYCE_TEXT_OF(x) POLYCE_TEXT(x)

#include "across.hpp"
#include "along.hpp"

namespace polyce::POLYCE_ISA {
namespace {

std::int64_t magnitude(std::int64_t value) { return value < 0 ? -value : value; }

bool goes_across(const Job& job) {
    if (job.axes == 0) return false;
    const std::int64_t between_rows = magnitude(job.logits.row_stride[job.axes - 1]);
    return job.classes <= (job.wide ? 40 : 64) || between_rows < magnitude(job.logits.class_stride);
}

// Calls f with a number of the arithmetic's type and whether there is a softcap.
template <class F>
decltype(auto) with_arithmetic(const Job& job, F&& f) {
    if (job.cap != 0) return job.wide ? f(double{}, std::true_type{}) : f(float{}, std::true_type{});
    return job.wide ? f(double{}, std::false_type{}) : f(float{}, std::false_type{});
}

template <class O>
struct Type {
    using Order = O;
};

// Calls f with the rows' order, as which a tile goes through its kernels.
template <class F>
decltype(auto) with_order(const Job& job, F&& f) {
    return with_arithmetic(job, [&](auto number, auto capped) -> decltype(auto) {
        using T = decltype(number);
        return goes_across(job) ? f(Type<Across<T, capped>>{}) : f(Type<Along<T, capped>>{});
    });
}

std::int64_t rows_in_tile(const Job& job) {
    return goes_across(job) ? width : Along<float, false>::rows_in_group(job);
}

std::int64_t tiles(const Job& job) {
    const std::int64_t in_tile = rows_in_tile(job);
    return (job.rows + in_tile - 1) / in_tile;
}

std::int64_t scratch_bytes(const Job& job) {
    return with_order(job, [&](auto type) { return decltype(type)::Order::scratch_bytes(job); });
}

// Calls f with the order, the first row and the number of rows of a tile.
template <class F>
decltype(auto) with_tile(const Job& job, std::int64_t tile, char* scratch, F&& f) {
    const std::int64_t in_tile = rows_in_tile(job), first = tile * in_tile;
    const int count = int(job.rows - first < in_tile ? job.rows - first : in_tile);
    return with_order(job, [&](auto type) {
        typename decltype(type)::Order order(job, scratch);
        return f(order, first, count);
    });
}

double run_tile(const Job& job, std::int64_t tile, char* scratch) {
    return with_tile(job, tile, scratch, [](auto& order, std::int64_t first, int count) {
        return order.run(first, count);
    });
}

void log_softmax_tile(const Job& job, std::int64_t tile, char* scratch) {
    with_tile(job, tile, scratch, [](auto& order, std::int64_t first, int count) {
        order.log_softmax(first, count);
    });
}

// Without weights the total is a count, and no label is looked at twice unless one is bad.
template <class L>
LabelSummary count_labels(const Job& job, std::int64_t first, std::int64_t count) {
    const char* labels = static_cast<const char*>(job.labels) + first * std::int64_t(sizeof(L));
    std::int64_t ignored = 0, bad = 0;
    const std::int64_t marker = job.ignored, has_marker = job.has_ignored;
    const std::uint64_t classes = std::uint64_t(all_classes(job));
    POLYCE_SIMD_SUM(ignored, bad)
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t label = std::int64_t(fetch<L>(labels + i * std::int64_t(sizeof(L))));
        const std::int64_t is_ignored = has_marker & std::int64_t(label == marker);
        ignored += is_ignored;
        bad += std::int64_t(std::uint64_t(label) >= classes) & (is_ignored ^ 1);
    }
    return {double(count - ignored), bad ? 0 : -1};
}

LabelSummary read_labels(const Job& job, std::int64_t first, std::int64_t count) {
    LabelSummary summary{0.0, -1};
    if (has_labels(job) && !job.class_weight && !job.sample_weight) {
        summary = with_type(job.label_dtype, [&](auto type) {
            return count_labels<decltype(type)>(job, first, count);
        });
    } else {
        for (std::int64_t row = first; row < first + count; ++row) {
            const RowTarget target = job.wide ? read_target<double>(job, row) : read_target<float>(job, row);
            const double weight = job.sample_weight ? job.sample_weight[row] : 1.0;
            if (target.counted) summary.weight += weight * target.label_weight;
        }
        if (job.check_labels) summary.bad_label = 0;
    }
    if (summary.bad_label == -1) return summary;
    const std::int64_t each = job.sparse ? job.entries : 1;
    summary.bad_label = first_bad_label(job, first * each, count * each);
    return summary;
}

void store(Float dtype, double value, void* place) {
    narrow_run(dtype, &value, 1, static_cast<char*>(place), 0);
}

double load(Float dtype, const void* place) {
    return with_type(dtype, [&](auto type) {
        return double(widen(fetch<decltype(type)>(static_cast<const char*>(place))));
    });
}

}  // namespace

extern const Kernels kernels{
    POLYCE_TEXT_OF(POLYCE_ISA), read_labels, tiles, scratch_bytes, run_tile, log_softmax_tile, store, load,
};

}  // namespace polyce::POLYCE_ISA
