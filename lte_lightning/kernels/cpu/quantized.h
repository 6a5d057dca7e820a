// A linear layer, and the selected experts of an FFN, over the matrices of blocks.h, as tasks that any thread may take.
#pragma once
#include "blocks.h"

#define NOT_INLINED __attribute__((noinline))  // large, and called from several places: compiled once

namespace {

inline int64_t ranges_of(int64_t blocks, int threads) {
    return std::min<int64_t>(blocks, threads > 1 ? 8 * threads : 1);
}

// y = x times the matrix, and the bias.
template <int BITS, class T> struct Linear {
    Matrix m;
    int64_t N;
    const Group* in;
    const T* bias;
    T* y;
    int64_t ranges;
    static constexpr int64_t TOKENS_AT_ONCE = 128;

    int64_t tasks() const { return (N + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE * ranges; }

    NOT_INLINED void operator()(int64_t task) const {
        const int64_t groups = m.groups(), all_groups = m.column_parts * groups, R = m.row_parts * m.rows;
        const int64_t n0 = task / ranges * TOKENS_AT_ONCE, n1 = std::min(N, n0 + TOKENS_AT_ONCE), range = task % ranges;
        const int64_t row_blocks = m.row_blocks(), end = (range + 1) * row_blocks / ranges;
        for (int64_t b = range * row_blocks / ranges; b < end; b++) {
            const int64_t e = b / m.part_blocks(), r = b % m.part_blocks() * LANES;
            const int64_t count = std::min(LANES, m.rows - r), row = e * m.rows + r;
            at_a_time(n0, n1, [&](int64_t n, auto tokens) {
                constexpr int TN = decltype(tokens)::value;
                vec acc[TN][PARTS] = {};
                for (int64_t part = 0; part < m.column_parts; part++) {
                    const Group* xs[TN];
                    for (int t = 0; t < TN; t++) xs[t] = in + (n + t) * all_groups + part * groups;
                    const int64_t block = m.block(b, part), ahead = m.block(std::min(b + 1, end - 1), part);
                    add_blocks<BITS, TN>(m.blocks + block * BLOCK_BYTES<BITS>, m.scale + block * LANES, groups,
                                         n == n0 ? m.blocks + ahead * BLOCK_BYTES<BITS> : nullptr, xs, acc);
                }
                for (int t = 0; t < TN; t++) {
                    alignas(64) float lanes[LANES];
                    for (int p = 0; p < PARTS; p++) store(lanes + p * W, acc[t][p]);
                    for (int64_t i = 0; i < count; i++)
                        narrow(lanes[i] + (bias ? widen(bias[row + i]) : 0.f), y[(n + t) * R + row + i]);
                }
            });
        }
    }
};

template <int BITS, class T>
void linear(const Matrix& m, int64_t N, const T* x, const T* bias, T* y, int threads) {
    const Group* const in = round_inputs<BITS>(x, N, m, threads);
    const Linear<BITS, T> multiply{m, N, in, bias, y, ranges_of(m.row_blocks(), threads)};
    parallel(threads, multiply.tasks(), multiply, 0, multiply);
}

// One FFN. Its tokens and experts are those of pairs.h (whose up, gate and down are not used), and its matrices are
// here. All of `hide` runs before any of `project`.
template <int BITS, class T> struct Experts {
    const Ffn<T>& f;
    Matrix up, gate, down;  // gate has no blocks in a plain FFN
    const Group* in;
    Group* hidden;  // [pairs][groups of an expert's neurons]
    int64_t ranges;
    static constexpr int64_t TOKENS_AT_ONCE = 256;

    void add(const T* bias, int64_t row, int64_t count, vec* acc) const {
        alignas(64) float added[LANES] = {};
        for (int64_t i = 0; bias && i < count; i++) added[i] = widen(bias[row + i]);
        for (int p = 0; p < PARTS; p++) acc[p] += load(added + p * W);
    }

    // A slab is 32 neurons of an expert. Within a range of slabs the next slab is known.
    NOT_INLINED void hide(int64_t range) const {
        const int64_t S = f.S, groups = up.groups(), slabs_each = down.groups();
        const int64_t slabs = int64_t(f.active.size()) * slabs_each, end = (range + 1) * slabs / ranges;
        for (int64_t slab = range * slabs / ranges; slab < end; slab++) {
            auto first_block = [&](int64_t i) {
                return f.active[i / slabs_each] * up.part_blocks() + i % slabs_each * (GROUP / LANES);
            };
            const int64_t e = f.active[slab / slabs_each], s = slab % slabs_each * GROUP;
            const int64_t count = std::min(GROUP, S - s), b0 = first_block(slab);
            const int64_t after = slab + 1 < end ? first_block(slab + 1) : b0;
            at_a_time(f.first[e], f.first[e + 1], [&](int64_t p, auto tokens) {
                constexpr int TN = decltype(tokens)::value;
                const Group* xs[TN];
                for (int t = 0; t < TN; t++) xs[t] = in + f.token[p + t] * groups;
                alignas(64) float h[TN][GROUP] = {};
                for (int64_t r = 0; r < count; r += LANES) {
                    const int64_t b = b0 + r / LANES, then = r + LANES < count ? b + 1 : after, here = b * groups;
                    const int64_t rows = std::min(LANES, count - r), row = e * S + s + r;
                    auto product = [&](const Matrix& m, const Matrix& m_next, int64_t b_next, vec (*acc)[PARTS]) {
                        const uint8_t* const next = m_next.blocks + b_next * groups * BLOCK_BYTES<BITS>;
                        add_blocks<BITS, TN>(m.blocks + here * BLOCK_BYTES<BITS>, m.scale + here * LANES, groups,
                                             p == f.first[e] ? next : nullptr, xs, acc);
                    };
                    const bool gated = gate.blocks;
                    vec ups[TN][PARTS] = {}, gates[TN][PARTS] = {};
                    if (gated) product(gate, up, b, gates);
                    product(up, gated ? gate : up, then, ups);
                    for (int t = 0; t < TN; t++) {
                        add(f.up_bias, row, rows, ups[t]);
                        if (gated) add(f.gate_bias, row, rows, gates[t]);
                        for (int i = 0; i < PARTS; i++)
                            store(h[t] + r + i * W, gated ? activate(f.activation, gates[t][i]) * ups[t][i]
                                                          : activate(f.activation, ups[t][i]));
                    }
                }
                for (int t = 0; t < TN; t++)
                    round_group(h[t], count, BITS == 8 ? 128 : 8, hidden[(p + t) * slabs_each + s / GROUP]);
            });
        }
    }

    // Each task owns some columns of some tokens, so its sums stay in its thread's cache.
    int64_t wide() const {
        const int64_t fitting = std::max<int64_t>(1, 4096 / std::min(f.N, TOKENS_AT_ONCE));  // 256 KB of sums
        return std::min(fitting, (down.row_blocks() + f.threads - 1) / f.threads);
    }
    int64_t stripes() const { return (down.row_blocks() + wide() - 1) / wide(); }
    int64_t projections() const { return (f.N + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE * stripes(); }

    NOT_INLINED void project(int64_t task) const {
        const int64_t D = f.D, slabs_each = down.groups(), wide = this->wide(), stripes = this->stripes();
        const int64_t n0 = task / stripes * TOKENS_AT_ONCE, n1 = std::min(f.N, n0 + TOKENS_AT_ONCE);
        const int64_t b0 = task % stripes * wide, b1 = std::min(down.row_blocks(), b0 + wide);
        float* const sums = scratch<2, float>((n1 - n0) * wide * LANES);
        std::fill_n(sums, (n1 - n0) * wide * LANES, 0.f);
        for (size_t i = 0; i < f.active.size(); i++) {
            const int64_t e = f.active[i], e_next = i + 1 < f.active.size() ? f.active[i + 1] : e;
            const auto token = f.token.begin();
            const int64_t p0 = std::lower_bound(token + f.first[e], token + f.first[e + 1], n0) - token;
            const int64_t p1 = std::lower_bound(token + p0, token + f.first[e + 1], n1) - token;
            for (int64_t b = b0; b < b1; b++)
                at_a_time(p0, p1, [&](int64_t p, auto tokens) {
                    constexpr int TN = decltype(tokens)::value;
                    const Group* xs[TN];
                    float* at[TN];
                    vec acc[TN][PARTS];
                    for (int t = 0; t < TN; t++) {
                        xs[t] = hidden + (p + t) * slabs_each;
                        at[t] = sums + ((f.token[p + t] - n0) * wide + b - b0) * LANES;
                        for (int v = 0; v < PARTS; v++) acc[t][v] = load(at[t] + v * W);
                    }
                    // prefetch 4 KB ahead in this stripe, or in the next expert's stripe
                    const int64_t block = down.block(b, e), left = (b1 - b) * slabs_each;
                    const int64_t far = std::max<int64_t>(1, 4096 / BLOCK_BYTES<BITS> / slabs_each) * slabs_each;
                    const int64_t ahead = far < left ? block + far : down.block(b0, e_next) + far - left;
                    if (p == p0)
                        for (int64_t k = 0; k < slabs_each * BLOCK_BYTES<BITS>; k += 64)
                            __builtin_prefetch(down.blocks + ahead * BLOCK_BYTES<BITS> + k);
                    add_blocks<BITS, TN>(down.blocks + block * BLOCK_BYTES<BITS>, down.scale + block * LANES,
                                         slabs_each, nullptr, xs, acc);
                    for (int t = 0; t < TN; t++)
                        for (int v = 0; v < PARTS; v++) store(at[t] + v * W, acc[t][v]);
                });
        }
        for (int64_t n = n0; n < n1; n++)
            for (int64_t c = b0 * LANES; c < std::min(D, b1 * LANES); c++)
                narrow(sums[(n - n0) * wide * LANES + c - b0 * LANES] + f.bias(f.down_bias, c), f.y[n * D + c]);
    }
};

template <int BITS, class T>
void experts(const Ffn<T>& f, const Matrix& up, const Matrix& gate, const Matrix& down) {
    const Group* const in = round_inputs<BITS>(f.x, f.N, up, f.threads);
    Group* const hidden = scratch<1, Group>(f.first[f.E] * down.groups());
    const int64_t ranges = ranges_of(int64_t(f.active.size()) * down.groups(), f.threads);
    const Experts<BITS, T> e{f, up, gate, down, in, hidden, ranges};
    auto hide = [&](int64_t range) { e.hide(range); };
    auto project = [&](int64_t task) { e.project(task); };
    parallel(f.threads, ranges, hide, e.projections(), project);
}

}  // namespace
