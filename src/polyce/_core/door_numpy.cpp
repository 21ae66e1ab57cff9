// NumPy's arrays by their fields, which NumPy's own headers read in every extension that uses it:
// their layout is the same from NumPy 1 on. The buffer protocol takes ten times as long.
#include "door_arrays.hpp"

namespace nb = nanobind;

namespace polyce {
namespace {

struct Descr {
    PyObject head;
    PyTypeObject* type;
    char kind, letter, byteorder, flags;
    int number;
};

struct ArrayFields {
    PyObject head;
    char* data;
    int axes;
    Py_ssize_t* shape;
    Py_ssize_t* strides;
    PyObject* base;
    Descr* dtype;
    int flags;
};

// NPY_ARRAY_WRITEABLE, _WRITEBACKIFCOPY, _WARN_ON_WRITE
constexpr unsigned writeable = 0x0400, is_not_its_own = 0x2000 | 1u << 31;
constexpr int keep_order = 2;  // NPY_KEEPORDER

enum : int { float32 = 11, float64 = 12 };  // NPY_FLOAT, NPY_DOUBLE

// The numbers of functions in NumPy's table, which never change.
enum : std::size_t { version = 0, array_type = 2, scalar_of = 60, new_array = 94, new_like = 277 };

const char other_byteorder = [] {
    const std::uint16_t one = 1;
    return *reinterpret_cast<const char*>(&one) ? '>' : '<';
}();

class NumpyArrays : public Arrays {
public:
    explicit NumpyArrays(void** table) : table_(table) {}

    bool is_array(PyObject* object) const override { return Py_TYPE(object) == type(); }

    bool read(PyObject* array, Seen& seen) const override {
        if (!is_array(array)) return false;
        const ArrayFields& fields = *reinterpret_cast<ArrayFields*>(array);
        if (fields.dtype->byteorder == other_byteorder || fields.axes > max_axes) return false;
        seen.view.data = somewhere(fields.data);
        seen.dtype = fields.dtype->number;
        seen.axes = fields.axes;
        for (int a = 0; a < fields.axes; ++a) {
            seen.shape[a] = fields.shape[a];
            seen.view.strides[a] = fields.strides[a];
        }
        return true;
    }

    bool is_writable(PyObject* array) const override {
        const auto flags = unsigned(reinterpret_cast<ArrayFields*>(array)->flags);
        return (flags & writeable) && !(flags & is_not_its_own);
    }

    bool is_free_of_gradients(PyObject*) const override { return true; }

    nb::object detached(PyObject* array) const override { return nb::borrow(array); }

    bool was_written(PyObject*) const override { return true; }

    bool requires_gradient(PyObject*, const Seen&) const override { return false; }

    bool is_recording() const override { return false; }

    std::optional<Float> float_of(const Seen& seen) const override {
        if (seen.dtype == float64) return Float::f64;
        return seen.dtype == float32 ? std::optional(Float::f32) : std::nullopt;
    }

    nb::object empty(const Shape& shape, nb::handle like, char*& data) const override {
        Py_ssize_t sizes[max_axes];
        for (std::size_t a = 0; a < shape.size(); ++a) sizes[a] = Py_ssize_t(shape[a]);
        using Make = PyObject* (*)(
            PyTypeObject*, PyObject*, int, const Py_ssize_t*, const Py_ssize_t*, void*, int, PyObject*);
        like.inc_ref();  // a dtype, which the function takes
        nb::object made = nb::steal(function<Make>(new_array)(
            type(), like.ptr(), int(shape.size()), sizes, nullptr, nullptr, 0, nullptr));
        if (made.is_valid()) data = somewhere(reinterpret_cast<ArrayFields*>(made.ptr())->data);
        return made;
    }

    nb::object empty_like(PyObject* array, const Seen&, nb::handle, View& view) const override {
        using Make = PyObject* (*)(PyObject*, int, PyObject*, int);
        nb::object made = nb::steal(function<Make>(new_like)(array, keep_order, nullptr, 0));
        Seen seen;
        if (!made.is_valid() || !read(made.ptr(), seen)) return {};
        view = seen.view;
        return made;
    }

    nb::object scalar(const nb::object&, const char* data, nb::handle like) const override {
        using Make = PyObject* (*)(const void*, PyObject*, PyObject*);
        return nb::steal(function<Make>(scalar_of)(data, like.ptr(), nullptr));
    }

private:
    PyTypeObject* type() const { return static_cast<PyTypeObject*>(table_[array_type]); }

    template <typename Function>
    Function function(std::size_t number) const {
        return reinterpret_cast<Function>(table_[number]);
    }

    void** table_;
};

}  // namespace

Arrays* numpy_arrays(nb::handle c_api) {
    static Arrays* known = nullptr;
    if (known || !PyCapsule_IsValid(c_api.ptr(), nullptr)) return known;
    void** const table = static_cast<void**>(PyCapsule_GetPointer(c_api.ptr(), nullptr));
    const unsigned found = reinterpret_cast<unsigned (*)()>(table[version])() >> 24;
    if (found == 1 || found == 2) known = new NumpyArrays(table);
    return known;
}

}  // namespace polyce
