#include "door.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <vector>

#include "call.hpp"
#include "core.hpp"
#include "door_arrays.hpp"

namespace nb = nanobind;

namespace polyce {
namespace {

// The public functions whose calls are answered.
enum Function : int { loss_alone, loss_and_gradient };

// Their arguments in the order of their signatures: arrays, what may differ from call to call, and
// options.
constexpr int array_at[] = {0, 1, 2, 9}, normalizer = 10, of_loss_alone = 18;
constexpr int grad_output = 18, out = 19, of_both = 20;
constexpr int option_at[] = {3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17};
constexpr int arrays = int(std::size(array_at)), options = int(std::size(option_at));
enum Operand : int { input, target, weight, sample_weight };

constexpr Py_ssize_t arguments_of(Function function) {
    return function == loss_alone ? of_loss_alone : of_both;
}

// What the description of a call depends on, but for its options.
struct Facts {
    std::int64_t numbers[1 + arrays * (2 + max_axes)];
    int count = 0;

    void add(std::int64_t number) { numbers[count++] = number; }

    std::size_t hash() const {
        std::uint64_t mixed = 0;
        for (int i = 0; i < count; ++i) {
            mixed = (mixed ^ std::uint64_t(numbers[i])) * 0x9e3779b97f4a7c15u;
            mixed ^= mixed >> 29;
        }
        return std::size_t(mixed);
    }
};

using Given = nb::typed<nb::tuple, nb::object, nb::ellipsis>;
using Mapping = nb::typed<nb::dict, nb::object, nb::object>;

// A call as it is asked.
struct Asked {
    Asked(Function function, const nb::tuple& arguments) : function(function) {
        for (Py_ssize_t i = 0; i < arguments_of(function); ++i) given[i] = arguments[std::size_t(i)].ptr();
    }

    const Function function;
    PyObject* given[of_both];
    const Arrays* library = nullptr;
    Seen seen[arrays];
    Facts facts;
    double divisor = 0.0, cotangent = 1.0;

    bool has(int argument) const { return given[argument] != Py_None; }
    bool has(Operand operand) const { return has(array_at[operand]); }
};

// What is known of a call like it.
struct Kept {
    std::vector<std::int64_t> facts;
    nb::object given_options[options];
    nb::object prepared, result_dtype;
    const Call* call;
};

// 1, 1.0 and True are not the same option.
bool is_same_option(PyObject* a, PyObject* b) {
    if (a == b) return true;
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyFloat_CheckExact(a)) {
        const double x = PyFloat_AsDouble(a), y = PyFloat_AsDouble(b);
        return std::memcmp(&x, &y, sizeof x) == 0;
    }
    if (!PyLong_CheckExact(a) && !PyUnicode_CheckExact(a)) return false;
    return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

// The calls, by what is known of their arrays: each has its place in one of a few rows of the table,
// whose oldest call gives way to a new one.
class Table {
public:
    std::shared_ptr<const Kept> find(const Asked& asked) const {
        for (const auto& kept : row(asked.facts).ways) {
            if (kept && is_like(asked, *kept)) return kept;
        }
        return nullptr;
    }

    void keep(const Asked& asked, std::shared_ptr<const Kept> kept) {
        Row& place = const_cast<Row&>(row(asked.facts));
        place.ways[place.next++ % ways].swap(kept);  // the old one goes once the table is in order
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
        std::shared_ptr<const Kept> ways[Table::ways];
        unsigned next = 0;
    };

    const Row& row(const Facts& facts) const { return rows_[facts.hash() % rows]; }

    static bool is_like(const Asked& asked, const Kept& kept) {
        const std::size_t count = std::size_t(asked.facts.count);
        if (kept.facts.size() != count) return false;
        if (std::memcmp(kept.facts.data(), asked.facts.numbers, count * sizeof(std::int64_t))) return false;
        for (int i = 0; i < options; ++i) {
            if (!is_same_option(asked.given[option_at[i]], kept.given_options[i].ptr())) return false;
        }
        return true;
    }

    Row rows_[rows];
};

// What must be so for any call to be answered: the value of a name in a module or mapping, null
// where it must be missing, or what a function returns.
struct Condition {
    nb::object of, name, value;

