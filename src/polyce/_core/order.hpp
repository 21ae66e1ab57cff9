// The order in which rows are gone through: that of memory.
#pragma once

#include "job.hpp"

namespace polyce {

// Puts the axes whose logits lie close together last, and makes one of those that all arrays and
// the rows' numbers step through evenly.
inline void order_rows(Job& job) {
    const auto distance = [&](int axis) {
        const std::int64_t stride = job.logits.row_stride[axis];
        // Rows that are all the same lie nowhere near.
        return stride == 0 ? std::uint64_t(-1) : stride < 0 ? 0 - std::uint64_t(stride) : std::uint64_t(stride);
    };
    int from[max_axes];
    bool in_order = true;
    for (int a = 0; a < job.axes; ++a) {
        int at = a;
        for (; at > 0 && distance(from[at - 1]) < distance(a); --at) from[at] = from[at - 1];
        from[at] = a;
        in_order = in_order && at == a;
    }
    if (in_order) return;
    const Job before = job;
    std::int64_t number_stride[max_axes], rows = 1;
    for (int a = job.axes - 1; a >= 0; --a) number_stride[a] = rows, rows *= job.axis_size[a];
    Matrix Job::*const matrices[] = {&Job::logits, &Job::probabilities, &Job::grad};
    job.in_order = false;
    job.axes = 0;
    for (int a = 0; a < before.axes; ++a) {
        const int own = from[a], last = job.axes - 1;
        const std::int64_t size = before.axis_size[own];
        bool joins = last >= 0 && job.number_stride[last] == number_stride[own] * size;
        for (const auto m : matrices) joins = joins && (job.*m).row_stride[last] == (before.*m).row_stride[own] * size;
        const int at = joins ? last : job.axes++;
        job.axis_size[at] = joins ? job.axis_size[at] * size : size;
        job.number_stride[at] = number_stride[own];
        for (const auto m : matrices) (job.*m).row_stride[at] = (before.*m).row_stride[own];
    }
}

}  // namespace polyce
