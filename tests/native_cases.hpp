// The inputs of native_driver.cpp: arrays in every memory order, and cases, from files or made up; and
// how results are compared with what cases expect.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "job.hpp"

namespace polyce {

using Bytes = std::vector<char>;
using Shape = std::vector<std::int64_t>;
using Fields = std::map<std::string, std::string>;

template <class T>
T load(const char* place) {
    T value;
    std::memcpy(&value, place, sizeof value);
    return value;
}

template <class T>
double read_as(const char* place) {
    return double(load<T>(place));
}

inline double read_half(const char* place) {
    const std::uint16_t bits = load<std::uint16_t>(place);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = std::ldexp(fraction + (exponent ? 1024.0 : 0.0), (exponent ? exponent : 1) - 25);
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    return bits >> 15 ? -value : value;
}

inline double read_brain(const char* place) {
    const std::uint32_t bits = std::uint32_t(load<std::uint16_t>(place)) << 16;
    return read_as<float>(reinterpret_cast<const char*>(&bits));
}

// How numbers of a dtype are stored, what the kernels call it (Float or Integer), and the bound
// from which a number is rounded to infinity.
struct Format {
    int size, code;
    double (*read)(const char*);
    double overflow = INFINITY;
};

inline const std::map<std::string, Format> formats = {
    {"float16", {2, int(Float::f16), read_half, 65520.0}},
    {"bfloat16", {2, int(Float::bf16), read_brain, 0x1.ffp127}},
    {"float32", {4, int(Float::f32), read_as<float>, 0x1.ffffffp127}},
    {"float64", {8, int(Float::f64), read_as<double>}},
    {"int8", {1, int(Integer::i8), read_as<std::int8_t>}},
    {"int16", {2, int(Integer::i16), read_as<std::int16_t>}},
    {"int32", {4, int(Integer::i32), read_as<std::int32_t>}},
    {"int64", {8, int(Integer::i64), read_as<std::int64_t>}},
    {"uint8", {1, int(Integer::u8), read_as<std::uint8_t>}},
    {"uint16", {2, int(Integer::u16), read_as<std::uint16_t>}},
    {"uint32", {4, int(Integer::u32), read_as<std::uint32_t>}},
    {"uint64", {8, int(Integer::u64), read_as<std::uint64_t>}},
};

inline Shape shape_of(const std::string& text) {
    Shape shape;
    if (text == "scalar") return shape;
    std::stringstream sizes(text);
    for (std::string size; std::getline(sizes, size, 'x');) shape.push_back(std::stoll(size));
    return shape;
}

inline std::int64_t product(const Shape& shape) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    return count;
}

inline std::vector<double> numbers(const Bytes& bytes, const Format& format) {
    std::vector<double> values(bytes.size() / std::size_t(format.size));
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = format.read(bytes.data() + i * std::size_t(format.size));
    }
    return values;
}

inline Bytes stored(const std::vector<double>& values, bool wide) {
    Bytes bytes(values.size() * (wide ? 8 : 4));
    for (std::size_t i = 0; i < values.size(); ++i) {
        const float narrow = float(values[i]);
        if (wide) std::memcpy(&bytes[8 * i], &values[i], 8);
        if (!wide) std::memcpy(&bytes[4 * i], &narrow, 4);
    }
    return bytes;
}

// An array's layout: which axis is outermost, how many elements apart neighbours are, whether it is
// reversed, and by how many bytes its address misses alignment.
struct Layout {
    bool transposed = false, backwards = false;
    int step = 1, offset = 0;
};

