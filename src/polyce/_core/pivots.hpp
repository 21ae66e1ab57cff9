// Which class of each row of a tile is kept apart, as the row formula has it: where it is, its logit,
// and the largest logit besides.
#pragma once

#include "tile.hpp"

namespace polyce::POLYCE_ISA {

// Up to so many classes, a look at each is cheaper than going to the pivot of each row.
constexpr int few = 16;

template <class T>
struct Pivots : Tile<T> {
    using Place = typename Lanes<T>::Place;
    using Tile<T>::job, Tile<T>::lane, Tile<T>::logits, Tile<T>::rows;
    using Tile<T>::each_lane, Tile<T>::fill;
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
                const T* x = logits + c * width;
                each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                    const bool more = x[i] > lane.top[i];
                    lane.top[i] = more ? x[i] : lane.top[i];
                    lane.found[i] = more ? Place(c) : lane.found[i];
                });
            }
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.pivot[i] = lane.found[i] < 0 ? lane.pivot[i] : start + lane.found[i];
            });
        });
    }

    // Keeps the labels, whose place the pivots take.
    void keep_labels() {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.label[i] = lane.pivot[i], lane.label_logit[i] = T(0); });
    }

    // Calls f(row, its label's place in the tile) for labels among these classes.
    template <class F>
    void each_label(std::int64_t start, int count, F f) {
        for (int i = 0; i < rows; ++i) {
            const std::int64_t c = lane.label[i] - start;
            if (!out_of_range(c, count)) f(i, c * width + i);
        }
    }

    // Where in the tile the pivots are; -1 for those among other classes.
    void find_pivots(std::int64_t start, int count) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const std::int64_t c = lane.pivot[i] - start;
            lane.place[i] = Place(out_of_range(c, count) ? -1 : c);
        });
    }

    // Calls f(row, its pivot's number in `values`) for pivots in the tile.
    template <class F>
    void each_pivot(T* values, F f) {
        for (int i = 0; i < rows; ++i) {
            if (lane.place[i] >= 0) f(i, values[lane.place[i] * width + i]);
        }
    }

    // Takes the pivots' logits out of the logits, leaving -inf, and finds the largest of the others.
    void set_apart(int count) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.top[i] = -infinity<T>; });
        if (count <= few) {
            raise_top(count, [&](int i, int c, T& logit) POLYCE_INLINE_LAMBDA {
                T& x = logits[c * width + i];
                const T found = x;
                const bool apart = lane.place[i] == Place(c);
                logit = apart ? found : logit;
                return x = apart ? -infinity<T> : found;
            });
        } else {
            each_pivot(logits, [&](int i, T& x) { lane.pivot_logit[i] = x, x = -infinity<T>; });
            raise_top(count, [&](int i, int c, T&) POLYCE_INLINE_LAMBDA { return logits[c * width + i]; });
        }
    }

    // `logit_at`(row, class, the pivot's logit) gives a logit; four at a time, for fewer loads.
    template <class F>
    POLYCE_INLINE void raise_top(int count, F logit_at) {
        const auto larger = [](T a, T b) POLYCE_INLINE_LAMBDA { return a > b ? a : b; };
        int c = 0;
        for (; c + 4 <= count; c += 4) {
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                T logit = lane.pivot_logit[i];
                const T one = larger(logit_at(i, c, logit), logit_at(i, c + 1, logit));
                const T two = larger(logit_at(i, c + 2, logit), logit_at(i, c + 3, logit));
                lane.top[i] = larger(larger(one, two), lane.top[i]);
                lane.pivot_logit[i] = logit;
            });
        }
        for (; c < count; ++c) {
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                T logit = lane.pivot_logit[i];
                lane.top[i] = larger(logit_at(i, c, logit), lane.top[i]);
                lane.pivot_logit[i] = logit;
            });
        }
    }

    // Notes the first class of each row that has its largest logit.
    void find_first(std::int64_t start, int count) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.found[i] = 0; });
        for (int c = count - 1; c >= 0; --c) {
            const T* x = logits + c * width;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.found[i] = x[i] == lane.top[i] ? Place(c) : lane.found[i];
            });
        }
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.first[i] = lane.top[i] > lane.rest_max[i] ? start + lane.found[i] : lane.first[i];
        });
    }
};

}  // namespace polyce::POLYCE_ISA
