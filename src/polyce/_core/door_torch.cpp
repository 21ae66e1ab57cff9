// torch's tensors by DLPack's C exchange interface; what it does not tell is asked of torch.
#include <algorithm>

#include "door_arrays.hpp"
#include "exchange.hpp"

namespace nb = nanobind;

namespace polyce {
namespace {

enum : std::uint8_t { of_floats = 2, of_bfloats = 4 };  // DLPack's codes

// A function of torch's, or a method without arguments of one of its types.
class Function {
public:
    Function(nb::handle owner, const char* name) : function_(owner.attr(name)) {}

    nb::object operator()(PyObject* argument) const {
        return nb::steal(PyObject_Vectorcall(function_.ptr(), &argument, 1, nullptr));
    }
    bool is(bool answer, PyObject* argument) const {
        return (*this)(argument).is(nb::handle(answer ? Py_True : Py_False));
    }
    // False if Python failed.
    bool number(PyObject* argument, std::int64_t& value) const {
        const nb::object found = (*this)(argument);
        if (!found.is_valid()) return false;
        value = PyLong_AsLongLong(found.ptr());
        return value != -1;
    }

private:
    nb::object function_;
};

// A property that is one of Python's two truths.
class Property {
public:
    Property(nb::handle type, const char* name)
        : property_(type.attr(name)),
          get_(reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(property_.ptr()), Py_tp_descr_get))) {}

    // Borrowed; null if Python failed.
    PyObject* of(PyObject* object) const {
        PyObject* const found = get_(property_.ptr(), object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
        Py_XDECREF(found);
        return found;
    }

private:
    nb::object property_;
    descrgetfunc get_;
};

class Tensors : public Arrays {
public:
    Tensors(nb::handle type, const ExchangeApi& api, nb::handle torch)
        : type_(reinterpret_cast<PyTypeObject*>(type.ptr())),
          api_(api),
          data_ptr_(type, "data_ptr"),
          is_neg_(type, "is_neg"),
          storage_(type, "untyped_storage"),
          storage_offset_(type, "storage_offset"),
          bytes_(torch.attr("UntypedStorage"), "nbytes"),
          detach_(type, "detach"),
          written_(torch, "written"),
          autocasts_(torch, "is_autocast_enabled"),
          empty_like_(torch, "empty_like"),
          empty_strided_(torch.attr("empty_strided")),
          is_grad_enabled_{torch.attr("is_grad_enabled"), {}, nb::borrow(Py_True)},
          cpu_(nb::str("cpu")),
          requires_grad_(type, "requires_grad") {
        type.inc_ref();
    }

    bool is_array(PyObject* object) const override { return Py_TYPE(object) == type_; }

    bool read(PyObject* array, Seen& seen) const override {
        DLTensor found;
        if (!is_array(array) || !find(array, seen, found) || found.device_type != on_cpu) return false;
        const bool is_short = found.bits == 16 && (found.code == of_floats || found.code == of_bfloats);
        if (is_short && !autocasts_.is(false, cpu_.ptr())) return false;
        // A negated view holds its values in memory with the other sign.
        return is_neg_.is(false, array) && is_within_storage(array, seen, found.bits / 8);
    }

    bool is_writable(PyObject* array) const override { return requires_grad_.of(array) == Py_False; }

    bool is_free_of_gradients(PyObject* array) const override {
        if (!has_no_gradient(array)) return false;
        // What a view is part of has the gradient in its memory too.
        const nb::object base = get(array, base_);
        return base.is_valid() && (base.is_none() || has_no_gradient(base.ptr()));
    }

    nb::object detached(PyObject* array) const override { return detach_(array); }

    bool was_written(PyObject* array) const override { return written_(array).is_valid(); }

    bool requires_gradient(PyObject* array, const Seen& seen) const override {
        const auto code = seen.dtype >> 8;
        return (code == of_floats || code == of_bfloats) && requires_grad_.of(array) != Py_False;
    }

    bool is_recording() const override { return is_grad_enabled_.holds(); }

