// What Python sees: a call that was described, the door for calls like it, and how the core is set.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "call.hpp"
#include "core.hpp"
#include "door.hpp"
#include "threads.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace nb = nanobind;
using namespace polyce;

namespace {

nb::tuple isa_names_here() {
    nb::list names;
    for (const char* const* name = isa_names(); *name; ++name) names.append(nb::str(*name));
    return nb::tuple(names);
}

}  // namespace

NB_MODULE(_core, m) {
    // A daemon thread that is in a call when the interpreter ends still holds what it runs with.
    nb::set_leak_warnings(false);
    m.doc() = "polyce's compiled kernels: arrays in, losses and gradients out. An array must be what the "
              "call was described with; all else is checked by polyce.call.problem.";
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&wait_for_all_calls));
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, &forget_other_calls);
#endif
    nb::class_<Call>(m, "Call", "What calls of one shape, one set of dtypes and options share.")
        .def(nb::init<Shape, int, const std::string&, const std::string&, const std::string&, std::int64_t, double,
                      bool, const std::string&, const std::string&, std::optional<std::int64_t>, bool, double,
                      double, double, double, bool, std::optional<std::int64_t>>(),
             nb::arg("shape"), nb::arg("axis"), nb::arg("logits_dtype"), nb::arg("target_dtype"),
             nb::arg("kind"), nb::arg("entries"), nb::arg("teacher_scale"), nb::arg("wide"),
             nb::arg("result_dtype"), nb::arg("reduction"),
             nb::arg("ignored").none(), nb::arg("check_labels"), nb::arg("smoothing"),
             nb::arg("z_loss"), nb::arg("scale"), nb::arg("cap"), nb::arg("normalized"),
             nb::arg("all_classes") = nb::none())
        .def("run", &Call::run, nb::arg("logits"), nb::arg("target"), nb::arg("target_probability").none(), nb::arg("weight").none(),
             nb::arg("sample_weight").none(), nb::arg("normalizer"), nb::arg("losses").none(),
             nb::arg("stats").none(), nb::arg("saved").none(), nb::arg("cotangent"),
             nb::arg("by_row"), nb::arg("grad_lse").none(), nb::arg("grad_entropy").none(),
             nb::arg("grad").none(), nb::arg("fresh"), nb::arg("backward"),
             "Compute, and write what has a place; arrays have the buffer protocol, or are torch "
             "tensors on a CPU. Gives the place of the first bad label, where labels are checked; "
             "then nothing was written. A gradient is `fresh` where its memory is "
             "dense and has never been written.")
        .def("run_part", &Call::run_part, nb::arg("logits"), nb::arg("target"), nb::arg("target_probability").none(),
             nb::arg("weight").none(), nb::arg("sample_weight").none(), nb::arg("start"), nb::arg("teacher").none(),
             nb::arg("rows"), nb::arg("entropy"), nb::arg("first"), nb::arg("squares"), nb::arg("cotangent"),
             nb::arg("by_row"), nb::arg("grad_lse").none(), nb::arg("grad_entropy").none(), nb::arg("grad").none(),
             "Read some of `all_classes` classes, from `start` on, into `rows`: of each number that a row's "
             "parts are joined by those of all rows. With a gradient, `rows` are of the whole, and it is written. "
             "A teacher's logits are read for its rows, and whole ones are taken as `teacher`.")
        .def("log_softmax", &Call::log_softmax, nb::arg("logits"), nb::arg("out"),
             "Write log(softmax(logits)) into out.")
        .def_prop_ro("saves_rows", &Call::saves_rows,
                     "Whether a backward pass is spared a reading of the logits by `saved`.");
    m.def("get_num_threads", &thread_count, "Give the number of threads of a large call.");
    m.def("set_num_threads", &set_thread_count, nb::arg("count"), "Set it.");
    m.def("isa", &isa_name, "Name the instruction set in use.");
    m.def("isas", &isa_names_here, nb::sig("def isas() -> tuple[str, ...]"),
          "Name the instruction sets that are here, best first.");
    m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); }, nb::arg("name"),
          "Use this instruction set from now on; False if it is not here.");
    declare_door(m);
}
