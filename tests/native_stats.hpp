// The gradient of loss, lse and entropy together, by its plain definition, for native_driver.cpp.
#pragma once

#include "native_cases.hpp"

namespace polyce {

// Cotangents of each row's lse and entropy, of either sign and some of them 0.
struct StatsCotangents {
    std::vector<double> lse, entropy;

    explicit StatsCotangents(std::int64_t rows) {
        for (std::int64_t i = 0; i < rows; ++i) {
            lse.push_back(double((i * 7 + 2) % 11 - 5) / 4.0);
            entropy.push_back(double((i * 5 + 9) % 11 - 5) / 4.0);
        }
    }
};

// Adds to the expected gradient of a case, and to its tolerance, what the cotangents pass back:
// softmax_c (g_lse + g_H (gap_c - H)) with gap_c = lse - x_c. Takes differences to the largest
// logit, and needs a long double of more digits than the arithmetic has.
inline Case with_stats_gradient(Case c) {
    using Wide = long double;
    const std::vector<double> logits = numbers(c.logits, c.format("dtype"));
    std::vector<double> &grad = c.expected.at("grad"), &tolerance = c.expected.at("grad_tol");
    const Wide unit = c.wide() ? 0x1p-53L : 0x1p-24L, scale = c.job.scale, cap = c.job.cap;
    const Wide narrow = c.format("dtype").size == 2 ? c.fields.at("dtype") == "float16" ? 0x1p-11L : 0x1p-8L : 0.0L;
    const std::int64_t classes = c.shape[std::size_t(c.axis)], rows = product(c.row_shape());
    const StatsCotangents cotangents(rows);
    std::int64_t inner = 1;
    for (std::size_t a = std::size_t(c.axis) + 1; a < c.shape.size(); ++a) inner *= c.shape[a];
    for (std::int64_t row = 0; row < rows; ++row) {
        if (c.expected.at("valid")[std::size_t(row)] == 0.0 || classes == 0) continue;
        const auto at = [&](std::int64_t k) { return std::size_t((row / inner * classes + k) * inner + row % inner); };
        const auto transformed = [&](std::int64_t k) {
            const Wide x = logits[at(k)];
            return cap == 0 ? x * scale : std::isinf(x) ? x : cap * std::tanh(x * scale / cap);
        };
        std::int64_t top = 0;
        for (std::int64_t k = 0; k < classes; ++k) top = logits[at(k)] > logits[at(top)] ? k : top;
        Wide others = 0, entropy = 0;
        for (std::int64_t k = 0; k < classes; ++k) others += k == top ? 0 : std::exp(transformed(k) - transformed(top));
        const Wide h = std::log1p(others);
        const auto gap_of = [&](std::int64_t k) { return transformed(top) - transformed(k) + h; };
        for (std::int64_t k = 0; k < classes; ++k) {
            const Wide gap = gap_of(k);
            entropy += std::exp(-gap) == 0 ? 0 : gap * std::exp(-gap);
        }
        const Wide g = cotangents.lse[std::size_t(row)], g_entropy = cotangents.entropy[std::size_t(row)];
        for (std::int64_t k = 0; k < classes; ++k) {
            const Wide angle = cap == 0 ? 0 : std::fabs(logits[at(k)] * scale / cap);
            const Wide slope = cap == 0 ? scale : scale / std::cosh(angle) / std::cosh(angle);
            const Wide gap = gap_of(k), p = std::exp(-gap) * (std::isinf(logits[at(k)]) ? 0 : slope);
            if (p == 0) continue;
            const Wide size = p * (std::fabs(g) + std::fabs(g_entropy) * (gap + entropy));
            grad[at(k)] = double(grad[at(k)] + p * (g + g_entropy * (gap - entropy)));
            const bool vanishes = std::fmax(gap, 2 * angle) > (c.wide() ? 707 : 86);
            const Wide digits = unit * (16 + 12 * (gap + entropy) + 2 * angle) + narrow;
            tolerance[at(k)] += double(vanishes ? size : digits * size);
        }
    }
    return c;
}

}  // namespace polyce
