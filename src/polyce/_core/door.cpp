#include "door.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "door_table.hpp"
#include "isa.hpp"

namespace nb = nanobind;

namespace polyce {
namespace {

using Given = nb::typed<nb::tuple, nb::object, nb::ellipsis>;
using Mapping = nb::typed<nb::dict, nb::object, nb::object>;

struct Door {
    Table table;
    std::vector<Condition> conditions;
    Arrays *numpy = nullptr, *torch = nullptr;

    static Door& get() {
        static Door* const door = new Door;  // Python may end before static objects do
        return *door;
    }

    static bool hold(const std::vector<Condition>& conditions) {
        return std::all_of(conditions.begin(), conditions.end(), [](const Condition& one) { return one.holds(); });
    }

    // Null for arrays of another library, or while none of this one are to be answered.
    const Arrays* library_of(PyObject* array) const {
        for (const Arrays* library : {numpy, torch}) {
            if (library && library->is_array(array)) return hold(library->conditions) ? library : nullptr;
        }
        return nullptr;
    }
};

bool read_number(PyObject* given, double& value) {
    if (given == Py_None) return true;
    if (!PyFloat_CheckExact(given)) return false;
    value = PyFloat_AsDouble(given);
    return true;
}

// Reads arrays, of which any may be None; false if the call has to go the whole way.
bool read_arrays(const Arrays& library, const Operands& given, Seen (&seen)[arrays], Facts& facts) {
    for (int i = 0; i < arrays; ++i) {
        if (given[i] == Py_None) {
            facts.add(-1);
            continue;
        }
        if (!library.read(given[i], seen[i])) return false;
        facts.add(seen[i].axes);
        facts.add(seen[i].dtype);
        for (int a = 0; a < seen[i].axes; ++a) facts.add(seen[i].shape[a]);
    }
    return true;
}

// The same for all of a call, if it is to be answered now.
bool look(const Door& door, Asked& asked) {
    asked.library = door.library_of(asked.operands[input]);
    if (!asked.library || !door.hold(door.conditions)) return false;
    if (!read_number(asked.given[normalizer], asked.divisor)) return false;
    if (asked.has_cotangent() && !read_number(asked.given[grad_output], asked.cotangent)) return false;
    const Arrays& library = *asked.library;
    if (!read_arrays(library, asked.operands, asked.seen, asked.facts)) return false;
    for (int i = 0; i < arrays && asked.function != loss_and_gradient; ++i) {
        const bool is_there = asked.operands[i] != Py_None;
        if (!is_there || !library.requires_gradient(asked.operands[i], asked.seen[i])) continue;
        if (!library.is_recording()) break;
        if (i != input) return false;
        asked.is_on_graph = true;
    }
    asked.facts.add(
        asked.function | asked.has(normalizer) << 2 | asked.has_cotangent() << 3 | asked.is_on_graph << 4);
    return true;
}

// Whether memory, of the logits' shape and dtype, has a place for each number that is written to it
// and shares none with other operands, from `first` on.
bool is_alone(const Call& call, const Seen& memory, const Operands& given, const Seen (&seen)[arrays], int first) {
    const Job& job = call.job();
    const int itemsize = size_of(job.logits.dtype);
    const int of_target = call.has_probabilities() ? size_of(job.probabilities.dtype) : size_of(job.label_dtype);
    const int itemsizes[] = {itemsize, of_target, job.wide ? 8 : 4, 8};
    for (int i = first; i < arrays; ++i) {
        if (given[i] != Py_None && memory.meets(seen[i], itemsize, itemsizes[i])) return false;
    }
    return !memory.overlaps_itself(itemsize);
}

// Whether a gradient can be written to `out`: an array as the logits are, and in memory of its own
// or exactly theirs.
bool can_take_gradient(const Asked& asked, const Call& call, PyObject* array, Seen& seen) {
    const Seen& logits = asked.seen[input];
    if (!asked.library->read(array, seen) || !asked.library->is_writable(array)) return false;
    const auto* const shape = seen.shape;
    if (!std::equal(shape, shape + seen.axes, logits.shape, logits.shape + logits.axes)) return false;
    if (seen.dtype != logits.dtype) return false;
    const bool is_input = seen.view.data == logits.view.data &&
                          std::equal(seen.view.strides, seen.view.strides + seen.axes, logits.view.strides);
    return is_alone(call, seen, asked.operands, asked.seen, is_input ? target : input);
}

// Says where the operands lie; false if one is not laid out as the kernels read it.
bool place_operands(const Call& call, const Operands& given, const Seen (&seen)[arrays], Job& job) {
    if (call.has_probabilities()) {
        job.probabilities.data = seen[target].view.data;
    } else {
        if (!seen[target].is_dense(size_of(job.label_dtype))) return false;
        job.labels = seen[target].view.data;
    }
    if (given[weight] != Py_None) {
        if (!seen[weight].is_dense(job.wide ? 8 : 4)) return false;
        job.class_weight = seen[weight].view.data;
    }
    if (given[sample_weight] != Py_None) {
        if (!seen[sample_weight].is_dense(8)) return false;
        job.sample_weight = reinterpret_cast<const double*>(seen[sample_weight].view.data);
    }
    return true;
}

void place_matrices(const Call& call, const Seen (&seen)[arrays], const View* grad, Job& job) {
    call.place(job, seen[input].view, call.has_probabilities() ? &seen[target].view : nullptr, grad);
}

// Puts a loss on torch's graph; raises what Python raises.
nb::object on_graph(const Asked& asked, const nb::object& kept, const nb::object& loss, const nb::object& saved) {
    const Kept& known = *nb::inst_ptr<Kept>(kept);
    nb::handle given[arrays];
    std::copy(asked.operands, asked.operands + arrays, given);
    const nb::tuple to_save = nb::make_tuple(
        given[input], given[target], given[weight], given[sample_weight], nb::none(), saved, nb::none());
    const nb::object rule = !asked.has(normalizer) ? known.rule : nb::make_tuple(
        known.rule[0], known.rule[1], nb::handle(asked.given[normalizer]));
    const nb::tuple made = nb::make_tuple(loss, to_save, rule, kept);
    PyObject* const arguments[] = {given[input].ptr(), given[target].ptr(), given[weight].ptr(), made.ptr()};
    PyObject* const found = PyObject_Vectorcall(known.apply.ptr(), arguments, std::size(arguments), nullptr);
    if (!found) throw nb::python_error();
    return nb::steal(found);
}

// Null for a call that has to go the whole way, with nothing written.
nb::object answer(const Asked& asked, const nb::object& kept) {
    static const Shape no_axes;
    const Kept& known = *nb::inst_ptr<Kept>(kept);
    const Call& call = *known.call;
    const Arrays& library = *asked.library;
    Job job = call.job();
    job.on_torch = &library == Door::get().torch;
    if (!place_operands(call, asked.operands, asked.seen, job)) return {};
    job.normalizer = asked.divisor;
    job.cotangent = asked.cotangent;

    nb::object grad;
    Seen of_out;
    View written;
    if (asked.function == loss_in_place) {
        const bool is_free = library.is_free_of_gradients(asked.operands[input]);
        if (!is_free || !is_alone(call, asked.seen[input], asked.operands, asked.seen, target)) return {};
    }
    if (asked.function == loss_and_gradient) {
        if (asked.has(out)) {
            if (!can_take_gradient(asked, call, asked.given[out], of_out)) return {};
            grad = nb::borrow(asked.given[out]);
            written = of_out.view;
        } else {
            grad = library.empty_like(asked.operands[input], asked.seen[input], known.like_grad, written);
            if (!grad.is_valid()) return {};
            job.fresh = true;
        }
    }
    place_matrices(call, asked.seen, grad.is_valid() ? &written : nullptr, job);

    const bool by_rows = job.reduction == Reduction::none;
    char* place;
    nb::object loss = library.empty(by_rows ? call.row_shape() : no_axes, known.like_loss, place);
    if (!loss.is_valid()) return {};
    (by_rows ? job.losses : job.reduced) = place;
    nb::object saved = nb::none();
    if (asked.is_on_graph && call.saves_rows()) {
        char* rows;
        saved = library.empty({job.rows, numbers_saved(job)}, known.like_saved, rows);
        if (!saved.is_valid()) return {};
        job.saved = reinterpret_cast<SavedRow*>(rows);
    }
    Call::compute(job);
    if (job.bad_label >= 0) return {};
    if (asked.is_on_graph) return on_graph(asked, kept, loss, saved);
    if (!by_rows || call.row_shape().empty()) loss = library.scalar(loss, place, known.like_loss);
    if (!grad.is_valid()) return loss;
    if (asked.has(out) && !library.was_written(grad.ptr())) throw nb::python_error();
    return nb::make_tuple(loss, grad);
}

// Takes the gradient of the loss; false if it needs the whole way.
bool place_cotangent(const Arrays& library, const Call& call, const Seen& seen, Job& job) {
    static const Shape no_axes;
    const std::optional<Float> dtype = library.float_of(seen);
    if (!dtype) return false;
    const Shape& shape = job.reduction == Reduction::none ? call.row_shape() : no_axes;
    if (!std::equal(seen.shape, seen.shape + seen.axes, shape.begin(), shape.end())) return false;
    if (std::all_of(seen.view.strides, seen.view.strides + seen.axes, [](std::int64_t step) { return step == 0; })) {
        if (seen.size() == 0) return false;
        job.cotangent = current_kernels().load(*dtype, seen.view.data);
        return true;
    }
    if (dtype != Float::f64 || !seen.is_dense(8)) return false;
    job.cotangents = reinterpret_cast<const double*>(seen.view.data);
    return true;
}

bool place_saved(const Arrays& library, const Seen& seen, Job& job) {
    if (library.float_of(seen) != Float::f64 || !seen.is_dense(8)) return false;
    job.saved = reinterpret_cast<SavedRow*>(seen.view.data);
    return seen.axes == 2 && seen.shape[0] == job.rows && seen.shape[1] == numbers_saved(job);
}

// The gradient of the logits of a loss on torch's graph; null if it needs the whole way. Where it
// goes over the logits, these are as they were if they still lie at `address`.
nb::object gradient(
    const Kept& known, const nb::tuple& saved, PyObject* divisor, PyObject* cotangent,
    std::optional<std::uintptr_t> address
) {
    const Arrays* const library = Door::get().library_of(saved[0].ptr());
    // While autograd records, the gradient will be differentiated.
    if (!library || library->is_recording()) return {};
    const Call& call = *known.call;
    Job job = call.job();
    job.on_torch = true;
    Operands given;
    for (int i = 0; i < arrays; ++i) given[i] = saved[std::size_t(i)].ptr();
    Seen seen[arrays], of_loss, rows;
    Facts facts;
    if (!read_arrays(*library, given, seen, facts)) return {};
    facts.add(known.facts.back());
    if (!facts.are(known.facts)) return {};  // a hook has changed what was saved
    if (!place_operands(call, given, seen, job) || !read_number(divisor, job.normalizer)) return {};
    if (!library->read(cotangent, of_loss) || !place_cotangent(*library, call, of_loss, job)) return {};
    if (call.saves_rows() && (!library->read(saved[5].ptr(), rows) || !place_saved(*library, rows, job))) return {};
    const Seen& logits = seen[input];
    nb::object grad;
    View written;
    if (address) {
        const auto data = reinterpret_cast<std::uintptr_t>(logits.view.data);
        if (data != *address || of_loss.meets(logits, 8, size_of(job.logits.dtype))) return {};
        grad = library->detached(given[input]);
        written = logits.view;
    } else {
        grad = library->empty_like(given[input], logits, known.like_grad, written);
    }
    if (!grad.is_valid()) return {};
    place_matrices(call, seen, &written, job);
    job.fresh = !address;
    job.backward_only = true;
    Call::compute(job);
    if (job.bad_label >= 0) return {};
    // Other operations that have saved the logits must notice the change.
    if (address && !library->was_written(given[input])) throw nb::python_error();
    return grad;
}

// The forward pass of torch's function: all is computed, and kept by the node of the graph.
nb::object fill_node(nb::handle node, nb::handle, nb::handle, nb::handle, const Given& made) {
    static const auto intern = [](const char* name) { return PyUnicode_InternFromString(name); };
    static PyObject* const names[] = {intern("to_save"), intern("call"), intern("kept")};
    for (std::size_t i = 0; i < std::size(names); ++i) {
        if (PyObject_SetAttr(node.ptr(), names[i], made[i + 1].ptr()) != 0) throw nb::python_error();
    }
    return made[0];
}

// None for what has to go the whole way.
nb::object or_none(nb::object found) {
    if (found.is_valid()) return found;
    PyErr_Clear();
    return nb::none();
}

nb::object ask(Function function, const nb::tuple& given) {
    Asked asked(function, given);
    const Door& door = Door::get();
    if (!look(door, asked)) return or_none({});
    const nb::object kept = door.table.find(asked);
    return or_none(kept.is_valid() ? answer(asked, kept) : nb::object());
}

// What is kept of a library's arrays, by the names of the fields.
void keep(Function function, const nb::tuple& given, const nb::dict& more) {
    Door& door = Door::get();
    Asked asked(function, given);
    if (!look(door, asked)) {
        PyErr_Clear();
        return;
    }
    const auto field = [&](const char* name) -> nb::object {
        return more.contains(name) ? nb::object(more[name]) : nb::none();
    };
    Kept kept;
    kept.facts.assign(asked.facts.numbers, asked.facts.numbers + asked.facts.count);
    for (int i = 0; i < options; ++i) kept.given_options[i] = nb::borrow(asked.given[option_at[i]]);
    kept.prepared = field("call");
    kept.call = nb::cast<const Call*>(kept.prepared);
    kept.like_loss = field("like_loss"), kept.like_grad = field("like_grad"), kept.like_saved = field("like_saved");
    kept.apply = field("apply"), kept.rule = field("rule");
    door.table.keep(asked.facts, nb::cast(std::move(kept)));
}

std::vector<Condition>& conditions(bool of_torch) {
    Door& door = Door::get();
    return of_torch ? door.torch->conditions : door.conditions;
}

}  // namespace

void declare_door(nb::module_& m) {
    nb::class_<Kept>(m, "Kept", "What is known of calls like one that was kept.");
    m.def("answer_cross_entropy", [](const Given& given) { return ask(loss_alone, given); }, nb::arg("given"),
          "Answer a call of cross_entropy if one like it was kept, else return None.");
    m.def("answer_cross_entropy_with_grad", [](const Given& given) { return ask(loss_and_gradient, given); },
          nb::arg("given"), "Answer a call of cross_entropy_with_grad if one like it was kept, else return None.");
    m.def("answer_cross_entropy_in_place", [](const Given& given) { return ask(loss_in_place, given); },
          nb::arg("given"), "Answer a call of polyce.torch's with inplace_backward, else return None.");
    m.def("answer_backward", [](const Kept& kept, const Given& saved, nb::handle normalizer, nb::handle cotangent,
                                std::optional<std::uintptr_t> address) {
              return or_none(gradient(kept, saved, normalizer.ptr(), cotangent.ptr(), address));
          },
          nb::arg("kept"), nb::arg("saved"), nb::arg("normalizer").none(), nb::arg("cotangent").none(),
          nb::arg("address").none(),
          "Compute the gradient of a loss on torch's graph, or return None if that needs the whole "
          "way. With an address it goes over the logits, if these still lie there.");
    m.def("fill_node", &fill_node, nb::arg("node"), nb::arg("logits"), nb::arg("target"), nb::arg("weight").none(),
          nb::arg("made"), "Give a node of torch's graph what its backward pass needs, and return the loss.");
    m.def("keep", [](const std::string& function, const Given& given, const nb::kwargs& more) {
              const auto* const name = std::find(std::begin(function_names), std::end(function_names), function);
              if (name == std::end(function_names)) throw nb::value_error("no function of the door");
              keep(Function(name - function_names), given, more);
          },
          nb::arg("function"), nb::arg("given"), nb::arg("more"),
          nb::sig("def keep(function: str, given: tuple[object, ...], **more: object) -> None"),
          "Keep how a call was computed, so that calls like it can be answered. `call` is what was "
          "prepared for it; `like_loss`, `like_grad` and `like_saved` say how arrays are made; of "
          "torch's, `apply` puts a loss on the graph, where a node keeps `rule`.");
    m.def("forget", [] { Door::get().table.forget(); }, "Forget all calls that were kept.");
    m.def("expect", [](bool of_torch, const Mapping& mapping, const nb::object& name, const nb::object& value) {
              const bool is_missing = value.is(nb::handle(Py_Ellipsis));
              conditions(of_torch).push_back({mapping, name, is_missing ? nb::object() : value});
          },
          nb::arg("of_torch"), nb::arg("mapping"), nb::arg("name"), nb::arg("value").none(),
          "Answer, or answer on tensors, only while a mapping has this very value; an Ellipsis "
          "stands for none.");
    m.def("expect_answer", [](bool of_torch, const nb::object& function, const nb::object& value) {
              conditions(of_torch).push_back({function, {}, value});
          },
          nb::arg("of_torch"), nb::arg("function"), nb::arg("value").none(),
          "The same of a function without arguments, and what it returns.");
    m.def("open_numpy", [](const nb::object& c_api) { return (Door::get().numpy = numpy_arrays(c_api)) != nullptr; },
          nb::arg("c_api"), "Answer calls on NumPy's arrays, if they are laid out as is known.");
    m.def("open_torch", [](const nb::object& tensor, const nb::object& functions) {
              return (Door::get().torch = torch_arrays(tensor, functions)) != nullptr;
          },
          nb::arg("tensor"), nb::arg("functions"),
          "Answer calls on torch's tensors, if their type has DLPack's C exchange interface.");
}

}  // namespace polyce
