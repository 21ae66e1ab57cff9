// Reads what polyce.testing.dump wrote and prints one line for every array of every case, and one
// for every option that is a real number:
//   case field elements nans infinities checksum
// The checksum adds the finite elements, each times 1 to 7 by its position, in double.
// The format is described at the top of polyce/testing/dump.py; nothing of polyce is used here.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

template <class T>
T load(const char* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

double half(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = std::ldexp(fraction + (exponent ? 1024.0 : 0.0), (exponent ? exponent : 1) - 25);
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    return bits >> 15 ? -value : value;
}

double bfloat(std::uint16_t bits) {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

struct Format {
    std::size_t size;
    double (*read)(const char*);
};

template <class T>
Format plain() {
    return {sizeof(T), [](const char* bytes) { return double(load<T>(bytes)); }};
}

const std::map<std::string, Format> formats = {
    {"float16", {2, [](const char* bytes) { return half(load<std::uint16_t>(bytes)); }}},
    {"bfloat16", {2, [](const char* bytes) { return bfloat(load<std::uint16_t>(bytes)); }}},
    {"float32", plain<float>()},
    {"float64", plain<double>()},
    {"int32", plain<std::int32_t>()},
    {"int64", plain<std::int64_t>()},
    {"uint8", plain<std::uint8_t>()},
};

std::size_t product(const std::string& shape) {
    std::size_t count = 1;
    if (shape == "scalar") return count;
    std::stringstream sizes(shape);
    for (std::string size; std::getline(sizes, size, 'x');) count *= std::stoul(size);
    return count;
}

int main(int, char** arguments) {
    const std::string folder = std::string(arguments[1]) + "/";
    std::ifstream index(folder + "cases.txt");
    for (std::string line; std::getline(index, line);) {
        if (line[0] == '#') continue;
        std::map<std::string, std::string> field;
        std::stringstream items(line);
        for (std::string item; std::getline(items, item, ' ');) {
            const std::size_t at = item.find('=');
            field[item.substr(0, at)] = item.substr(at + 1);
        }
        const std::string target = field["kind"] == "index" || field["kind"] == "sparse" ? "int64" : field["target_dtype"];
        const std::string& rows = field["row_shape"];
        const std::vector<std::vector<std::string>> arrays = {
            {"logits", field["dtype"], field["shape"]}, {"target", target, field["target_shape"]},
            {"weight", field["weight_dtype"], ""},      {"grad_output", "float64", field["loss_shape"]},
            {"loss", "float64", field["loss_shape"]},   {"loss_tol", "float64", field["loss_shape"]},
            {"grad_lse", "float64", rows},              {"grad_entropy", "float64", rows},
            {"grad", "float64", field["shape"]},        {"grad_tol", "float64", field["shape"]},
            {"sample_weight", "float64", rows},         {"prediction", "int64", rows},
            {"lse", "float64", rows},                   {"lse_tol", "float64", rows},
            {"entropy", "float64", rows},               {"entropy_tol", "float64", rows},
            {"correct", "uint8", rows},                 {"valid", "uint8", rows},
            {"top_probability", "float64", rows},       {"top_probability_tol", "float64", rows},
            {"brier", "float64", rows},                 {"brier_tol", "float64", rows},
            {"rank", "int64", rows},
            {"target_probability", "float64", field["target_shape"]},
        };
        for (const char* name : {"label_smoothing", "z_loss", "logit_scale", "logit_softcap", "normalizer", "teacher_scale"}) {
            if (field.at(name) == "-") continue;
            const double value = std::strtod(field.at(name).c_str(), nullptr);
            std::printf("%s %s 1 0 0 %a\n", field["name"].c_str(), name, value);
        }
        for (const auto& array : arrays) {
            const std::string &name = array[0], &shape = array[2];
            if (field.at(name) == "-") continue;
            std::ifstream file(folder + field.at(name), std::ios::binary);
            const std::string bytes{std::istreambuf_iterator<char>(file), {}};
            const Format& format = formats.at(array[1]);
            const std::size_t count = bytes.size() / format.size;
            if (!file || bytes.size() % format.size || (!shape.empty() && count != product(shape))) {
                std::cerr << field["name"] << ": the size of " << name << " is wrong\n";
                return 1;
            }
            int nans = 0, infinities = 0;
            double sum = 0;
            for (std::size_t i = 0; i < count; ++i) {
                const double value = format.read(bytes.data() + i * format.size);
                nans += std::isnan(value);
                infinities += std::isinf(value);
                if (std::isfinite(value)) sum += double(i % 7 + 1) * value;
            }
            std::printf("%s %s %zu %d %d %a\n", field["name"].c_str(), name.c_str(), count, nans,
                        infinities, sum);
        }
    }
}
