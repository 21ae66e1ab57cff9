#include "call.hpp"

#include <atomic>
#include <chrono>
#include <thread>

#include "core.hpp"

namespace nb = nanobind;

namespace polyce {
namespace {

// Calls smaller than this are over before another thread could have had the lock.
constexpr std::int64_t numbers_worth_unlocking = 4096;

Float float_named(const std::string& name) {
    if (name == "float16") return Float::f16;
    if (name == "bfloat16") return Float::bf16;
    if (name == "float32") return Float::f32;
    if (name == "float64") return Float::f64;
    throw nb::type_error(("no floating dtype of the kernels: " + name).c_str());
}

Integer integer_named(const std::string& name) {
    constexpr const char* names[] = {"int8",  "int16",  "int32",  "int64",
                                     "uint8", "uint16", "uint32", "uint64"};
    for (int i = 0; i < 8; ++i) {
        if (name == names[i]) return Integer(i);
    }
    throw nb::type_error(("no integer dtype of the kernels: " + name).c_str());
}

const char* name_of(Float dtype) {
    constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64"};
    return names[int(dtype)];
}

// Lets other Python threads run during a large call. Not once the process is ending: a thread that
// then asked for the lock back would be ended by Python, in the middle of C++ frames that nothing
// may unwind. So the end waits for those that are out, and later calls keep the lock.
class Unlocked {
public:
    explicit Unlocked(std::int64_t numbers) {
        if (ending_ || numbers < numbers_worth_unlocking) return;
        ++outside_;
        state_ = PyEval_SaveThread();
    }
    ~Unlocked() {
        if (!state_) return;
        PyEval_RestoreThread(state_);
        --outside_;
    }
    Unlocked(const Unlocked&) = delete;

    // A forked child has none of the other threads, which were out when it was made.
    static void forget_others() { outside_ = 0; }

    static void wait_for_all() {
        ending_ = true;
        while (outside_ > 0) {
            nb::gil_scoped_release unlocked;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }

private:
    static inline std::atomic<bool> ending_{false};
    static inline std::atomic<int> outside_{0};
    PyThreadState* state_ = nullptr;
};

}  // namespace

void wait_for_all_calls() { Unlocked::wait_for_all(); }

void forget_other_calls() { Unlocked::forget_others(); }

Call::Call(
    Shape shape, int axis, const std::string& logits_dtype, const std::string& target_dtype,
    const std::string& kind, std::int64_t entries, double teacher_scale, bool wide,
    const std::string& result_dtype, const std::string& reduction, std::optional<std::int64_t> ignored,
    bool check_labels, double smoothing, double z_loss, double scale, double cap, bool normalized,
    std::optional<std::int64_t> all_classes
)
    : shape_(std::move(shape)), axis_(axis), probabilities_(kind == "probability" || kind == "teacher") {
    if (int(shape_.size()) > max_axes || axis < 0 || axis >= int(shape_.size())) {
        throw nb::value_error("the class axis must be one of at most 64 axes");
    }
    for (int a = 0; a < int(shape_.size()); ++a) {
        if (a == axis) continue;
        row_shape_.push_back(shape_[std::size_t(a)]);
        job_.rows *= shape_[std::size_t(a)];
    }
    job_.classes = shape_[std::size_t(axis)];
    all_classes_ = all_classes.value_or(job_.classes);
    job_.logits.dtype = job_.grad.dtype = float_named(logits_dtype);
    if (probabilities_) {
        job_.probabilities.dtype = float_named(target_dtype);
    } else if (target_dtype != "none") {
        job_.label_dtype = integer_named(target_dtype);
        label_dtype_ = target_dtype;
    }
    job_.wide = wide;
    job_.result_dtype = float_named(result_dtype);
    job_.reduction = reduction == "mean"  ? Reduction::mean
                     : reduction == "sum" ? Reduction::sum
                                          : Reduction::none;
    job_.check_labels = check_labels && !probabilities_;
    job_.sparse = kind == "sparse";
    job_.entries = entries;
    job_.teacher = kind == "teacher";
    job_.teacher_scale = teacher_scale;
    job_.has_ignored = ignored.has_value();
    job_.ignored = ignored.value_or(0);
    job_.smoothing = smoothing;
    job_.z_loss = z_loss;
    job_.scale = scale;
    job_.cap = cap;
    job_.normalized = normalized;
}

// The arrays of a call, which are open while it runs, and where they are put.
struct Call::Arrays {
    const Call& call;
    Job& job;
    const char* wide = job.wide ? "float64" : "float32";
    int wide_size = job.wide ? 8 : 4;
    Array logits, target, grad, others[16];
    Array* next = others;

