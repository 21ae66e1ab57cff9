#include "arrays.hpp"

#include <stdexcept>

#include "exchange.hpp"

namespace nb = nanobind;

namespace polyce {
namespace {

// What a tensor says of itself.
struct Described {
    char* data = nullptr;
    bool is_on_cpu = true;
    std::string dtype;
    int itemsize = 0, axes = 0;
    const std::int64_t *shape = nullptr, *strides = nullptr;  // strides in elements
    // Where there is no exchange interface.
    Shape own_shape, own_strides;
};

std::string tuple_of(const std::int64_t* sizes, int count) {
    std::string text = "(";
    for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + (count == 1 ? ",)" : ")");
}

[[noreturn]] void refuse(const Wanted& wanted, const std::string& got) {
    throw std::runtime_error(
        std::string(wanted.name) + " must be " + wanted.dtype + " of shape " +
        tuple_of(wanted.shape.data(), int(wanted.shape.size())) + ", as the call was described, got " + got +
        "; where autograd's hooks change saved tensors, let them give back what they were given");
}

bool is_shape(const Wanted& wanted, int axes, const auto* shape) {
    if (axes != int(wanted.shape.size())) return false;
    for (int a = 0; a < axes; ++a) {
        if (shape[a] != wanted.shape[std::size_t(a)]) return false;
    }
    return true;
}

const char* name_of(std::uint8_t code, std::uint8_t bits) {
    static constexpr struct {
        std::uint8_t code, bits;
        const char* name;
    } known[] = {
        {0, 8, "int8"},     {0, 16, "int16"},   {0, 32, "int32"},    {0, 64, "int64"},   {1, 8, "uint8"},
        {1, 16, "uint16"},  {1, 32, "uint32"},  {1, 64, "uint64"},   {2, 16, "float16"}, {2, 32, "float32"},
        {2, 64, "float64"}, {4, 16, "bfloat16"}, {6, 8, "bool"},
    };
    for (const auto& one : known) {
        if (one.code == code && one.bits == bits) return one.name;
    }
    return "another dtype";
}

// Names of attributes, made once.
struct Names {
    nb::object data_ptr = intern("data_ptr"), stride = intern("stride"), shape = intern("shape"),
               dtype = intern("dtype"), is_cpu = intern("is_cpu"), itemsize = intern("itemsize"),
               is_neg = intern("is_neg"), resolve_neg = intern("resolve_neg"),
               untyped_storage = intern("untyped_storage"), nbytes = intern("nbytes"),
               storage_offset = intern("storage_offset"), exchange = intern("__dlpack_c_exchange_api__");

    static nb::object intern(const char* name) {
        return nb::steal(PyUnicode_InternFromString(name));
    }
    static const Names& get() {
        static const Names* const names = new Names;  // Python may end before static objects do
        return *names;
    }
};

nb::object ask(nb::handle object, const nb::object& method) {
    PyObject* const answer = PyObject_CallMethodObjArgs(object.ptr(), method.ptr(), nullptr);
    if (!answer) throw nb::python_error();
    return nb::steal(answer);
}

std::int64_t number(const nb::object& answer) {
    const std::int64_t value = PyLong_AsLongLong(answer.ptr());
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    return value;
}

}  // namespace

const ExchangeApi* exchange_of(PyTypeObject* type) {
    // There are two types at most, a tensor's and a parameter's.
    static struct {
        PyTypeObject* type;
        const ExchangeApi* api;
    } known[2] = {};
    for (const auto& one : known) {
        if (one.type == type) return one.api;
    }
    const ExchangeApi* api = nullptr;
    const nb::object capsule =
        nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), Names::get().exchange, nb::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
        api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api->header.major != 1 || !api->dltensor_from_object) api = nullptr;
    }
    for (auto& one : known) {
        if (one.type) continue;
        Py_INCREF(reinterpret_cast<PyObject*>(type));
        one = {type, api};
        break;
    }
    return api;
}