// An array in memory of exactly its size.
class Placed {
public:
    Placed(const Shape& shape, int size, Layout layout = {})
        : shape_(shape), size_(size), dense_(!layout.transposed && !layout.backwards && layout.step == 1) {
        const std::size_t axes = shape.size();
        strides_.resize(axes);
        std::int64_t step = std::int64_t(size) * layout.step, span = 0, start = 0;
        for (std::size_t i = 0; i < axes; ++i) {
            const std::size_t a = layout.transposed ? i : axes - 1 - i;
            const std::int64_t reach = (shape[a] - 1) * step;
            strides_[a] = layout.backwards ? -step : step;
            if (layout.backwards) start += reach;
            span += reach;
            step *= shape[a];
        }
        const bool empty = product(shape) == 0;
        bytes_ = empty ? 0 : span + size;
        memory_.reset(new char[std::size_t(bytes_ + layout.offset)]);
        data_ = memory_.get() + layout.offset + (empty ? 0 : start);
        // Memory that is never written is noticed: no case has the number 0xa5a5...
        std::memset(memory_.get(), 0xa5, std::size_t(bytes_ + layout.offset));
    }

    char* data() const { return data_; }

    void fill(const Bytes& elements) {
        if (dense_) return void(std::copy(elements.begin(), elements.end(), data_));
        each([&](char* place, std::size_t at) { std::memcpy(place, &elements[at], std::size_t(size_)); });
    }

    Bytes elements() const {
        if (dense_) return Bytes(data_, data_ + bytes_);
        Bytes all(std::size_t(product(shape_) * size_));
        each([&](char* place, std::size_t at) { std::memcpy(&all[at], place, std::size_t(size_)); });
        return all;
    }

    void describe(Matrix& matrix, int axis) const {
        matrix.data = data_;
        int row_axis = 0;
        for (int a = 0; a < int(shape_.size()); ++a) {
            (a == axis ? matrix.class_stride : matrix.row_stride[row_axis++]) = strides_[std::size_t(a)];
        }
    }

private:
    template <class F>
    void each(F f) const {
        const std::int64_t count = product(shape_);
        for (std::int64_t i = 0; i < count; ++i) {
            std::int64_t left = i, offset = 0;
            for (std::size_t a = shape_.size(); a-- > 0;) {
                offset += left % shape_[a] * strides_[a];
                left /= shape_[a];
            }
            f(data_ + offset, std::size_t(i * size_));
        }
    }

    Shape shape_;
    int size_;
    bool dense_;
    std::vector<std::int64_t> strides_;
    std::int64_t bytes_;
    std::unique_ptr<char[]> memory_;
    char* data_;
};

// One call, with its exact results if they come from polyce.testing.dump.
struct Case {
    std::string name;
    Shape shape;
    int axis = 0;
    Job job;  // everything but the arrays, and the dtypes
    Bytes logits, target, target_probability, weight, sample_weight, cotangents, grad_lse, grad_entropy;
    Fields fields;
    std::map<std::string, std::vector<double>> expected;

    bool wide() const { return job.wide; }
    Shape row_shape() const {
        Shape rows = shape;
        rows.erase(rows.begin() + axis);
        return rows;
    }
    const Format& format(const std::string& what) const { return formats.at(fields.at(what)); }
};

inline Bytes file(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + path);
    return Bytes{std::istreambuf_iterator<char>(stream), {}};
}

// The options of a call, from the fields of a case.
inline Job options(const Fields& field) {
    const auto number = [&](const char* name, double absent) {
        const std::string& text = field.at(name);
        return text == "-" ? absent : std::strtod(text.c_str(), nullptr);
    };
    const std::string &reduction = field.at("reduction"), &target_dtype = field.at("target_dtype");
    Job job;
    job.logits.dtype = job.grad.dtype = Float(formats.at(field.at("dtype")).code);
    job.result_dtype = Float(formats.at(field.at("loss_dtype")).code);
    job.wide = field.at("loss_dtype") == "float64";
    job.reduction = reduction == "mean" ? Reduction::mean : reduction == "sum" ? Reduction::sum : Reduction::none;
    const std::string& kind = field.at("kind");
    job.sparse = kind == "sparse";
    job.teacher = kind == "teacher";
    if (kind == "index" || job.sparse) {
        job.label_dtype = Integer(formats.at(target_dtype).code);
        job.ignored = std::stoll(field.at("ignore_index"));
        // An unsigned dtype cannot hold a negative label.
        job.has_ignored = job.ignored >= 0 || target_dtype[0] != 'u';
    } else {
        job.probabilities.dtype = Float(formats.at(target_dtype).code);
    }
    if (job.teacher) job.teacher_scale = number("teacher_scale", 1);
    job.check_labels = false;  // the answers include rows with bad labels
    job.smoothing = number("label_smoothing", 0);
    job.z_loss = number("z_loss", 0);
    job.scale = number("logit_scale", 1);
    job.cap = number("logit_softcap", 0);
    job.cap = std::isinf(job.cap) ? 0 : job.cap;
    job.normalized = field.at("normalizer") != "-";
    job.normalizer = number("normalizer", 0);
    return job;
}

