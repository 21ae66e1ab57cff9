// What the door reads from the arrays of a call, and makes for its answer, library by library.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "arrays.hpp"
#include "job.hpp"

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

// Failures of Python in what follows are no errors: the call goes the whole way.
class Arrays {
public:
    virtual ~Arrays() = default;
    virtual bool is_array(PyObject* object) const = 0;
    // False for an array that the whole way has to look at.
    virtual bool read(PyObject* array, Seen& seen) const = 0;
    // Whether results may be written into the array, which has been read.
    virtual bool is_writable(PyObject* array) const = 0;
    virtual nanobind::object empty(const Shape& shape, nanobind::handle dtype) const = 0;
    virtual nanobind::object empty_like(PyObject* array) const = 0;
    // A loss of one number: `value` has the dtype.
    virtual nanobind::object scalar(const void* value, nanobind::handle dtype) const = 0;
    virtual void written(PyObject* array) const = 0;
};

// Null where this NumPy lays out its arrays in a way that is not known.
const Arrays* numpy_arrays(nanobind::handle c_api);

}  // namespace polyce
