// What one call asks of the kernels, as plain data: no Python, no array library.
#pragma once

#include <cstdint>

namespace polyce {

enum class Float : std::uint8_t { f16, bf16, f32, f64 };
enum class Integer : std::uint8_t { i8, i16, i32, i64, u8, u16, u32, u64 };

constexpr int size_of(Float dtype) {
    return dtype == Float::f64 ? 8 : dtype == Float::f32 ? 4 : 2;
}

constexpr int size_of(Integer dtype) { return 1 << (int(dtype) % 4); }

constexpr int max_axes = 64;  // as many as NumPy and torch allow

// An array of one number for each row and class. Strides are in bytes and may be anything: zero,
// negative, no multiple of the element's size.
struct Matrix {
    char* data = nullptr;
    Float dtype = Float::f32;
    std::int64_t class_stride = 0;
    std::int64_t row_stride[max_axes] = {};  // of the axes in Job::axis_size
};

// Statistics of each row, where they are asked for.
struct Stats {
    void* lse = nullptr;      // in the arithmetic dtype
    void* entropy = nullptr;  // in the arithmetic dtype
    std::int64_t* prediction = nullptr;
    bool* correct = nullptr;
    void* top_probability = nullptr;  // in the arithmetic dtype
    void* brier = nullptr;            // in the arithmetic dtype
    std::int64_t* rank = nullptr;     // for labels only
    bool* valid = nullptr;
};

// What `forward` leaves for `backward` where reading the logits once more would cost more.
struct SavedRow {
    double rest_max, rest_sum, rest_coefficient, pivot;
};

// And of each row's teacher, in the same memory after the rows.
struct SavedTeacher {
    double top, sum;
};

enum class Reduction : std::uint8_t { none, sum, mean };

// Where a call has some of each row's classes: which these are, and what is known of each row, as
// formula/parts.py says.
struct Part {
    // What `rows` holds: of each of these numbers those of all rows, as doubles.
    enum Number {
        rest_max, rest_sum, pivot_logit, pivot_coefficient, rest_coefficient, rest_excess, rest_entropy,
        rest_first, rest_squares, pivot, label_logit,
        numbers
    };
    std::int64_t start = 0, classes = 0;  // the first of these classes; how many the whole row has
    // Written where the logits are read; where a gradient is wanted, that of whole rows. Of a teacher's
    // part its largest logits, then its sums. Null for calls with all classes.
    double* rows = nullptr;
    bool needs_entropy = false, needs_first = false, needs_squares = false;
    const double* teacher = nullptr;  // the same of whole rows of the teacher
};

struct Job {
    // The rows' axes, of which neighbours are joined where strides allow.
    std::int64_t rows = 1, classes = 0;
    int axes = 0;
    std::int64_t axis_size[max_axes] = {};

    // A row's number, by which its label and its results are found. Rows that are gone through in
    // another order than that of their numbers (order.hpp) have them as their axes step here.
    bool in_order = true;
    std::int64_t number_stride[max_axes] = {};

    Matrix logits;
    Matrix probabilities;           // or a teacher's logits; data is null for class indices
    bool teacher = false;
    double teacher_scale = 1;
    Matrix grad;                    // data is null where no gradient is wanted
    const void* labels = nullptr;   // contiguous
    // A sparse target: `labels` are the classes of `entries` entries of each row, one row after the
    // other, and these their probabilities.
    bool sparse = false;
    std::int64_t entries = 0;
    const void* entry_probabilities = nullptr;  // in the arithmetic dtype, contiguous
    Integer label_dtype = Integer::i64;
    bool check_labels = true, has_ignored = false;
    std::int64_t ignored = 0;       // as the bits of a label
    bool wide = false;              // float64 arithmetic, else float32
    const void* class_weight = nullptr;     // in the arithmetic dtype, contiguous
    const double* sample_weight = nullptr;  // contiguous
    double smoothing = 0, z_loss = 0, scale = 1, cap = 0;  // cap 0: none

    Reduction reduction = Reduction::mean;
    bool normalized = false;
    double normalizer = 0;
    double cotangent = 1;                // of the loss
    const double* cotangents = nullptr;  // of each row's, in its place
    const double* grad_lse = nullptr;      // likewise of each row's lse; null for 0
    const double* grad_entropy = nullptr;  // and of its entropy

    Float result_dtype = Float::f32;
    void* losses = nullptr;       // without reduction: one for each row
    void* reduced = nullptr;      // with one: the loss, for those who want it in memory
    SavedRow* saved = nullptr;    // written by a forward pass, read by a backward pass
    bool backward_only = false;
    bool fresh = false;           // the gradient is dense and has never been written
    bool streams = false;         // the gradient goes past the caches
    bool on_torch = false;        // the arrays are torch's, whose threads may help
    Stats stats;
    Part part;

    // Found on the way.
    double denominator = 1, total = 0;
    std::int64_t bad_label = -1;  // the place of the first one out of range, where they are checked
};

// How many numbers are saved of each row.
inline std::int64_t numbers_saved(const Job& job) {
    return std::int64_t((sizeof(SavedRow) + (job.teacher ? sizeof(SavedTeacher) : 0)) / sizeof(double));
}

inline SavedTeacher* saved_teachers(const Job& job) { return reinterpret_cast<SavedTeacher*>(job.saved + job.rows); }

// Whether a backward pass has what a forward pass has left, which knows of no entropy.
inline bool has_saved(const Job& job) { return job.backward_only && job.saved && !job.grad_entropy; }

// How many classes a whole row has. Labels and class weights are of those.
inline std::int64_t all_classes(const Job& job) { return job.part.rows ? job.part.classes : job.classes; }

// Whether a part of a teacher's classes is read for what it adds to the softmax of its rows.
inline bool reads_teacher(const Job& job) { return job.part.rows && job.teacher && !job.part.teacher; }

// Whether a part of the classes is read for what it adds to its rows, or written from whole ones.
inline bool reads_part(const Job& job) { return job.part.rows && !job.grad.data; }
inline bool writes_part(const Job& job) { return job.part.rows && job.grad.data; }

// What the labels of some rows tell together.
struct LabelSummary {
    double weight;
    std::int64_t bad_label;
};

// Whether the target is a class of each row.
inline bool has_labels(const Job& job) { return !job.probabilities.data && !job.sparse; }

// One instruction set's kernels.
struct Kernels {
    const char* name;
    LabelSummary (*read_labels)(const Job&, std::int64_t first, std::int64_t count);
    // Rows go by tiles, which do not depend on the number of threads.
    std::int64_t (*tiles)(const Job&);
    std::int64_t (*scratch_bytes)(const Job&);
    double (*run_tile)(const Job&, std::int64_t tile, char* scratch);
    void (*log_softmax_tile)(const Job&, std::int64_t tile, char* scratch);
    void (*store)(Float, double, void*);
    double (*load)(Float, const void*);
};

}  // namespace polyce