    bool holds() const {
        if (!name.is_valid()) {
            PyObject* const answer = PyObject_CallNoArgs(of.ptr());
            Py_XDECREF(answer);  // kept by `value`, if it is the same
            return answer && answer == value.ptr();
        }
        return PyDict_GetItemWithError(of.ptr(), name.ptr()) == value.ptr();
    }
};

struct Door {
    Table table;
    std::vector<Condition> conditions;
    const Arrays* numpy = nullptr;

    static Door& get() {
        static Door* const door = new Door;  // Python may end before static objects do
        return *door;
    }
};

bool read_number(PyObject* given, double& value) {
    if (given == Py_None) return true;
    if (!PyFloat_CheckExact(given)) return false;
    value = PyFloat_AsDouble(given);
    return true;
}

// Reads what the key consists of; false if the call must go the whole way.
bool look(const Door& door, Asked& asked) {
    PyObject* const first = asked.given[input];
    if (door.numpy && door.numpy->is_array(first)) {
        asked.library = door.numpy;
    } else {
        return false;
    }
    for (const Condition& condition : door.conditions) {
        if (!condition.holds()) return false;
    }
    const bool is_both = asked.function == loss_and_gradient;
    Facts& facts = asked.facts;
    facts.add(asked.function | asked.has(normalizer) << 1 | (is_both && asked.has(grad_output)) << 2);
    if (!read_number(asked.given[normalizer], asked.divisor)) return false;
    if (is_both && !read_number(asked.given[grad_output], asked.cotangent)) return false;
    for (int i = 0; i < arrays; ++i) {
        PyObject* const array = asked.given[array_at[i]];
        if (array == Py_None) {
            facts.add(-1);
            continue;
        }
        Seen& seen = asked.seen[i];
        if (!asked.library->read(array, seen)) return false;
        facts.add(seen.axes);
        facts.add(seen.dtype);
        for (int a = 0; a < seen.axes; ++a) facts.add(seen.shape[a]);
    }
    return true;
}

// Whether a gradient can be written to `out`: of the logits' kind, and in memory of its own or
// exactly theirs.
bool can_take_gradient(const Asked& asked, const Job& job, PyObject* array, Seen& seen) {
    const Seen& logits = asked.seen[input];
    if (!asked.library->read(array, seen) || !asked.library->is_writable(array)) return false;
    if (seen.dtype != logits.dtype || seen.axes != logits.axes) return false;
    if (!std::equal(seen.shape, seen.shape + seen.axes, logits.shape)) return false;
    const int itemsize = size_of(job.logits.dtype), wide = job.wide ? 8 : 4;
    const bool is_input = seen.view.data == logits.view.data &&
                          std::equal(seen.view.strides, seen.view.strides + seen.axes, logits.view.strides);
    if (seen.overlaps_itself(itemsize)) return false;
    if (!is_input && seen.meets(logits, itemsize, itemsize)) return false;
    const int of_target = job.probabilities.data ? size_of(job.probabilities.dtype) : size_of(job.label_dtype);
    if (seen.meets(asked.seen[target], itemsize, of_target)) return false;
    if (asked.has(weight) && seen.meets(asked.seen[weight], itemsize, wide)) return false;
    return !asked.has(sample_weight) || !seen.meets(asked.seen[sample_weight], itemsize, 8);
}

// Null for a call that has to go the whole way, with nothing written.
nb::object answer(const Asked& asked, const Kept& kept) {
    const Call& call = *kept.call;
    const Arrays& library = *asked.library;
    const bool by_rows = call.job().reduction == Reduction::none;
    Job job = call.job();
    const Seen& labels = asked.seen[target];
    if (call.has_probabilities()) {
        job.probabilities.data = labels.view.data;
    } else {
        if (!labels.is_dense(size_of(job.label_dtype))) return {};
        job.labels = labels.view.data;
    }
    if (asked.has(weight)) {
        if (!asked.seen[weight].is_dense(job.wide ? 8 : 4)) return {};
        job.class_weight = asked.seen[weight].view.data;
    }
    if (asked.has(sample_weight)) {
        if (!asked.seen[sample_weight].is_dense(8)) return {};
        job.sample_weight = reinterpret_cast<const double*>(asked.seen[sample_weight].view.data);
    }
    job.normalizer = asked.divisor;
    job.cotangent = asked.cotangent;

    nb::object grad;
    Seen written;
    if (asked.function == loss_and_gradient) {
        if (asked.has(out)) {
            if (!can_take_gradient(asked, job, asked.given[out], written)) return {};
            grad = nb::borrow(asked.given[out]);
        } else {
            grad = library.empty_like(asked.given[input]);
            if (!grad.is_valid() || !library.read(grad.ptr(), written)) return {};
            job.fresh = true;
        }
    }
    call.place(
        job, asked.seen[input].view, call.has_probabilities() ? &labels.view : nullptr,
        grad.is_valid() ? &written.view : nullptr);

    nb::object loss;
    std::int64_t one;  // of any dtype
    Seen losses;
    if (by_rows) {
        loss = library.empty(call.row_shape(), kept.result_dtype);
        if (!loss.is_valid() || !library.read(loss.ptr(), losses)) return {};
        job.losses = losses.view.data;
    } else {
        job.reduced = &one;
    }
    Call::compute(job);
    if (job.bad_row >= 0) return {};
    if (!by_rows || call.row_shape().empty()) {
        loss = library.scalar(by_rows ? job.losses : job.reduced, kept.result_dtype);
        if (!loss.is_valid()) return {};
    }
    if (!grad.is_valid()) return loss;
    if (asked.has(out)) library.written(grad.ptr());
    return nb::make_tuple(loss, grad);
}

// None for a call that has to go the whole way.
nb::object ask(Function function, const nb::tuple& given) {
    const auto found = [&]() -> nb::object {
        Asked asked(function, given);
        const Door& door = Door::get();
        if (!look(door, asked)) return {};
        const auto kept = door.table.find(asked);
        return kept ? answer(asked, *kept) : nb::object();
    }();
    if (found.is_valid()) return found;
    PyErr_Clear();
    return nb::none();
}

void keep(Function function, const nb::tuple& given, const nb::object& prepared, const nb::object& result_dtype) {
    Asked asked(function, given);
    Door& door = Door::get();
    if (!look(door, asked)) {
        PyErr_Clear();
        return;
    }
    const auto kept = std::make_shared<Kept>();
    kept->facts.assign(asked.facts.numbers, asked.facts.numbers + asked.facts.count);
    for (int i = 0; i < options; ++i) kept->given_options[i] = nb::borrow(asked.given[option_at[i]]);
    kept->call = nb::cast<const Call*>(prepared);
    kept->prepared = prepared;
    kept->result_dtype = result_dtype;
    door.table.keep(asked, kept);
}

void expect(nb::object of, nb::object name, nb::object value) {
    Door::get().conditions.push_back({of, name, value});
}

bool open_numpy(nb::handle c_api) {
    Door::get().numpy = numpy_arrays(c_api);
    return Door::get().numpy != nullptr;
}

}  // namespace

void declare_door(nb::module_& m) {
    m.def("answer_cross_entropy", [](const Given& given) { return ask(loss_alone, given); }, nb::arg("given"),
          "Answer a call of cross_entropy if one like it was kept, else return None.");
    m.def("answer_cross_entropy_with_grad", [](const Given& given) { return ask(loss_and_gradient, given); },
          nb::arg("given"), "Answer a call of cross_entropy_with_grad if one like it was kept, else return None.");
    m.def("keep", [](bool with_grad, const Given& given, const nb::object& call, const nb::object& result_dtype) {
              keep(with_grad ? loss_and_gradient : loss_alone, given, call, result_dtype);
          },
          nb::arg("with_grad"), nb::arg("given"), nb::arg("call"), nb::arg("result_dtype"),
          "Keep how a call was computed, so that calls like it can be answered.");
    m.def("forget", [] { Door::get().table.forget(); }, "Forget all calls that were kept.");
    m.def("expect", [](const Mapping& mapping, const nb::object& name, const nb::object& value) {
              Door::get().conditions.push_back({mapping, name, value.is(nb::handle(Py_Ellipsis)) ? nb::object() : value});
          },
          nb::arg("mapping"), nb::arg("name"), nb::arg("value").none(),
          "Answer only while a mapping has this very value; an Ellipsis stands for none.");
    m.def("expect_answer", [](const nb::object& function, const nb::object& value) {
              Door::get().conditions.push_back({function, {}, value});
          },
          nb::arg("function"), nb::arg("value").none(),
          "Answer only while a function without arguments returns this very value.");
    m.def("open_numpy", [](const nb::object& c_api) { return (Door::get().numpy = numpy_arrays(c_api)) != nullptr; },
          nb::arg("c_api"), "Answer calls on NumPy's arrays, if they are laid out as is known.");
}

}  // namespace polyce
