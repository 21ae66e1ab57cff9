// DLPack's C exchange interface, by which torch's tensors tell where they lie.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace polyce {

// As DLPack 1 lays them out: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct ExchangeApi {
    struct {
        std::uint32_t major, minor;
        void* previous;
    } header;
    void* functions_for_managed_tensors[3];
    // The tensor's own shape and strides, for as long as it is left alone.
    int (*dltensor_from_object)(void* object, DLTensor* out);
    void* current_work_stream;
};

constexpr int on_cpu = 1;

// The interface of a type's tensors; null for those of a torch that is too old for it.
const ExchangeApi* exchange_of(PyTypeObject* type);

}  // namespace polyce
