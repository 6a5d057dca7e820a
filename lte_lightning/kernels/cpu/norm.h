// What closes a half of an encoder's layer: the sum with its input, and the sum's LayerNorm. torch writes the sum to
// memory and reads it again.
#pragma once
#include "pairs.h"

namespace {

template <class T> struct SumNorm {
    int64_t N, D;
    float epsilon;
    const T *x, *residual, *weight, *bias;
    T* y;
    static constexpr int64_t TOKENS_AT_ONCE = 32;

    int64_t tasks() const { return (N + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE; }

    void operator()(int64_t task) const {
        T* const rounded = scratch<0, T>(up_to(D, STEP));  // the sum, rounded to T as torch rounds it; then zeros
        float* const row = scratch<1, float>(up_to(D, STEP));
        std::fill_n(rounded, up_to(D, STEP), T{});
        for (int64_t n = task * TOKENS_AT_ONCE; n < std::min(N, (task + 1) * TOKENS_AT_ONCE); n++) {
            const T *const a = x + n * D, *const b = residual + n * D;
            int64_t i = 0;
            for (; i + W <= D; i += W) store_narrow(rounded + i, load_wide(a + i) + load_wide(b + i));
            for (; i < D; i++) narrow(widen(a[i]) + widen(b[i]), rounded[i]);
            const float mean = mean_of([&](int64_t i) {
                const vec v = load_wide(rounded + i);
                store(row + i, v);
                return v;
            });
            for (i = D; i < up_to(D, STEP); i++) row[i] = mean;
            const float variance = mean_of([&](int64_t i) {
                const vec v = load(row + i) - mean;
                return v * v;
            });
            const float factor = 1.f / std::sqrt(variance + epsilon);
            auto scaled = [&](auto v, auto w, auto shift) { return (v - mean) * factor * w + shift; };
            T* const out = y + n * D;
            for (i = 0; i + W <= D; i += W)
                store_narrow(out + i, scaled(load(row + i), load_wide(weight + i), bias ? load_wide(bias + i) : vec{}));
            for (; i < D; i++) narrow(scaled(row[i], widen(weight[i]), bias ? widen(bias[i]) : 0.f), out[i]);
        }
    }

  private:
    static constexpr int SUMS = 4, STEP = SUMS * W;  // sums at a time, so that no addition waits for the one before it

    template <class F> float mean_of(const F& f) const {
        vec sums[SUMS] = {};
        for (int64_t i = 0; i < D; i += STEP)
#pragma GCC unroll 4
            for (int k = 0; k < SUMS; k++) sums[k] += f(i + k * W);
        return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(D);
    }
};

}  // namespace
