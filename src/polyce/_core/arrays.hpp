// An array as Python hands it over: address, shape, dtype and strides, checked before anything of
// it is read. NumPy's come by the buffer protocol, torch's tensors by DLPack's C exchange interface.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "job.hpp"

namespace polyce {

using Shape = std::vector<std::int64_t>;

// What an array has to be.
struct Wanted {
    const char* name;
    const Shape& shape;
    const char* dtype;
    int itemsize;
    bool is_written = false;
    bool is_new = false;  // made for this call, so that its memory is as large as it should be
};

// Where an array lies. Its shape is known already.
struct View {
    char* data;
    std::int64_t strides[max_axes];  // in bytes
};

// Arrays without elements may lie nowhere, but where null means that there is none, they are.
char* somewhere(char* data);

// The value of an array of no dimension, or of a float.
double number_of(const char* name, nanobind::handle value);

class Array {
public:
    Array() = default;
    Array(const Array&) = delete;
    ~Array();

    // Raises RuntimeError for an array that is not what is wanted.
    void open(nanobind::handle array, const Wanted& wanted);
    // For what has a number for each row or class: its address, never null.
    char* open_contiguous(nanobind::handle array, const Wanted& wanted);

    const View& view() const { return view_; }
    bool is_tensor() const { return !is_held_; }

private:
    void open_buffer(nanobind::handle array, const Wanted& wanted);
    void open_tensor(nanobind::handle tensor, const Wanted& wanted);

    View view_;
    Py_buffer buffer_;
    bool is_held_ = false;
    nanobind::object resolved_;
};

}  // namespace polyce
