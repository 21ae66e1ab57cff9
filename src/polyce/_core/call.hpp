// What calls like each other have in common, and one run of the kernels for such a call.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <string>

#include "arrays.hpp"
#include "job.hpp"

namespace polyce {

// Ends the time in which large calls let other Python threads run; for when the process ends.
void wait_for_all_calls();
// For a forked child, which has none of the other threads.
void forget_other_calls();

// What calls of one shape, one set of dtypes and one set of options have in common.
class Call {
public:
    Call(
        Shape shape, int axis, const std::string& logits_dtype, const std::string& target_dtype,
        const std::string& kind, std::int64_t entries, double teacher_scale, bool wide,
        const std::string& result_dtype, const std::string& reduction, std::optional<std::int64_t> ignored,
        bool check_labels, double smoothing, double z_loss, double scale, double cap, bool normalized,
        std::optional<std::int64_t> all_classes
    );

    std::optional<std::int64_t> run(
        nanobind::handle logits, nanobind::handle target, nanobind::handle target_probability, nanobind::handle weight,
        nanobind::handle sample_weight, nanobind::handle normalizer, nanobind::handle losses,
        nanobind::handle stats, nanobind::handle saved, nanobind::handle cotangent, bool by_row,
        nanobind::handle grad_lse, nanobind::handle grad_entropy, nanobind::handle grad, bool fresh, bool backward
    ) const;
    // Reads a part of the classes into `rows`, or, from those of whole rows, writes its gradient.
    void run_part(
        nanobind::handle logits, nanobind::handle target, nanobind::handle target_probability, nanobind::handle weight,
        nanobind::handle sample_weight, std::int64_t start, nanobind::handle teacher, nanobind::handle rows,
        bool entropy, bool first, bool squares, nanobind::handle cotangent, bool by_row,
        nanobind::handle grad_lse, nanobind::handle grad_entropy, nanobind::handle grad
    ) const;
    void log_softmax(nanobind::handle logits, nanobind::handle out) const;
    bool saves_rows() const { return job_.classes > 64; }

    const Job& job() const { return job_; }
    const Shape& row_shape() const { return row_shape_; }
    bool has_probabilities() const { return probabilities_; }

    // Says where the rows lie; axes that all arrays step through evenly become one.
    void place(Job& job, const View& logits, const View* probabilities, const View* grad) const;
    // Runs the kernels; other Python threads may run meanwhile if that takes a while.
    static void compute(Job& job);

private:
    struct Arrays;

    Shape target_shape() const;
    Wanted matrix(const char* name, Float dtype, bool is_written = false, bool is_new = false) const;

    Shape shape_, row_shape_;
    std::string label_dtype_;
    int axis_;
    std::int64_t all_classes_;
    bool probabilities_;
    Job job_;
};

}  // namespace polyce