namespace {

void ask_tensor(nb::handle tensor, Described& found) {
    const Names& names = Names::get();
    found.data = reinterpret_cast<char*>(number(ask(tensor, names.data_ptr)));
    found.is_on_cpu = nb::cast<bool>(tensor.attr(names.is_cpu));
    const std::string dtype = nb::str(nb::object(tensor.attr(names.dtype))).c_str();
    found.dtype = dtype.substr(dtype.rfind('.') + 1);
    found.itemsize = int(number(nb::borrow(tensor.attr(names.itemsize))));
    for (const nb::handle size : tensor.attr(names.shape)) found.own_shape.push_back(nb::cast<std::int64_t>(size));
    for (const nb::handle step : ask(tensor, names.stride)) found.own_strides.push_back(nb::cast<std::int64_t>(step));
    found.axes = int(found.own_shape.size());
    found.shape = found.own_shape.data(), found.strides = found.own_strides.data();
}

Described description_of(nb::handle tensor) {
    Described found;
    const ExchangeApi* api = exchange_of(Py_TYPE(tensor.ptr()));
    if (!api) {
        ask_tensor(tensor, found);
        return found;
    }
    DLTensor seen;
    if (api->dltensor_from_object(tensor.ptr(), &seen) != 0) throw nb::python_error();
    found.data = static_cast<char*>(seen.data) + seen.byte_offset;
    found.is_on_cpu = seen.device_type == on_cpu;
    found.dtype = name_of(seen.code, seen.bits), found.itemsize = seen.bits / 8;
    found.axes = seen.ndim, found.shape = seen.shape, found.strides = seen.strides;
    return found;
}

// torch's storages can be resized under their tensors, also to nothing.
void check_storage(nb::handle tensor, const char* name, const Described& found) {
    std::int64_t end = 1;
    for (int a = 0; a < found.axes; ++a) {
        if (found.shape[a] == 0) return;
        end += (found.shape[a] - 1) * found.strides[a];
    }
    const Names& names = Names::get();
    const std::int64_t bytes = number(ask(ask(tensor, names.untyped_storage), names.nbytes));
    const std::int64_t reach = (number(ask(tensor, names.storage_offset)) + end) * found.itemsize;
    if (reach > bytes) {
        throw std::runtime_error(
            std::string(name) + " must lie within its storage, but its shape " +
            tuple_of(found.shape, found.axes) + " and strides reach over " + std::to_string(reach) +
            " bytes of it and it has " + std::to_string(bytes) + "; do not resize the storage of a tensor in use");
    }
}

// A view that negates holds its values in memory with the other sign.
bool is_negated(nb::handle tensor) { return ask(tensor, Names::get().is_neg).is(nb::handle(Py_True)); }

}  // namespace

char* somewhere(char* data) {
    static char nowhere;
    return data ? data : &nowhere;
}

double number_of(const char* name, nb::handle value) {
    if (!PyFloat_CheckExact(value.ptr()) && nb::hasattr(value, Names::get().untyped_storage)) {
        const Described found = description_of(value);
        check_storage(value, name, found);
        const bool is_one = found.axes == 0 && found.is_on_cpu && !is_negated(value);
        if (is_one && found.dtype == "float32") return double(*reinterpret_cast<const float*>(found.data));
        if (is_one && found.dtype == "float64") return *reinterpret_cast<const double*>(found.data);
    }
    const nb::object number = nb::steal(PyNumber_Float(value.ptr()));
    if (!number.is_valid()) throw nb::python_error();
    return PyFloat_AsDouble(number.ptr());
}

Array::~Array() {
    if (is_held_) PyBuffer_Release(&buffer_);
}

void Array::open(nb::handle array, const Wanted& wanted) {
    if (PyObject_CheckBuffer(array.ptr())) {
        open_buffer(array, wanted);
    } else {
        open_tensor(array, wanted);
    }
}

void Array::open_buffer(nb::handle array, const Wanted& wanted) {
    const int flags = wanted.is_written ? PyBUF_STRIDES | PyBUF_WRITABLE : PyBUF_STRIDES;
    if (PyObject_GetBuffer(array.ptr(), &buffer_, flags) != 0) throw nb::python_error();
    is_held_ = true;
    if (buffer_.itemsize != wanted.itemsize || !is_shape(wanted, buffer_.ndim, buffer_.shape)) {
        const Shape shape(buffer_.shape, buffer_.shape + buffer_.ndim);
        refuse(wanted, std::to_string(buffer_.itemsize) + " bytes each of shape " + tuple_of(shape.data(), buffer_.ndim));
    }
    view_.data = somewhere(static_cast<char*>(buffer_.buf));
    for (int a = 0; a < buffer_.ndim; ++a) view_.strides[a] = buffer_.strides[a];
}

void Array::open_tensor(nb::handle tensor, const Wanted& wanted) {
    const Described found = description_of(tensor);
    if (!found.is_on_cpu) refuse(wanted, "a tensor on another device");
    if (found.dtype != wanted.dtype || !is_shape(wanted, found.axes, found.shape)) {
        refuse(wanted, found.dtype + " of shape " + tuple_of(found.shape, found.axes));
    }
    if (!wanted.is_new) {
        check_storage(tensor, wanted.name, found);
        if (is_negated(tensor)) {
            if (wanted.is_written) refuse(wanted, "a negated view");
            resolved_ = ask(tensor, Names::get().resolve_neg);
            Wanted own = wanted;
            own.is_new = true;
            return open_tensor(resolved_, own);
        }
    }
    view_.data = somewhere(found.data);
    for (int a = 0; a < found.axes; ++a) view_.strides[a] = found.strides[a] * wanted.itemsize;
}

char* Array::open_contiguous(nb::handle array, const Wanted& wanted) {
    open(array, wanted);
    std::int64_t step = wanted.itemsize;
    bool is_contiguous = true;
    for (std::size_t a = wanted.shape.size(); a-- > 0;) {
        if (wanted.shape[a] == 0) return view_.data;  // whatever its strides are
        is_contiguous = is_contiguous && (wanted.shape[a] == 1 || view_.strides[a] == step);
        step *= wanted.shape[a];
    }
    if (!is_contiguous) refuse(wanted, "one that is not C-contiguous");
    return view_.data;
}

}  // namespace polyce
