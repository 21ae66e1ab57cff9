// Checks the kernels against the answers that polyce.testing.dump wrote, without Python: for every
// instruction set of this machine, in every memory order and on several threads. It is meant to be
// built with sanitizers: every array lies in heap memory of exactly its size.
//
//   polyce_driver FOLDER
//
// The format of the files is described at the top of polyce/testing/dump.py.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "account.hpp"
#include "core.hpp"
#include "native_cases.hpp"
#include "pool.hpp"
#include "threads.hpp"

using namespace polyce;

namespace {

// Which threads are refused scratch memory, which is all that the core allocates in this form.
enum class Refused : std::uint8_t { nobody, helpers, everybody };
std::atomic<Refused> refused{Refused::nobody};
thread_local bool is_caller = false;

}  // namespace

void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    const Refused who = refused;
    if (who == Refused::everybody || (who == Refused::helpers && !is_caller)) return nullptr;
    const auto unit = std::size_t(alignment);
    return std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
}

void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

namespace {

enum class Gradient : std::uint8_t { absent, apart, in_place, from_saved, from_parts };

struct Way {
    std::string name;
    Layout layout = {};
    Gradient gradient = Gradient::apart;
    int threads = 1;
    bool stats = true, fresh = false, streams = false, entropy = true;
};

struct Results {
    Bytes loss, grad, lse, entropy, prediction, correct, top_probability, brier, rank, valid;
};

void place_rows(Job& job, const Shape& rows) {
    job.rows = product(rows);
    job.axes = int(rows.size());
    for (std::size_t a = 0; a < rows.size(); ++a) job.axis_size[a] = rows[a];
}

void read_and_run(Job& job) {
    read_target(job);
    run(job);
}

// Reads the classes in two parts, for which memory lies where it should, and then as one part, from
// which the gradient is written.
void run_as_parts(Job job, const Placed& grad, int axis) {
    std::vector<double> rows(std::size_t(Part::numbers * job.rows)), teacher(std::size_t(2 * job.rows));
    const bool squares = job.stats.brier && has_labels(job);
    job.part = {0, job.classes, rows.data(), job.stats.entropy || job.grad_entropy, true, squares};
    job.losses = job.reduced = nullptr;
    job.stats = {};
    const auto run_part = [&](std::int64_t start, std::int64_t classes, double* place) {
        Job part = job;
        part.classes = classes;
        part.part.start = start;
        part.part.rows = place;
        for (Matrix* matrix : {&part.logits, &part.probabilities, &part.grad}) {
            if (matrix->data) matrix->data += start * matrix->class_stride;
        }
        read_and_run(part);
    };
    if (job.teacher) {
        run_part(0, job.classes, teacher.data());
        job.part.teacher = teacher.data();
    }
    const std::int64_t half = job.classes / 2;
    run_part(0, half, rows.data());
    run_part(half, job.classes - half, rows.data());
    run_part(0, job.classes, rows.data());
    grad.describe(job.grad, axis);
    run_part(0, half, rows.data());
    run_part(half, job.classes - half, rows.data());
}

Results run_case(const Case& c, const Way& way) {
    Job job = c.job;
    const Shape rows = c.row_shape();
    place_rows(job, rows);
    job.classes = c.shape[std::size_t(c.axis)];
    const bool names_classes = c.fields.at("kind") == "index" || job.sparse;
    const int size = size_of(job.logits.dtype), target_size = c.format("target_dtype").size;
    Placed logits(c.shape, size, way.layout), apart(c.shape, size, way.layout);
    Shape named = rows;
    if (job.sparse) named.push_back(job.entries);
    Placed target(names_classes ? named : c.shape, target_size,
                  names_classes ? Layout{false, false, 1, way.layout.offset} : way.layout);
    logits.fill(c.logits);
    target.fill(c.target);
    logits.describe(job.logits, c.axis);
    if (names_classes) {
        job.labels = target.data();
        job.entry_probabilities = c.target_probability.data();
    } else {
        target.describe(job.probabilities, c.axis);
    }
    if (!c.weight.empty()) job.class_weight = c.weight.data();
    if (!c.sample_weight.empty()) {
        job.sample_weight = reinterpret_cast<const double*>(c.sample_weight.data());
    }
    if (job.reduction == Reduction::none && !c.cotangents.empty()) {
        job.cotangents = reinterpret_cast<const double*>(c.cotangents.data());
    }
    if (!c.grad_lse.empty()) job.grad_lse = reinterpret_cast<const double*>(c.grad_lse.data());
    if (!c.grad_entropy.empty()) job.grad_entropy = reinterpret_cast<const double*>(c.grad_entropy.data());

    const Placed& grad = way.gradient == Gradient::in_place ? logits : apart;
    if (way.gradient == Gradient::apart || way.gradient == Gradient::in_place) {
        grad.describe(job.grad, c.axis);
    }
    job.fresh = way.fresh;
    job.streams = way.streams;
    const int arithmetic = c.wide() ? 8 : 4;
    Placed loss(job.reduction == Reduction::none ? rows : Shape{}, size_of(job.result_dtype));
    (job.reduction == Reduction::none ? job.losses : job.reduced) = loss.data();
    Placed lse(rows, arithmetic), entropy(rows, arithmetic), prediction(rows, 8);
    Placed correct(rows, 1), valid(rows, 1), top_probability(rows, arithmetic), brier(rows, arithmetic), rank(rows, 8);
    if (way.stats) {
        // Without the entropy a label is the pivot.
        void* const of_entropy = way.entropy ? entropy.data() : nullptr;
        const bool has_brier = !job.sparse && !job.teacher;
        void* const of_brier = has_brier ? brier.data() : nullptr;
        void* const of_rank = has_brier && names_classes ? rank.data() : nullptr;
        job.stats = {lse.data(), of_entropy, reinterpret_cast<std::int64_t*>(prediction.data()),
                     reinterpret_cast<bool*>(correct.data()), top_probability.data(), of_brier,
                     static_cast<std::int64_t*>(of_rank), reinterpret_cast<bool*>(valid.data())};
    }
    const std::unique_ptr<double[]> saved(new double[std::size_t(job.rows * numbers_saved(job))]);
    if (way.gradient == Gradient::from_saved) job.saved = reinterpret_cast<SavedRow*>(saved.get());

    set_thread_count(way.threads);
    Job second = job;
    read_and_run(job);
    store_reduced(job);
    if (way.gradient == Gradient::from_saved) {
        grad.describe(second.grad, c.axis);
        second.backward_only = true;
        second.losses = second.reduced = nullptr;
        second.stats = {};
        read_and_run(second);
    }
    if (way.gradient == Gradient::from_parts) run_as_parts(second, grad, c.axis);
    return {loss.elements(),       grad.elements(),    lse.elements(),  entropy.elements(),
            prediction.elements(), correct.elements(), top_probability.elements(), brier.elements(),
            rank.elements(),       valid.elements()};
}

int passed = 0, failed = 0;

void tell(bool fine, const std::string& text) {
    ++(fine ? passed : failed);
    if (!fine) std::printf("FAILED %s %s\n", isa_name(), text.c_str());
}

void check_answers(const Case& c, const Way& way, const Results& found) {
    const Format& arithmetic = formats.at(c.wide() ? "float64" : "float32");
    std::string text = fault(c, "loss", found.loss, c.format("loss_dtype"));
    if (way.gradient != Gradient::absent) text += fault(c, "grad", found.grad, c.format("dtype"));
    if (way.stats) {
        text += fault(c, "lse", found.lse, arithmetic);
        if (way.entropy) text += fault(c, "entropy", found.entropy, arithmetic);
        text += fault(c, "top_probability", found.top_probability, arithmetic);
        if (!c.job.sparse && !c.job.teacher) text += fault(c, "brier", found.brier, arithmetic);
        if (c.fields.at("kind") == "index") text += fault(c, "rank", found.rank, formats.at("int64"));
        text += fault(c, "prediction", found.prediction, formats.at("int64"));
        text += fault(c, "correct", found.correct, formats.at("uint8"));
        text += fault(c, "valid", found.valid, formats.at("uint8"));
    }
    tell(text.empty(), c.name + ", " + way.name + ": " + text);
}

std::string difference(const Case& c, const Results& a, const Results& b, bool with_grad) {
    const Format& arithmetic = formats.at(c.wide() ? "float64" : "float32");
    if (!same_bits(a.loss, b.loss, c.format("loss_dtype"))) return "loss";
    if (with_grad && !same_bits(a.grad, b.grad, c.format("dtype"))) return "gradient";
    const bool same = same_bits(a.lse, b.lse, arithmetic) && same_bits(a.entropy, b.entropy, arithmetic) &&
                      a.prediction == b.prediction && a.correct == b.correct && a.valid == b.valid &&
                      same_bits(a.top_probability, b.top_probability, arithmetic) &&
                      same_bits(a.brier, b.brier, arithmetic) && a.rank == b.rank;
    return same ? "" : "stats";
}

// Arrays that differ in their layout, but not in the order they are read in, give the same bits.
void check_same_bits(const Case& c, const Way& way, const Results& one, const Results& other, bool with_grad) {
    const std::string text = difference(c, one, other, with_grad);
    tell(text.empty(), c.name + ", " + way.name + ": other bits than in C order in " + text);
}

void check_log_softmax(const Case& c, const Layout& layout) {
    Job job;
    job.logits.dtype = job.grad.dtype = c.job.logits.dtype;
    job.wide = c.job.wide, job.scale = c.job.scale, job.cap = c.job.cap;
    place_rows(job, c.row_shape());
    job.classes = c.shape[std::size_t(c.axis)];
    const Format& format = c.format("dtype");
    Placed logits(c.shape, format.size, layout), out(c.shape, format.size, layout);
    logits.fill(c.logits);
    logits.describe(job.logits, c.axis);
    out.describe(job.grad, c.axis);
    log_softmax(job);
    double largest_sum = 0.0;
    if (job.axes == 1 && c.axis == 1) {
        const std::vector<double> logs = numbers(out.elements(), format);
        for (std::int64_t row = 0; row < job.rows && job.classes; ++row) {
            double sum = 0.0;
            for (std::int64_t i = 0; i < job.classes; ++i) sum += std::exp(logs[std::size_t(row * job.classes + i)]);
            if (std::isfinite(sum)) largest_sum = std::fmax(largest_sum, std::fabs(sum - 1.0));
        }
    }
    // A logarithm of size 12 in bfloat16 is off by up to 2^-6.
    const double allowed = format.size == 8 ? 1e-12 : format.size == 4 ? 1e-5 : 0.05;
    tell(largest_sum < allowed, c.name + ": log_softmax adds up to 1 ± " + std::to_string(largest_sum));
}

void check_case(const Case& c) {
    const Way plain{"C order"};
    const Results base = run_case(c, plain);
    check_answers(c, plain, base);
    const std::vector<Way> same = {
        {"2 threads", {}, Gradient::apart, 2},
        {"in place", {}, Gradient::in_place},
        {"no gradient", {}, Gradient::absent},
    };
    for (const Way& way : same) check_same_bits(c, way, base, run_case(c, way), way.gradient != Gradient::absent);
    const Layout transposed{true, false, 1, 0}, odd{false, false, 1, 1}, backwards{false, true, 2, 0};
    const std::vector<Way> others = {
        {"transposed", transposed},
        {"transposed, in place", transposed, Gradient::in_place},
        {"misaligned", odd},
        {"misaligned, transposed", {true, false, 1, 1}},
        {"backwards, every second", backwards},
        {"from what was saved", {}, Gradient::from_saved},
        {"from what was saved, transposed", transposed, Gradient::from_saved},
        {"from parts", {}, Gradient::from_parts},
        {"from parts, transposed", transposed, Gradient::from_parts, 2},
        {"from parts, without entropy", odd, Gradient::from_parts, 1, true, false, false, false},
        {"without entropy", {}, Gradient::apart, 1, true, false, false, false},
        {"without entropy, transposed", transposed, Gradient::in_place, 1, true, false, false, false},
        {"without stats", {}, Gradient::apart, 1, false},
        {"without stats, transposed", transposed, Gradient::apart, 1, false},
    };
    for (const Way& way : others) check_answers(c, way, run_case(c, way));
    for (const Layout& layout : {Layout{}, transposed, odd}) check_log_softmax(c, layout);
}

// Nothing may depend on how many threads there are.
void check_large(const Case& c) {
    for (const bool transposed : {false, true}) {
        const Layout layout{transposed, false, 1, 0};
        const std::string order = transposed ? ", transposed" : "";
        const Results one = run_case(c, {"1 thread" + order, layout});
        std::vector<Way> ways = {
            {"2 threads" + order, layout, Gradient::apart, 2},
            {"5 threads, fresh" + order, layout, Gradient::apart, 5, true, true},
            {"3 threads, misaligned" + order, {transposed, false, 1, 1}, Gradient::apart, 3},
            {"3 threads, in place" + order, layout, Gradient::in_place, 3},
            {"3 threads, every second" + order, {transposed, false, 2, 0}, Gradient::apart, 3},
        };
        for (const Way& way : ways) check_same_bits(c, way, one, run_case(c, way), true);
    }
}

// A large gradient is written past the caches, unless its classes do not lie side by side.
void check_streaming(const Case& c) {
    const Results kept = run_case(c, {"every second", {false, false, 2, 0}, Gradient::apart, 1, false});
    for (const int offset : {0, 1, 62}) {
        const Layout layout{false, false, 1, offset};
        const Way way{"streaming at " + std::to_string(offset), layout, Gradient::apart, 2, false, false, true};
        check_same_bits(c, way, kept, run_case(c, way), true);
    }
}

// Several callers at a time, of which one has the helper threads.
void check_callers(const Case& c) {
    const Way way{"several callers", {}, Gradient::apart, 3};
    const Results alone = run_case(c, way);
    std::vector<Results> found(3);
    std::vector<std::thread> callers;
    for (Results& place : found) {
        callers.emplace_back([&] {
            for (int i = 0; i < 2; ++i) place = run_case(c, way);
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const Results& one : found) check_same_bits(c, way, alone, one, true);
}

// Helpers without memory leave the work to the caller; a caller without memory gets an error, and
// the next call is right.
void check_without_memory(const Case& c) {
    const Way way{"4 threads", {}, Gradient::apart, 4};
    const Results before = run_case(c, way);
    is_caller = true;
    refused = Refused::helpers;
    check_same_bits(c, {"helpers without memory"}, before, run_case(c, way), true);
    refused = Refused::everybody;
    bool is_told = false;
    try {
        run_case(c, way);
    } catch (const std::bad_alloc&) {
        is_told = true;
    }
    refused = Refused::nobody;
    tell(is_told, c.name + ": without memory the caller is told");
    check_same_bits(c, {"memory again"}, before, run_case(c, way), true);
}

// One that has not begun when the caller is done never begins; nobody begins twice, and no more do
// than are wanted.
void check_pool() {
    constexpr int helpers = 3;
    struct Call {
        std::atomic<int> begun{0};
        std::atomic<bool> is_over{false};
    };
    static std::atomic<int> late{0};
    std::vector<Call> calls(2000);
    int most = 0;
    for (Call& call : calls) {
        run_with_pool(helpers, [](void* context) {
            Call& own = *static_cast<Call*>(context);
            if (own.is_over) ++late;
            ++own.begun;
        }, &call);
        call.is_over = true;
    }
    for (const Call& call : calls) most = std::max(most, call.begun.load());
    tell(late == 0, "pool: " + std::to_string(late) + " began after their call was over");
    tell(most >= 1 && most <= helpers + 1, "pool: " + std::to_string(most) + " threads at one call");
}

// Calls go alone after a loss, until a twentieth of their time makes up for it.
void check_account() {
    constexpr Nanoseconds millisecond = 1'000'000;
    Account account;
    tell(account.allows_help(), "account: the first call may be helped");
    account.book(-2 * millisecond);
    tell(!account.allows_help(), "account: no help after a loss");
    account.book_alone(19 * millisecond);
    tell(!account.allows_help(), "account: no help before the loss is made up for");
    account.book_alone(millisecond);
    tell(account.allows_help(), "account: help once it is");
    account.book(-1000 * millisecond);
    account.book_alone(1000 * millisecond);
    tell(account.allows_help(), "account: however long an interruption, it counts for 50 ms");
    for (int i = 0; i < 1000; ++i) account.book(millisecond);
    account.book(-10 * millisecond);
    tell(account.allows_help(), "account: a good time allows for a loss");
    account.book(-1);
    tell(!account.allows_help(), "account: however long, for 10 ms of it");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::fprintf(stderr, "usage: polyce_driver FOLDER, to which polyce.testing.dump wrote\n");
        return 2;
    }
    const std::string folder = std::string(arguments[1]) + "/";
    std::ifstream index(folder + "cases.txt");
    for (std::string line; std::getline(index, line);) {
        if (line[0] == '#') continue;
        const Case c = read_case(folder, line);
        for (const char* const* name = isa_names(); *name; ++name) {
            use_isa(*name);
            check_case(c);
        }
    }
    if (passed + failed == 0) tell(false, folder + "cases.txt holds no case");
    for (const Case& c : large_cases()) {
        for (const char* const* name = isa_names(); *name; ++name) {
            use_isa(*name);
            check_large(c);
            check_streaming(c);
        }
    }
    check_pool();
    check_account();
    use_isa(isa_names()[0]);
    check_callers(large_case("float32", {300, 700}, true, 0));
    for (const Case& c : large_cases()) check_without_memory(c);
    // More than 16 MiB, for which the system is asked for pages beforehand.
    const Case huge = large_case("float32", {35, 130001}, true, 0);
    const Way way{"fresh", {}, Gradient::apart, 2, false, true};
    check_same_bits(huge, way, run_case(huge, {"1 thread", {}, Gradient::apart, 1, false}), run_case(huge, way), true);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