inline Case read_case(const std::string& folder, const std::string& line) {
    Case c;
    std::stringstream items(line);
    for (std::string item; std::getline(items, item, ' ');) {
        const std::size_t at = item.find('=');
        c.fields[item.substr(0, at)] = item.substr(at + 1);
    }
    const auto bytes = [&](const std::string& name) {
        return c.fields.at(name) == "-" ? Bytes{} : file(folder + c.fields.at(name));
    };
    c.name = c.fields.at("name");
    c.job = options(c.fields);
    c.shape = shape_of(c.fields.at("shape"));
    c.axis = std::stoi(c.fields.at("axis"));
    c.logits = bytes("logits");
    c.target = bytes("target");
    if (c.job.sparse) {
        c.target_probability = stored(numbers(bytes("target_probability"), formats.at("float64")), c.wide());
        c.job.entries = shape_of(c.fields.at("target_shape")).back();
    }
    if (c.fields.at("kind") == "index" || c.job.sparse) {
        // The first bytes of each int64 label are the label in a smaller dtype.
        const std::size_t size = std::size_t(c.format("target_dtype").size);
        Bytes labels;
        for (std::size_t i = 0; i < c.target.size(); i += 8) {
            labels.insert(labels.end(), c.target.begin() + long(i), c.target.begin() + long(i + size));
        }
        c.target = Bytes(labels);
    }
    if (c.fields.at("weight") != "-") {
        c.weight = stored(numbers(bytes("weight"), c.format("weight_dtype")), c.wide());
    }
    c.sample_weight = bytes("sample_weight");
    c.cotangents = bytes("grad_output");
    c.grad_lse = bytes("grad_lse");
    c.grad_entropy = bytes("grad_entropy");
    if (c.job.reduction != Reduction::none && !c.cotangents.empty()) c.job.cotangent = load<double>(c.cotangents.data());
    for (const std::string name : {"loss", "grad", "lse", "entropy", "top_probability", "brier"}) {
        for (const std::string& own : {name, name + "_tol"}) c.expected[own] = numbers(bytes(own), formats.at("float64"));
    }
    for (const char* name : {"prediction", "rank"}) c.expected[name] = numbers(bytes(name), formats.at("int64"));
    for (const char* name : {"correct", "valid"}) c.expected[name] = numbers(bytes(name), formats.at("uint8"));
    return c;
}

