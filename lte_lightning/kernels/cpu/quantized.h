// A linear layer, and the selected experts of an FFN, over the matrices of blocks.h, as tasks that any thread may take.
#pragma once
#include "blocks.h"

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
    int64_t ranges;  // of the outputs
    static constexpr int64_t TOKENS_AT_ONCE = 120;  // whole tiles

    static int64_t pieces(int64_t N) { return (N + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE; }
    int64_t tasks() const { return pieces(N) * ranges; }
    int64_t first_block(int64_t range) const {  // no range takes half of a tile
        const int64_t step = N < TILE_TOKENS ? 1 : TILE_BLOCKS;
        return range == ranges ? m.row_blocks() : range * m.row_blocks() / ranges / step * step;
    }

    NOT_INLINED void operator()(int64_t task) const {
        const int64_t groups = m.groups(), all_groups = m.column_parts * groups, R = m.row_parts * m.rows;
        const int64_t n0 = task / ranges * TOKENS_AT_ONCE, n1 = std::min(N, n0 + TOKENS_AT_ONCE), range = task % ranges;
        const int64_t end = first_block(range + 1);
        in_tiles(n0, n1, first_block(range), end, all_groups * BLOCK_BYTES<BITS>,
                 [&](int64_t n, int64_t b, auto tokens, auto blocks) {
            constexpr int TN = decltype(tokens)::value, RN = decltype(blocks)::value;
            alignas(64) float sums[TN][RN * LANES] = {};
            const Group* xs[TN];
            float* to[TN];
            for (int t = 0; t < TN; t++) to[t] = sums[t];
            for (int64_t part = 0; part < m.column_parts; part++) {
                for (int t = 0; t < TN; t++) xs[t] = in + (n + t) * all_groups + part * groups;
                const int64_t block = m.block(b, part), ahead = m.block(std::min(b + 1, end - 1), part);
                add_blocks<BITS, TN, RN>(m.blocks + block * BLOCK_BYTES<BITS>, m.scale + block * LANES, groups,
                                         n == n0 ? m.blocks + ahead * BLOCK_BYTES<BITS> : nullptr, xs, to);
            }
            for (int r = 0; r < RN; r++) {
                const int64_t e = (b + r) / m.part_blocks(), first = (b + r) % m.part_blocks() * LANES;
                const int64_t count = std::min(LANES, m.rows - first), row = e * m.rows + first;
                for (int t = 0; t < TN; t++)
                    write_lanes(sums[t] + r * LANES, bias ? bias + row : nullptr, count, y + (n + t) * R + row);
            }
        });
    }
};