    void* open(const char* name, nb::handle array, const Shape& shape, const char* dtype, int itemsize, bool is_result = false) {
        return (next++)->open_contiguous(array, {name, shape, dtype, itemsize, is_result, is_result});
    }
    void* rows(const char* name, nb::handle array, const char* dtype, int itemsize, bool is_result) {
        return array.is_none() ? nullptr : open(name, array, call.row_shape_, dtype, itemsize, is_result);
    }
    const double* doubles(const char* name, nb::handle array) {
        return static_cast<const double*>(rows(name, array, "float64", 8, false));
    }

    void open_matrices(nb::handle of_logits, nb::handle of_target, nb::handle of_grad, bool fresh) {
        const bool probabilities = call.probabilities_;
        logits.open(of_logits, call.matrix("input", job.logits.dtype));
        job.on_torch = logits.is_tensor();
        if (probabilities) {
            target.open(of_target, call.matrix("target", job.probabilities.dtype));
        } else {
            job.labels = target.open_contiguous(
                of_target, {"target", call.target_shape(), call.label_dtype_.c_str(), size_of(job.label_dtype)});
        }
        const bool has_grad = !of_grad.is_none();
        if (has_grad) grad.open(of_grad, call.matrix(fresh ? "the gradient" : "out", job.grad.dtype, true, fresh));
        job.fresh = fresh;
        call.place(job, logits.view(), probabilities ? &target.view() : nullptr, has_grad ? &grad.view() : nullptr);
    }

    void open_weights(nb::handle target_probability, nb::handle weight, nb::handle sample_weight) {
        if (job.sparse) {
            job.entry_probabilities = open("target.probability", target_probability, call.target_shape(), wide, wide_size);
        }
        if (!weight.is_none()) job.class_weight = open("weight", weight, {call.all_classes_}, wide, wide_size);
        job.sample_weight = doubles("sample_weight", sample_weight);
    }

    void open_cotangents(nb::handle cotangent, bool by_row, nb::handle grad_lse, nb::handle grad_entropy) {
        if (by_row) {
            job.cotangents = doubles("grad_output", cotangent);
        } else {
            job.cotangent = number_of("grad_output", cotangent);
        }
        job.grad_lse = doubles("grad_lse", grad_lse);
        job.grad_entropy = doubles("grad_entropy", grad_entropy);
    }