// A case large enough for several threads, of made-up numbers.
inline Case large_case(
    const std::string& dtype, Shape shape, bool by_labels, double cap, bool of_stats = false
) {
    Case c;
    c.name = "large " + dtype + " " + std::to_string(shape[0]) + "x" + std::to_string(shape[1]) +
             (by_labels ? " labels" : " probabilities") + (cap != 0 ? " capped" : "") + (of_stats ? " of stats" : "");
    c.shape = shape;
    c.axis = 1;
    c.fields = {{"kind", by_labels ? "index" : "probability"}, {"dtype", dtype}, {"loss_dtype", dtype},
                {"target_dtype", by_labels ? "int32" : dtype}, {"reduction", "mean"}, {"ignore_index", "3"},
                {"label_smoothing", "0"}, {"z_loss", "0x1p-10"}, {"logit_scale", "-"},
                {"logit_softcap", cap != 0 ? std::to_string(cap) : "-"}, {"normalizer", "-"}};
    c.job = options(c.fields);
    const Format& format = formats.at(dtype);
    std::uint64_t state = 1;
    const auto random = [&] { return state = state * 6364136223846793005u + 1442695040888963407u, state >> 33; };
    const auto fill = [&](Bytes& bytes, std::int64_t count) {
        bytes.resize(std::size_t(count * format.size));
        for (std::size_t i = 0; i < bytes.size(); i += std::size_t(format.size)) {
            // Between 0 and 8, whatever the dtype, from the upper bits of a small number.
            const double value = double(random() % 2048) / 256.0;
            const float single = float(value);
            const auto bits = load<std::uint32_t>(reinterpret_cast<const char*>(&single));
            const std::uint32_t half = value < 0x1p-14 ? 0 : (bits >> 13) - 0x1c000u, brain = bits >> 16;
            const void* from = dtype == "float64"   ? static_cast<const void*>(&value)
                               : dtype == "float32" ? &single
                               : dtype == "float16" ? static_cast<const void*>(&half)
                                                    : &brain;
            std::memcpy(&bytes[i], from, std::size_t(format.size));
        }
    };
    fill(c.logits, product(shape));
    if (by_labels) {
        for (std::int64_t row = 0; row < shape[0]; ++row) {
            const std::int32_t label = std::int32_t(random() % std::uint64_t(shape[1]));
            const char* start = reinterpret_cast<const char*>(&label);
            c.target.insert(c.target.end(), start, start + 4);
        }
    } else {
        fill(c.target, product(shape));
    }
    std::vector<double> cotangents;
    for (std::int64_t row = 0; of_stats && row < shape[0]; ++row) cotangents.push_back(double(random() % 9) / 4.0 - 1.0);
    c.grad_lse = c.grad_entropy = stored(cotangents, true);
    return c;
}

// With rows one after the other, then with rows side by side.
inline std::vector<Case> large_cases() {
    return {
        large_case("float16", {70, 3001}, true, 0),
        large_case("float32", {70, 3001}, true, 0),
        large_case("bfloat16", {3001, 70}, false, 30),
        large_case("float64", {3001, 70}, false, 0),
        large_case("float32", {70, 3001}, true, 0, true),
        large_case("float16", {3001, 70}, true, 0, true),
    };
}

inline bool agrees(double got, double want, double tolerance, double overflow) {
    if (got == want || (std::isnan(got) && std::isnan(want))) return true;
    if (std::isinf(got)) {
        const double most = std::fabs(want) + tolerance;
        return std::isfinite(want) && std::signbit(got) == std::signbit(want) &&
               (most >= overflow || std::isinf(most));
    }
    return std::fabs(got - want) <= tolerance;
}

// What is wrong with an array, in words, or nothing.
inline std::string fault(const Case& c, const std::string& what, const Bytes& found, const Format& format) {
    const std::vector<double>& want = c.expected.at(what);
    const auto tolerances = c.expected.find(what + "_tol");
    const std::vector<double> got = numbers(found, format);
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double tolerance = tolerances == c.expected.end() ? 0.0 : tolerances->second.at(i);
        if (agrees(got.at(i), want[i], tolerance, format.overflow)) continue;
        char text[200];
        std::snprintf(text, sizeof text, "%s[%zu]: got %.17g, expected %.17g within %.3g", what.c_str(), i,
                      got[i], want[i], tolerance);
        return text;
    }
    return "";
}

// All nans are equal here: which one results is the compiler's choice.
inline bool same_bits(const Bytes& a, const Bytes& b, const Format& format) {
    if (a == b) return true;
    const std::size_t size = std::size_t(format.size);
    for (std::size_t i = 0; i < a.size(); i += size) {
        if (std::memcmp(&a[i], &b[i], size) == 0) continue;
        if (!std::isnan(format.read(&a[i])) || !std::isnan(format.read(&b[i]))) return false;
    }
    return true;
}

}  // namespace polyce
