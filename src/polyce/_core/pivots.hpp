// Which class of each row of a tile is kept apart, as the row formula has it: where it is, its logit,
// and the largest logit besides.
#pragma once

#include "tile.hpp"

namespace polyce::POLYCE_ISA {

template <class T>
struct Pivots : Tile<T> {
    using Tile<T>::job, Tile<T>::lane, Tile<T>::logits, Tile<T>::rows, Tile<T>::used;
    using Tile<T>::each_lane, Tile<T>::fill, Tile<T>::pitch;
    using Tile<T>::Tile;

    // Calls f(first class, number of classes) for as many classes as a tile has room for.
    template <class F>
    void each_chunk(F f) {
        for (std::int64_t start = 0; start < job.classes; start += chunk) {
            f(start, int(job.classes - start < chunk ? job.classes - start : chunk));
        }
    }

    // The first class with the largest logit, as each row's pivot.
    void find_largest() {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.top[i] = -infinity<T>, lane.pivot[i] = 0; });
        each_chunk([&](std::int64_t start, int count) {
            fill(job.logits, start, count, logits);
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.found[i] = -1; });
            for (int c = 0; c < count; ++c) {
                const T* x = logits + c * pitch;
                each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                    const bool more = x[i] > lane.top[i];
                    lane.top[i] = more ? x[i] : lane.top[i];
                    lane.found[i] = more ? T(c) : lane.found[i];
                });
            }
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.pivot[i] = lane.found[i] < 0 ? lane.pivot[i] : start + std::int64_t(lane.found[i]);
            });
        });
    }

    // Keeps the labels, whose place the pivots may take.
    void keep_labels() {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.label[i] = lane.pivot[i], lane.label_logit[i] = T(0); });
    }

    // Calls f(row, its label's place in the tile) for labels among these classes.
    template <class F>
    void each_label(std::int64_t start, int count, F f) {
        for (int i = 0; i < rows; ++i) {
            const std::int64_t c = lane.label[i] - start;
            if (!out_of_range(c, count)) f(i, c * pitch + i);
        }
    }

    // Where in the tile the pivots are; -1 for those among other classes.
    void find_pivots(std::int64_t start, int count) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const std::int64_t c = lane.pivot[i] - start;
            lane.place[i] = T(out_of_range(c, count) ? -1 : c);
        });
    }

    // Calls f(row, its pivot's number in `values`) for pivots in the tile.
    template <class F>
    void each_pivot(T* values, F f) {
        for (int i = 0; i < rows; ++i) {
            if (lane.place[i] >= 0) f(i, values[int(lane.place[i]) * pitch + i]);
        }
    }

    // Takes the pivots' logits out of the logits, leaving -inf, and finds the largest of the others.
    void set_apart(int count) {
        const Pack<T> nothing = filled(-infinity<T>), one = filled(T(1));
        for (int i = 0; i < used; i += pack_size) {
            const Pack<T> place = load(lane.place + i);
            Pack<T> top = nothing, logit = load(lane.pivot_logit + i), here = filled(T(0));
            T* x = logits + i;
            for (int c = 0; c < count; ++c, x += pitch) {
                const Pack<T> found = load(x), other = chosen(place, here, nothing, found);
                logit = chosen(place, here, found, logit);
                store(x, other);
                top = larger(other, top);
                here = here + one;
            }
            store(lane.top + i, top);
            store(lane.pivot_logit + i, logit);
        }
    }

    // Counts the classes whose logit is larger than the label's.
    POLYCE_APART void count_larger(int count) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.found[i] = T(0); });
        for (int c = 0; c < count; ++c) {
            const T* x = logits + c * pitch;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.found[i] = lane.found[i] + (x[i] > lane.label_logit[i] ? T(1) : T(0));
            });
        }
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.rank[i] = lane.rank[i] + std::int64_t(lane.found[i]); });
    }

    // Notes the first class of each row that has its largest logit.
    void find_first(std::int64_t start, int count) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.found[i] = 0; });
        for (int c = count - 1; c >= 0; --c) {
            const T* x = logits + c * pitch;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.found[i] = x[i] == lane.top[i] ? T(c) : lane.found[i];
            });
        }
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.first[i] = lane.top[i] > lane.rest_max[i] ? start + std::int64_t(lane.found[i]) : lane.first[i];
        });
    }
};

}  // namespace polyce::POLYCE_ISA