template <int BITS, class T>
void linear(const Matrix& m, int64_t N, const T* x, const T* bias, T* y, int threads) {
    const Group* const in = round_inputs<BITS, 5>(x, N, m, threads);
    // Many tokens make tasks enough. A task that takes all outputs reads its tokens once.
    const int64_t ranges = std::max<int64_t>(1, ranges_of(m.row_blocks(), threads) / Linear<BITS, T>::pieces(N));
    const Linear<BITS, T> multiply{m, N, in, bias, y, ranges};
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

    // A slab is 32 neurons of an expert. Within a range of slabs the next slab is known.
    NOT_INLINED void hide(int64_t range) const {
        const int64_t slabs_each = down.groups();
        const int64_t slabs = int64_t(f.active.size()) * slabs_each, end = (range + 1) * slabs / ranges;
        auto first_block = [&](int64_t i) {
            return f.active[i / slabs_each] * up.part_blocks() + i % slabs_each * (GROUP / LANES);
        };
        for (int64_t slab = range * slabs / ranges; slab < end; slab++) {
            const int64_t e = f.active[slab / slabs_each], s = slab % slabs_each * GROUP;
            const int64_t b = first_block(slab), after = slab + 1 < end ? first_block(slab + 1) : b;
            if (TILE_BLOCKS > 1 && f.S - s > LANES && f.first[e + 1] - f.first[e] >= TILE_TOKENS)
                hide_slab<TILE_TOKENS, TILE_BLOCKS>(e, s, b, after);
            else
                hide_slab<8, 1>(e, s, b, after);
        }
    }

    template <int MOST, int RN> void hide_slab(int64_t e, int64_t s, int64_t b0, int64_t after) const {
        const int64_t groups = up.groups(), slabs_each = down.groups(), count = std::min(GROUP, f.S - s);
        alignas(64) float biases[2][GROUP] = {};  // of up and gate
        for (int64_t i = 0; i < count; i++) {
            biases[0][i] = f.bias(f.up_bias, e * f.S + s + i);
            biases[1][i] = f.bias(f.gate_bias, e * f.S + s + i);
        }
        at_a_time<MOST>(f.first[e], f.first[e + 1], [&](int64_t p, auto tokens) {
            constexpr int TN = decltype(tokens)::value;
            const Group* xs[TN];
            for (int t = 0; t < TN; t++) xs[t] = in + f.token[p + t] * groups;
            vec h[TN][GROUP / W];
            for (int64_t r = 0; r < count; r += RN * LANES) {
                const int64_t b = b0 + r / LANES, then = r + LANES < count ? b + 1 : after, here = b * groups;
                auto product = [&](const Matrix& m, const Matrix& m_next, int64_t b_next, float (*sums)[RN * LANES]) {
                    float* to[TN];
                    for (int t = 0; t < TN; t++) to[t] = sums[t];
                    const uint8_t* const next = m_next.blocks + b_next * groups * BLOCK_BYTES<BITS>;
                    add_blocks<BITS, TN, RN>(m.blocks + here * BLOCK_BYTES<BITS>, m.scale + here * LANES, groups,
                                             p == f.first[e] ? next : nullptr, xs, to);
                };
                const bool gated = gate.blocks;
                alignas(64) float ups[TN][RN * LANES] = {}, gates[TN][RN * LANES] = {};
                if (gated) product(gate, up, b, gates);
                product(up, gated ? gate : up, then, ups);
                for (int t = 0; t < TN; t++)
                    for (int i = 0; i < RN * PARTS; i++) {
                        const vec u = load(ups[t] + i * W) + load(biases[0] + r + i * W);
                        const vec g = load(gates[t] + i * W) + load(biases[1] + r + i * W);
                        h[t][r / W + i] = gated ? activate(f.activation, g) * u : activate(f.activation, u);
                    }
            }
            for (int t = 0; t < TN; t++) {
                for (int64_t i = count; i < GROUP; i++) h[t][i / W][i % W] = 0.f;
                round_group(h[t], BITS == 8 ? 128 : 8, hidden[(p + t) * slabs_each + s / GROUP]);
            }
        });
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
            in_tiles(p0, p1, b0, b1, slabs_each * BLOCK_BYTES<BITS>,
                     [&](int64_t p, int64_t b, auto tokens, auto blocks) {
                constexpr int TN = decltype(tokens)::value, RN = decltype(blocks)::value;
                const int64_t block = down.block(b, e);
                if (RN == 1 && p == p0) {  // prefetch 4 KB ahead in this stripe, or in the next expert's stripe
                    const int64_t far = std::max<int64_t>(1, 4096 / BLOCK_BYTES<BITS> / slabs_each) * slabs_each;
                    const int64_t left = (b1 - b) * slabs_each;
                    const int64_t ahead = far < left ? block + far : down.block(b0, e_next) + far - left;
                    for (int64_t k = 0; k < slabs_each * BLOCK_BYTES<BITS>; k += 64)
                        __builtin_prefetch(down.blocks + ahead * BLOCK_BYTES<BITS> + k);
                }
                const Group* xs[TN];
                float* to[TN];
                for (int t = 0; t < TN; t++) {
                    xs[t] = hidden + (p + t) * slabs_each;
                    to[t] = sums + ((f.token[p + t] - n0) * wide + b - b0) * LANES;
                }
                add_blocks<BITS, TN, RN>(down.blocks + block * BLOCK_BYTES<BITS>, down.scale + block * LANES,
                                         slabs_each, nullptr, xs, to);
            });
        }
        for (int64_t n = n0; n < n1; n++)
            for (int64_t b = b0; b < b1; b++) {
                const int64_t c = b * LANES;
                write_lanes(sums + ((n - n0) * wide + b - b0) * LANES, f.down_bias ? f.down_bias + c : nullptr,
                            std::min(LANES, D - c), f.y + n * D + c);
            }
    }
};

template <int BITS, class T>
void experts(const Ffn<T>& f, const Matrix& up, const Matrix& gate, const Matrix& down) {
    const Group* const in = round_inputs<BITS, 0>(f.x, f.N, up, f.threads);
    Group* const hidden = scratch<1, Group>(f.first[f.E] * down.groups());
    const int64_t ranges = ranges_of(int64_t(f.active.size()) * down.groups(), f.threads);
    const Experts<BITS, T> e{f, up, gate, down, in, hidden, ranges};
    auto hide = [&](int64_t range) { e.hide(range); };
    auto project = [&](int64_t task) { e.project(task); };
    parallel(f.threads, ranges, hide, e.projections(), project);
}

}  // namespace
