// What the door reads from the arrays of a call, and makes for its answer, library by library.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "arrays.hpp"

namespace polyce {

// An array as it is now. All but `view` is what the description of a call depends on.
struct Seen {
    View view;
    std::int64_t dtype;  // as the library numbers them
    int axes;
    std::int64_t shape[max_axes];

    std::int64_t size() const;
    bool is_dense(int itemsize) const;  // C-contiguous and aligned
    bool overlaps_itself(int itemsize) const;
    bool meets(const Seen& other, int itemsize, int itemsize_of_other) const;
};

// What must be so for a call to be answered: the value of a name in a mapping, null where it must
// be missing, or, without a name, what a function returns. It must be the same object.
struct Condition {
    nanobind::object of, name, value;

    bool holds() const;
};

// How arrays of one library are read and made. Where Python fails in what follows, the call goes
// the whole way.
class Arrays {
public:
    virtual ~Arrays() = default;
    virtual bool is_array(PyObject* object) const = 0;
    // False for an array that the whole way has to look at.
    virtual bool read(PyObject* array, Seen& seen) const = 0;
    // Whether results may be written into an array that has been read.
    virtual bool is_writable(PyObject* array) const = 0;
    // Whether the memory of an array that has been read can take the gradient that autograd gives it.
    virtual bool is_free_of_gradients(PyObject* array) const = 0;
    // Called once an array was written to.
    virtual bool was_written(PyObject* array) const = 0;
    // Whether an array that has been read requires a gradient, and whether autograd records now.
    virtual bool requires_gradient(PyObject* array, const Seen& seen) const = 0;
    virtual bool is_recording() const = 0;
    // Its dtype, if the kernels compute with it.
    virtual std::optional<Float> float_of(const Seen& seen) const = 0;
    // An array made here, with its address. `like` is its dtype for NumPy; for torch its shape,
    // strides and dtype.
    virtual nanobind::object empty(const Shape& shape, nanobind::handle like, char*& data) const = 0;
    // The same laid out like an array that has been read, but dense; `like` is as above, for one that
    // is C-contiguous.
    virtual nanobind::object empty_like(
        PyObject* array, const Seen& seen, nanobind::handle like, View& view) const = 0;
    // The same memory, cut from the graph.
    virtual nanobind::object detached(PyObject* array) const = 0;
    // An array of no axes as the library's own sum returns it.
    virtual nanobind::object scalar(const nanobind::object& array, const char* data, nanobind::handle like) const = 0;

    std::vector<Condition> conditions;
};

// Null where this NumPy lays out its arrays in a way that is not known.
Arrays* numpy_arrays(nanobind::handle c_api);
// Null where this torch has no exchange interface. `functions` has torch's by their names.
Arrays* torch_arrays(nanobind::handle tensor_type, nanobind::handle functions);

}  // namespace polyce