    std::optional<Float> float_of(const Seen& seen) const override {
        switch (seen.dtype) {
            case of_floats << 8 | 64: return Float::f64;
            case of_floats << 8 | 32: return Float::f32;
            case of_floats << 8 | 16: return Float::f16;
            case of_bfloats << 8 | 16: return Float::bf16;
            default: return std::nullopt;
        }
    }

    nb::object empty(const Shape&, nb::handle like, char*& data) const override {
        nb::object made = nb::steal(PyObject_Call(empty_strided_.ptr(), like.ptr(), nullptr));
        return made.is_valid() && find_data(made.ptr(), data) ? made : nb::object();
    }

    nb::object empty_like(PyObject* array, const Seen& seen, nb::handle like, View& view) const override {
        if (seen.is_dense(itemsize_of(seen))) {
            std::copy(seen.view.strides, seen.view.strides + seen.axes, view.strides);
            return empty({}, like, view.data);
        }
        nb::object made = empty_like_(array);
        Seen found;
        DLTensor described;
        if (!made.is_valid() || !find(made.ptr(), found, described)) return {};
        view = found.view;
        return made;
    }

    nb::object scalar(const nb::object& array, const char*, nb::handle) const override { return array; }

private:
    static int itemsize_of(const Seen& seen) { return int(seen.dtype & 0xff) / 8; }

    bool find_data(PyObject* tensor, char*& data) const {
        std::int64_t address;
        if (!data_ptr_.number(tensor, address)) return false;
        data = somewhere(reinterpret_cast<char*>(address));
        return true;
    }

    bool find(PyObject* tensor, Seen& seen, DLTensor& found) const {
        if (api_.dltensor_from_object(tensor, &found) != 0 || found.lanes != 1 || found.bits % 8) return false;
        seen.view.data = somewhere(static_cast<char*>(found.data) + found.byte_offset);
        seen.dtype = found.code << 8 | found.bits;
        seen.axes = found.ndim;
        if (found.ndim > max_axes) return false;
        for (int a = 0; a < found.ndim; ++a) {
            seen.shape[a] = found.shape[a];
            seen.view.strides[a] = found.strides[a] * (found.bits / 8);
        }
        return true;
    }

    // Storages can be resized under their tensors, also to nothing.
    bool is_within_storage(PyObject* tensor, const Seen& seen, int itemsize) const {
        std::int64_t end = itemsize, offset, bytes;
        for (int a = 0; a < seen.axes; ++a) {
            if (seen.shape[a] == 0) return true;
            end += (seen.shape[a] - 1) * seen.view.strides[a];
        }
        const nb::object storage = storage_(tensor);
        if (!storage.is_valid() || !bytes_.number(storage.ptr(), bytes)) return false;
        return storage_offset_.number(tensor, offset) && offset * itemsize + end <= bytes;
    }

    static nb::object intern(const char* name) { return nb::steal(PyUnicode_InternFromString(name)); }

    static nb::object get(PyObject* tensor, const nb::object& name) {
        return nb::steal(PyObject_GetAttr(tensor, name.ptr()));
    }

    // Others than these have no gradient, and torch warns where one asks for it.
    bool has_no_gradient(PyObject* tensor) const {
        const nb::handle no = Py_False;
        if (get(tensor, is_leaf_).is(no) && get(tensor, retains_grad_).is(no)) return true;
        return get(tensor, grad_).is_none();
    }

    PyTypeObject* type_;
    const ExchangeApi& api_;
    Function data_ptr_, is_neg_, storage_, storage_offset_, bytes_, detach_, written_, autocasts_, empty_like_;
    nb::object empty_strided_;
    Condition is_grad_enabled_;
    nb::object cpu_;
    Property requires_grad_;
    const nb::object base_ = intern("_base"), is_leaf_ = intern("is_leaf"), grad_ = intern("grad"),
                     retains_grad_ = intern("retains_grad");
};

}  // namespace

Arrays* torch_arrays(nb::handle tensor_type, nb::handle functions) {
    static Arrays* known = nullptr;
    if (known) return known;
    const ExchangeApi* const api = exchange_of(reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
    if (api) known = new Tensors(tensor_type, *api, functions);
    return known;
}

}  // namespace polyce
