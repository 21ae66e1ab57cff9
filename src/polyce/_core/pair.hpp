// Two classes, as binary classifiers have: the rest of a row is a single logit, and exp(δ) all that
// there is to sum. For float32 arithmetic and labels without smoothing or z_loss.
#pragma once

#include "tile.hpp"

namespace polyce::POLYCE_ISA {

// log1p(e) for e in 0 to 1 or nan, to about 2^-35.
POLYCE_INLINE double log1p_of_fraction(double e) {
    const double e2 = e * e, e4 = e2 * e2;
    const double p10 = fma(e, 0x1.b1fdc68a230c4p-11, -0x1.99f38caa4646ep-8);
    const double p8 = fma(e, 0x1.6b2266b650f7bp-6, -0x1.9921ee6ca87f7p-5);
    const double p6 = fma(e, 0x1.53ce22a225022p-4, -0x1.cfde21ed642ccp-4);
    const double p4 = fma(e, 0x1.1d5ef9b82c9c5p-3, -0x1.53d9be2e40dc3p-3);
    const double p2 = fma(e, 0x1.9966c30924f84p-3, -0x1.fffbf32d0ec51p-3);
    const double p0 = fma(e, 0x1.55554064c35bdp-2, -0x1.ffffffb3dc03fp-2);
    const double high = fma(e4, fma(e2, p10, p8), fma(e2, p6, p4));
    return fma(e2, fma(e4, high, fma(e2, p2, p0)), e);
}

template <bool with_gradient, class T>
POLYCE_INLINE void pair_losses(const Tile<T>& tile) {
    Lanes<T>& lane = tile.lane;
    const T *const first = tile.logits, *const second = first + tile.pitch;
    T *const to_first = tile.gaps, *const to_second = to_first + tile.pitch;
    const double scale = tile.job.scale;
    tile.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
        const bool swapped = lane.pivot[i] != 0;
        const double a = double(first[i]), b = double(second[i]);
        const double pivot = swapped ? b : a, other = swapped ? a : b;
        const double delta = (other - pivot) * scale;
        const bool ahead = delta > 0.0;
        // A logit at +inf has no softmax.
        const double top = ahead ? other : pivot, nothing = top - top;
        const double e = exp_negative_brief(ahead ? -delta : delta) + nothing;
        const double w = lane.label_weight[i];
        const double loss = w * ((ahead && w != 0.0 ? delta : 0.0) + log1p_of_fraction(e));
        lane.loss[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * loss;
        if constexpr (with_gradient) {
            const double others_share = (ahead ? 1.0 : e) / (1.0 + e);
            const double pull = lane.factor[i] * scale * w * others_share;
            const double entry = lane.counted[i] == 0.0 ? 0.0 : pull;
            // With an infinite weight the label's is the difference of two infinities, as torch's.
            const double at_label = (entry - entry) - entry;
            to_first[i] = T(swapped ? entry : at_label);
            to_second[i] = T(swapped ? at_label : entry);
        }
    });
}

template <class T>
void finish_pair(const Tile<T>& tile) {
    tile.fill(tile.job.logits, 0, 2, tile.logits);
    if (tile.job.grad.data) {
        pair_losses<true>(tile);
        tile.empty(0, 2);
    } else {
        pair_losses<false>(tile);
    }
}

}  // namespace polyce::POLYCE_ISA