    void open_stats(const nb::tuple& given) {
        std::size_t at = 0;
        const auto floats = [&](const char* name) { return rows(name, given[at++], wide, wide_size, true); };
        const auto integers = [&](const char* name) {
            return static_cast<std::int64_t*>(rows(name, given[at++], "int64", 8, true));
        };
        const auto flags = [&](const char* name) { return static_cast<bool*>(rows(name, given[at++], "bool", 1, true)); };
        job.stats.lse = floats("lse");
        job.stats.entropy = floats("entropy");
        job.stats.prediction = integers("prediction");
        job.stats.correct = flags("correct");
        job.stats.top_probability = floats("top_probability");
        job.stats.brier = floats("brier");
        job.stats.rank = integers("rank");
        job.stats.valid = flags("valid");
    }
};

std::optional<std::int64_t> Call::run(
    nb::handle logits, nb::handle target, nb::handle target_probability, nb::handle weight, nb::handle sample_weight,
    nb::handle normalizer, nb::handle losses, nb::handle stats, nb::handle saved, nb::handle cotangent,
    bool by_row, nb::handle grad_lse, nb::handle grad_entropy, nb::handle grad, bool fresh, bool backward
) const {
    Job job = job_;
    Arrays arrays{*this, job};
    arrays.open_matrices(logits, target, grad, fresh);
    arrays.open_weights(target_probability, weight, sample_weight);
    job.normalizer = number_of("normalizer", normalizer);
    const char* const result = name_of(job.result_dtype);
    if (job.reduction == Reduction::none) {
        job.losses = arrays.rows("the loss", losses, result, size_of(job.result_dtype), true);
    } else if (!losses.is_none()) {
        job.reduced = arrays.open("the loss", losses, {}, result, size_of(job.result_dtype), true);
    }
    if (!saved.is_none()) {
        const Shape shape{job.rows, numbers_saved(job)};
        job.saved = static_cast<SavedRow*>(arrays.open("what was saved of the rows", saved, shape, "float64", 8, !backward));
    }
    arrays.open_cotangents(cotangent, by_row, grad_lse, grad_entropy);
    if (!stats.is_none()) arrays.open_stats(nb::cast<nb::tuple>(stats));
    job.backward_only = backward;
    compute(job);
    if (job.bad_label >= 0) return job.bad_label;
    return {};
}

void Call::run_part(
    nb::handle logits, nb::handle target, nb::handle target_probability, nb::handle weight, nb::handle sample_weight,
    std::int64_t start, nb::handle teacher, nb::handle rows, bool entropy, bool first, bool squares,
    nb::handle cotangent, bool by_row, nb::handle grad_lse, nb::handle grad_entropy, nb::handle grad
) const {
    if (start < 0 || start + job_.classes > all_classes_) throw nb::value_error("a part's classes must be some of all");
    Job job = job_;
    Arrays arrays{*this, job};
    arrays.open_matrices(logits, target, grad, !grad.is_none());
    arrays.open_weights(target_probability, weight, sample_weight);
    arrays.open_cotangents(cotangent, by_row, grad_lse, grad_entropy);
    const auto of_each_row = [&](std::int64_t numbers) {
        Shape shape = row_shape_;
        shape.insert(shape.begin(), numbers);
        return shape;
    };
    const bool of_teacher = job.teacher && teacher.is_none();
    const Shape known = of_each_row(of_teacher ? 2 : Part::numbers);
    void* const place = arrays.open("what is known of the rows", rows, known, "float64", 8, grad.is_none());
    job.part = {start, all_classes_, static_cast<double*>(place), entropy, first, squares};
    if (job.teacher && !of_teacher) {
        job.part.teacher = static_cast<const double*>(arrays.open("a teacher's rows", teacher, of_each_row(2), "float64", 8));
    }
    compute(job);
}

void Call::log_softmax(nb::handle logits, nb::handle out) const {
    Job job = job_;
    Array x, g;
    x.open(logits, matrix("input", job.logits.dtype));
    g.open(out, matrix("the result", job.grad.dtype, true, true));
    job.on_torch = x.is_tensor();
    place(job, x.view(), nullptr, &g.view());
    job.fresh = true;
    const Unlocked unlocked(job.rows * job.classes);
    polyce::log_softmax(job);
}

void Call::place(Job& job, const View& logits, const View* probabilities, const View* grad) const {
    const View* arrays[] = {&logits, probabilities, grad};
    Matrix* matrices[] = {&job.logits, &job.probabilities, &job.grad};
    for (int m = 0; m < 3; ++m) {
        if (!arrays[m]) continue;
        matrices[m]->data = arrays[m]->data;
        matrices[m]->class_stride = arrays[m]->strides[axis_];
    }
    for (int a = 0; a < int(shape_.size()); ++a) {
        const std::int64_t size = shape_[std::size_t(a)];
        if (a == axis_ || size == 1) continue;
        const int last = job.axes - 1;
        bool joins = last >= 0;
        for (int m = 0; joins && m < 3; ++m) {
            joins = !arrays[m] || matrices[m]->row_stride[last] == arrays[m]->strides[a] * size;
        }
        const int at = joins ? last : job.axes++;
        job.axis_size[at] = joins ? job.axis_size[at] * size : size;
        for (int m = 0; m < 3; ++m) {
            if (arrays[m]) matrices[m]->row_stride[at] = arrays[m]->strides[a];
        }
    }
}

void Call::compute(Job& job) {
    const Unlocked unlocked(job.rows * job.classes);
    read_target(job);
    if (job.bad_label >= 0) return;
    polyce::run(job);
    store_reduced(job);
}

Shape Call::target_shape() const {
    Shape shape = row_shape_;
    if (job_.sparse) shape.push_back(job_.entries);
    return shape;
}

Wanted Call::matrix(const char* name, Float dtype, bool is_written, bool is_new) const {
    return {name, shape_, name_of(dtype), size_of(dtype), is_written, is_new};
}

}  // namespace polyce
