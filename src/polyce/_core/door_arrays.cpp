#include "door_arrays.hpp"

#include <algorithm>
#include <utility>

namespace polyce {
namespace {

// The address of the first byte, and of the one after the last.
std::pair<std::intptr_t, std::intptr_t> extent(const Seen& seen, int itemsize) {
    std::intptr_t first = reinterpret_cast<std::intptr_t>(seen.view.data), last = first;
    for (int a = 0; a < seen.axes; ++a) {
        const std::int64_t step = (seen.shape[a] - 1) * seen.view.strides[a];
        (step < 0 ? first : last) += std::intptr_t(step);
    }
    return {first, last + itemsize};
}

}  // namespace

bool Condition::holds() const {
    if (name.is_valid()) return PyDict_GetItemWithError(of.ptr(), name.ptr()) == value.ptr();
    PyObject* const answer = PyObject_CallNoArgs(of.ptr());
    Py_XDECREF(answer);  // `value` keeps it, if it is the same
    return answer && answer == value.ptr();
}

std::int64_t Seen::size() const {
    std::int64_t count = 1;
    for (int a = 0; a < axes; ++a) count *= shape[a];
    return count;
}

bool Seen::is_dense(int itemsize) const {
    if (reinterpret_cast<std::uintptr_t>(view.data) % std::uintptr_t(itemsize)) return false;
    std::int64_t step = itemsize;
    for (int a = axes; a-- > 0;) {
        if (shape[a] != 1 && view.strides[a] != step) return size() == 0;
        step *= shape[a];
    }
    return true;
}

bool Seen::overlaps_itself(int itemsize) const {
    std::pair<std::int64_t, std::int64_t> steps[max_axes];
    int count = 0;
    for (int a = 0; a < axes; ++a) {
        const std::int64_t step = view.strides[a];
        if (shape[a] > 1) steps[count++] = {step < 0 ? -step : step, shape[a]};
    }
    std::sort(steps, steps + count);
    std::int64_t reach = itemsize;
    for (int i = 0; i < count; ++i) {
        if (steps[i].first < reach) return true;
        reach += steps[i].first * (steps[i].second - 1);
    }
    return false;
}

bool Seen::meets(const Seen& other, int itemsize, int itemsize_of_other) const {
    if (size() == 0 || other.size() == 0) return false;
    const auto [first, last] = extent(*this, itemsize);
    const auto [there, end] = extent(other, itemsize_of_other);
    return first < end && there < last;
}

}  // namespace polyce
