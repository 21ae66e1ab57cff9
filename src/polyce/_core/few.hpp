// Few classes, as images and small classifiers have. All that a row needs between its logits and
// its loss stays in registers, in float32: with few exponentials, a row's own numbers in double
// would take longer than they do. For labels without smoothing or z_loss, and logits as they are.
//
// With m the largest logit and E the sum of exp(x_c - m) over all classes but the one of m,
//
//     loss = m - x_y + log1p(E)      p_c = exp(x_c - m) / (1 + E)
//     1 - p_y = E / (1 + E) where x_y = m, else (1 + E - exp(x_y - m)) / (1 + E)
//
// No difference cancels: in the last one exp(x_y - m) is at most half of 1 + E.
#pragma once

#include "pivots.hpp"

namespace polyce::POLYCE_ISA {

// log(1 + x) for x >= 0 or nan, within 1.5 ulp: 1 + x = 2^k (1 + f) with 1 + f in sqrt(1/2) to
// sqrt(2), and log(1 + f) = f - f²/2 + f³ P(f) by a minimax polynomial.
template <class V>
POLYCE_INLINE V log1p_single(V x) {
    using Bits = typename Number<V>::Bits;
    constexpr float series[] = {-0x1.38b4e2p-4f, 0x1.055b58p-3f, -0x1.0d8556p-3f, 0x1.22da20p-3f,
                                -0x1.547242p-3f, 0x1.99a008p-3f, -0x1.000228p-2f, 0x1.555554p-2f};
    const V one = splat<V>(1.0f);
    const V u = one + x;
    const Bits raised = bits<Bits>(u) + (0x3f800000u - 0x3f3504f3u);
    const V k = bits<V>(Bits((raised >> 23) | 0x4b000000u)) - splat<V>(0x1p23f + 127.0f);
    const V reduced = bits<V>(Bits((raised & 0x007fffffu) + 0x3f3504f3u)) - one;
    // What rounding took from 1 + x, of which x is the larger one from 1 on.
    const V lost = x > one ? one - (u - x) : x - (u - one);
    const V shrunk = bits<V>(Bits(0x7f000000u - (raised & 0xff800000u)));
    const V f = k == V{} ? x : fma(lost, shrunk, reduced);
    const V f2 = f * f;
    V p = splat<V>(series[0]);
    for (int i = 1; i < 8; ++i) p = fma(f, p, splat<V>(series[i]));
    const V small = fma(f2, fma(f, p, splat<V>(-0.5f)), k * splat<V>(-2.12194440e-4f));
    return fma(k, splat<V>(0.693359375f), f + small) + (x - x);
}

// Exponentials are so many times as large, so that none is subnormal whose row has a loss.
constexpr int raised_by = 24;
constexpr float raised_one = 0x1p24f, lowered_one = 0x1p-24f;

// 2^24 exp(a - m) for a <= m or nan, within 2 unit roundoffs. a - m is rounded; what that took is
// multiplied back.
template <class V>
POLYCE_INLINE V raised_exp(V a, V m) {
    using Bits = typename Number<V>::Bits;
    const V gap = a - m, error = lost_by_difference(a, m, gap);
    // Gives n = -151, and 0 for the power of two.
    const V lowest = splat<V>(-104.7f);
    const auto [f, z, n] = reduce_exponent(lowest > gap ? lowest : gap);
    const V power = bits<V>(Bits((bits<Bits>(z) + std::uint32_t(raised_by)) << Exp<float>::shift));
    const V e = fma(f, exp_series(f), splat<V>(1.0f)) * power;
    return fma(e, error - error == V{} ? error : V{}, e);
}

template <bool with_gradient>
void few_rows(const Tile<float>& tile, int count) {
    Lanes<float>& lane = tile.lane;
    constexpr int pitch = Tile<float>::pitch;
    const auto exponential = [](auto x, auto m) POLYCE_INLINE_LAMBDA { return raised_exp(x, m); };
    const Pack<float> zero = filled(0.0f), one = filled(1.0f);
    const Pack<float> raised = filled(raised_one), lowered = filled(lowered_one);
    for (int i = 0; i < tile.used; i += pack_size) {
        const Pack<float> place = load(lane.place + i);
        const float* const x = tile.logits + i;
        float* const e = tile.gaps + i;
        Pack<float> top = load(x), logit = top, here = one;
        for (int at = pitch; at < count * pitch; at += pitch) {
            const Pack<float> found = load(x + at);
            top = larger(found, top);
            logit = chosen(place, here, found, logit);
            here = here + one;
        }
        // The exponentials but those of m, of which `equal` counts all after the first.
        Pack<float> equal = zero - raised, own_label = zero;
        here = zero;
        const auto term = [&](int at, const Pack<float>& here) POLYCE_INLINE_LAMBDA {
            const Pack<float> found = load(x + at), own = each_part(exponential, found, top);
            if constexpr (with_gradient) {
                store(e + at, own * lowered);
                own_label = chosen(place, here, own, own_label);
            }
            equal = equal + chosen(found, top, raised, zero);
            return chosen(found, top, zero, own);
        };
        Pack<float> sum = zero, lost = zero;
        int at = 0;
        for (const int end = count / 4 * 4 * pitch; at < end; at += 4 * pitch) {
            const Pack<float> second = here + one, third = second + one, fourth = third + one;
            const Pack<float> two = term(at, here) + term(at + pitch, second);
            const Pack<float> four = two + (term(at + 2 * pitch, third) + term(at + 3 * pitch, fourth));
            here = fourth + one;
            const Pack<float> before = sum, added = (sum = before + four) - before;
            lost = lost + ((before - (sum - added)) + (four - added));
        }
        Pack<float> rest = zero;
        for (; at < count * pitch; at += pitch) {
            rest = rest + term(at, here);
            here = here + one;
        }
        // A row whose largest logit is infinite has no softmax.
        const Pack<float> excess = sum + (rest + lost) + (equal + (top - top));
        const Pack<float> h = each_part([](auto v) POLYCE_INLINE_LAMBDA { return log1p_single(v); }, excess * lowered);
        store(lane.m + i, h);
        store(lane.top + i, (top - logit) + h);
        if constexpr (with_gradient) {
            const Pack<float> once = each_part([](auto a, auto b) POLYCE_INLINE_LAMBDA { return a / b; },
                                               load(lane.once + i), one + excess * lowered);
            const Pack<float> others = chosen(logit, top, excess, (raised + excess) - own_label);
            const Pack<float> kept = load(lane.kept + i), weight = load(lane.softmax + i);
            // With an infinite weight it is the difference of two infinities, as torch's.
            const Pack<float> share = each_part([](auto rest, auto factor) POLYCE_INLINE_LAMBDA {
                return rest < splat<decltype(rest)>(1.0f) ? rest * factor * splat<decltype(rest)>(lowered_one)
                                                          : rest * splat<decltype(rest)>(lowered_one) * factor;
            }, others, once);
            const Pack<float> at_label = (weight - weight) - share;
            here = zero;
            for (int at = 0; at < count * pitch; at += pitch) {
                const Pack<float> entry = chosen(place, here, at_label, load(e + at) * once);
                store(e + at, chosen(kept, zero, zero, entry));
                here = here + one;
            }
        }
    }
}

template <class T>
void finish_few(Pivots<T>& tile) {
    const Job& job = tile.job;
    Lanes<T>& lane = tile.lane;
    const int count = int(job.classes);
    tile.fill(job.logits, 0, count, tile.logits);
    tile.find_pivots(0, count);
    if (job.grad.data) {
        tile.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.once[i] = T(lane.factor[i] * lane.label_weight[i]);
            lane.softmax[i] = T(lane.label_weight[i]);
        });
        few_rows<true>(tile, count);
        tile.empty(0, count);
    } else {
        few_rows<false>(tile, count);
    }
    tile.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
        const double weight = lane.label_weight[i];
        const double loss = weight * double(weight == 0.0 ? lane.m[i] : lane.top[i]);
        lane.loss[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * loss;
    });
}

}  // namespace polyce::POLYCE_ISA
