// The calls that are kept, and by what a call is known to be like one of them.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "call.hpp"
#include "door_arrays.hpp"

namespace polyce {

// The public functions whose calls are answered.
enum Function : int { loss_alone, loss_and_gradient, loss_in_place };
constexpr const char* function_names[] = {"cross_entropy", "cross_entropy_with_grad", "cross_entropy_in_place"};

// Their arguments in the order of their signatures: arrays, what may differ from call to call, and
// options.
constexpr int array_at[] = {0, 1, 2, 9}, normalizer = 10, of_loss_alone = 18;
constexpr int grad_output = 18, out = 19, of_both = 20;
constexpr int option_at[] = {3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17};
constexpr int arrays = int(std::size(array_at)), options = int(std::size(option_at));
enum Operand : int { input, target, weight, sample_weight };
using Operands = PyObject* [arrays];

// What the description of a call depends on, but for its options.
struct Facts {
    std::int64_t numbers[1 + arrays * (2 + max_axes)];
    int count = 0;

    void add(std::int64_t number) { numbers[count++] = number; }

    bool are(const std::vector<std::int64_t>& others) const {
        return others.size() == std::size_t(count) &&
               std::memcmp(others.data(), numbers, others.size() * sizeof(std::int64_t)) == 0;
    }

    std::size_t hash() const {
        std::uint64_t mixed = 0;
        for (int i = 0; i < count; ++i) {
            mixed = (mixed ^ std::uint64_t(numbers[i])) * 0x9e3779b97f4a7c15u;
            mixed ^= mixed >> 29;
        }
        return std::size_t(mixed);
    }
};

// A call as it is asked.
struct Asked {
    Asked(Function function, const nanobind::tuple& arguments) : function(function) {
        const int count = function == loss_and_gradient ? of_both : of_loss_alone;
        for (int i = 0; i < count; ++i) given[i] = arguments[std::size_t(i)].ptr();
        for (int i = 0; i < arrays; ++i) operands[i] = given[array_at[i]];
    }

    bool has(int argument) const { return given[argument] != Py_None; }
    bool has_cotangent() const { return function == loss_and_gradient && has(grad_output); }

    const Function function;
    PyObject* given[of_both];
    Operands operands;
    const Arrays* library = nullptr;
    Seen seen[arrays];
    Facts facts;
    double divisor = 0.0, cotangent = 1.0;
    bool is_on_graph = false;  // autograd waits for a gradient of the logits
};

// What is known of a call like it. Python holds it where torch's graph needs it.
struct Kept {
    std::vector<std::int64_t> facts;
    nanobind::object given_options[options];
    nanobind::object prepared;
    const Call* call;
    // As `Arrays` takes them, for the loss, a gradient, and what is saved of the rows.
    nanobind::object like_loss, like_grad, like_saved;
    // What puts the loss on the graph, and what its node keeps: kernels, problem and no normalizer.
    nanobind::object apply, rule;
};

// 1, 1.0 and True are not the same option.
inline bool is_same_option(PyObject* a, PyObject* b) {
    if (a == b) return true;
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyFloat_CheckExact(a)) {
        const double x = PyFloat_AsDouble(a), y = PyFloat_AsDouble(b);
        return std::memcmp(&x, &y, sizeof x) == 0;
    }
    if (!PyLong_CheckExact(a) && !PyUnicode_CheckExact(a)) return false;
    return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

// The facts of a call say in which row of the table it is, if anywhere; the oldest call of a row
// gives way to a new one.
class Table {
public:
    // Null for a call that is not known.
    nanobind::object find(const Asked& asked) const {
        for (const nanobind::object& kept : rows_[row(asked.facts)].ways) {
            if (kept.is_valid() && is_like(asked, *nanobind::inst_ptr<Kept>(kept))) return kept;
        }
        return {};
    }

    void keep(const Facts& facts, nanobind::object kept) {
        Row& place = rows_[row(facts)];
        std::swap(place.ways[place.next++ % ways], kept);  // the old one goes when the table is in order
    }

    void forget() {
        for (Row& row : rows_) {
            Row old;
            std::swap(old, row);
        }
    }

private:
    static constexpr std::size_t rows = 128, ways = 8;
    struct Row {
        nanobind::object ways[Table::ways];
        unsigned next = 0;
    };

    static std::size_t row(const Facts& facts) { return facts.hash() % rows; }

    static bool is_like(const Asked& asked, const Kept& kept) {
        if (!asked.facts.are(kept.facts)) return false;
        for (int i = 0; i < options; ++i) {
            if (!is_same_option(asked.given[option_at[i]], kept.given_options[i].ptr())) return false;
        }
        return true;
    }

    Row rows_[rows];
};

}  // namespace polyce
