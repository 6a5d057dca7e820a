// Computes the selected experts of one FFN on a CPU: y = down(act(gate x) * up x) over each token's own experts, with
// float32 sums.
//
// build.py compiles this file for the machine's instruction set, and layout.py describes the memory. Names carry shapes
// as in Python: N tokens, D width, E experts, S neurons per expert. There are two ways:
//   few tokens (few.h): bound by memory. Each active row is read once for all tokens that chose its expert. Gate and up
//       are dot products. Down is a sum over rows of its transposed matrix, and each thread owns some columns.
//   many tokens (many.h): bound by arithmetic. Tokens are grouped by expert. Rows of x are read in place, and weights
//       are packed into panels that stay in cache. Register tiles of MR tokens by NR columns compute the products.
// In both, the partition of work never changes the order of a sum. Results do not depend on the threads, and a row does
// not depend on other rows.
#include "attention.h"
#include "decoder.h"
#include "few.h"
#include "many.h"
#include "norm.h"
#include "quantized.h"
#include "train.h"

#include <cstddef>

namespace {

// Up to this many tokens per active expert are few. With dot products of pairs, rows in place stay ahead for longer.
template <class T> constexpr int64_t FEW_PAIRS = PAIRED<T> ? 12 : 8;
constexpr int64_t CHUNK_BYTES = int64_t(64) << 20;  // of hidden activations at a time
enum Way { ANY, FEW, MANY };

template <class T>
void run(const int64_t* shape, int activation, int threads, int way, const uint8_t* mask, void* const* p) {
    const int64_t N = shape[0], D = shape[1], E = shape[2], S = shape[3];
    auto at = [&](int i) { return static_cast<const T*>(p[i]); };
    const int64_t chunk = std::max<int64_t>(TOKENS, CHUNK_BYTES / (4 * E * S) / TOKENS * TOKENS);
    for (int64_t n = 0; n < N; n += chunk) {
        Ffn<T> f{std::min(chunk, N - n), D, E, S, activation, threads,
                 at(0) + n * D, at(1), at(2), at(3), at(4), at(5), at(6),
                 static_cast<T*>(p[7]) + n * D};
        f.list(mask + n * E);
        const bool little = f.first[E] <= FEW_PAIRS<T> * int64_t(f.active.size());
        if (way == FEW || (way == ANY && little)) few(f);
        else many(f);
    }
}

template <int BITS, class T> void run_linear(const int64_t* shape, int threads, void* const* p) {
    const Matrix m{shape[1], shape[2], shape[3], shape[4], static_cast<const uint8_t*>(p[1]),
                   static_cast<const bf16*>(p[2])};
    linear<BITS>(m, shape[0], static_cast<const T*>(p[0]), static_cast<const T*>(p[3]), static_cast<T*>(p[4]), threads);
}

template <int BITS, class T>
void run_experts(const int64_t* shape, int activation, int threads, const uint8_t* mask, void* const* p) {
    const int64_t N = shape[0], D = shape[1], E = shape[2], S = shape[3];
    auto at = [&](int i) { return static_cast<const T*>(p[i]); };
    auto matrix = [&](int i, bool down) {
        const auto blocks = static_cast<const uint8_t*>(p[i]);
        const auto scale = static_cast<const bf16*>(p[i + 1]);
        return down ? Matrix{1, D, E, S, blocks, scale} : Matrix{E, S, 1, D, blocks, scale};
    };
    const Matrix up = matrix(1, false), gate = matrix(3, false), down = matrix(5, true);
    const int64_t chunk = std::max<int64_t>(TOKENS, CHUNK_BYTES / (2 * E * S) / TOKENS * TOKENS);
    for (int64_t n = 0; n < N; n += chunk) {
        Ffn<T> f{std::min(chunk, N - n), D, E, S, activation, threads, at(0) + n * D, nullptr, nullptr, nullptr,
                 at(7), at(8), at(9), static_cast<T*>(p[10]) + n * D};
        f.list(mask + n * E);
        experts<BITS>(f, up, gate, down);
    }
}

template <class T>
void run_attention(const int64_t* shape, float scale, int threads, void* const* p) {
    Attention<T> attend;
    std::memcpy(&attend, shape, offsetof(Attention<T>, scale));
    attend.scale = scale;
    attend.q = static_cast<const T*>(p[0]), attend.k = static_cast<const T*>(p[1]);
    attend.v = static_cast<const T*>(p[2]), attend.mask = static_cast<const uint8_t*>(p[3]);
    attend.y = static_cast<T*>(p[4]);
    parallel(threads, attend.B * attend.H, attend, 0, attend);
}

template <class T> void run_sum_norm(const int64_t* shape, float epsilon, int threads, void* const* p) {
    auto at = [&](int i) { return static_cast<const T*>(p[i]); };
    const SumNorm<T> norm{shape[0], shape[1], epsilon, at(0), at(1), at(2), at(3), static_cast<T*>(p[4])};
    parallel(threads, norm.tasks(), norm, 0, norm);
}

enum Product { ROWS_TO_PAIRS, PAIRS_TO_ROWS, PAIRS_TO_WEIGHTS };

template <class T>
void run_training(Product product, const int64_t* shape, int threads, const uint8_t* mask, void* const* p) {
    const int64_t N = shape[0], D = shape[1], E = shape[2], S = shape[3];
    auto at = [&](int i) { return static_cast<const T*>(p[i]); };
    Ffn<T> f{N, D, E, S, 0, threads, at(0), at(1), at(2), nullptr, at(3), at(4), nullptr, static_cast<T*>(p[0])};
    f.list(mask);
    const int count = int(shape[4]);
    const T* const numbers[2] = {at(5), at(6)};
    T* const out[2] = {static_cast<T*>(p[5]), static_cast<T*>(p[6])};
    T* const weights[2] = {static_cast<T*>(p[1]), static_cast<T*>(p[2])};
    if (product == ROWS_TO_PAIRS) rows_to_pairs(f, count, out);
    else if (product == PAIRS_TO_ROWS) pairs_to_rows(f, count, numbers);
    else pairs_to_weights(f, count, numbers, weights);
}

template <class T>
bool run_decoder(const Shape& shape, const float* numbers, const int64_t* table, int threads, int activation,
                 void* const* p) {
    auto at = [&](int i) { return static_cast<T*>(p[i]); };
    Decoder<T> decoder(shape, numbers, table, threads, activation, static_cast<const int64_t*>(p[0]), at(1), at(2),
                       static_cast<const uint8_t*>(p[3]), at(4), at(5));
    auto run = [&](int64_t) { decoder.run(); };
    parallel(threads, threads, run, 0, run);
    return !decoder.ran_out_of_memory();
}

}  // namespace

// shape: N, D, E, S. pointers: x, up, gate, down, up_bias, gate_bias, down_bias, y; gate and biases may be null.
// way: 0 chooses, 1 is for few tokens, 2 for many. Returns 0, or 1 if there is no memory for the buffers.
extern "C" int lte_ffn(int dtype, const int64_t* shape, int activation, int threads, int way, const uint8_t* mask,
                       void* const* pointers) try {
    const auto run_it = dtype == 0 ? run<float> : dtype == 1 ? run<bf16> : run<f16>;
    run_it(shape, activation, threads, way, mask, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// y = x times a matrix of 8 or 4 bits. shape: N, parts of rows, rows, parts of columns, columns (see blocks.h).
// pointers: x, blocks, scale, bias, y; bias may be null. If x is null, the input is that of this thread's last call, which
// is rounded already; N, bits and columns must be the same.
extern "C" int lte_quantized_linear(int dtype, int bits, const int64_t* shape, int threads,
                                    void* const* pointers) try {
    const auto run_it =
        bits == 8 ? (dtype == 0 ? run_linear<8, float> : dtype == 1 ? run_linear<8, bf16> : run_linear<8, f16>)
                  : (dtype == 0 ? run_linear<4, float> : dtype == 1 ? run_linear<4, bf16> : run_linear<4, f16>);
    run_it(shape, threads, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Like lte_ffn. pointers: x, then blocks and scale of up, gate and down, then up_bias, gate_bias, down_bias, y.
extern "C" int lte_quantized_ffn(int dtype, int bits, const int64_t* shape, int activation, int threads,
                                 const uint8_t* mask, void* const* pointers) try {
    const auto run_it =
        bits == 8 ? (dtype == 0 ? run_experts<8, float> : dtype == 1 ? run_experts<8, bf16> : run_experts<8, f16>)
                  : (dtype == 0 ? run_experts<4, float> : dtype == 1 ? run_experts<4, bf16> : run_experts<4, f16>);
    run_it(shape, activation, threads, mask, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Attention without gradients. shape: B, H, Q, K, D and the strides of q, k, v and mask, see attention.h.
// pointers: q, k, v, mask or null, y.
extern "C" int lte_attention(int dtype, const int64_t* shape, float scale, int threads, void* const* pointers) try {
    const auto run_it = dtype == 0 ? run_attention<float> : dtype == 1 ? run_attention<bf16> : run_attention<f16>;
    run_it(shape, scale, threads, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// LayerNorm of x + residual. shape: N, D. pointers: x, residual, weight, bias or null, y.
extern "C" int lte_sum_norm(int dtype, const int64_t* shape, float epsilon, int threads, void* const* pointers) try {
    const auto run_it = dtype == 0 ? run_sum_norm<float> : dtype == 1 ? run_sum_norm<bf16> : run_sum_norm<f16>;
    run_it(shape, epsilon, threads, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// One of the products of training, see train.h. shape: N, D, E, S, how many weights. pointers: rows of the tokens [N, D]
// (the output of PAIRS_TO_ROWS), one or two weights [E, S, D] (the output of PAIRS_TO_WEIGHTS), their biases [E, S] or
// null, and as many times the pairs' numbers [P, S] (the output of ROWS_TO_PAIRS).
extern "C" int lte_train(int dtype, int product, const int64_t* shape, int threads, const uint8_t* mask,
                         void* const* pointers) try {
    const auto run_it = dtype == 0 ? run_training<float> : run_training<bf16>;
    run_it(Product(product), shape, threads, mask, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Says whether lte_train takes operands of that type, width and number of neurons.
extern "C" int lte_trains(int dtype, int64_t D, int64_t S) {
    return dtype == 0 || (dtype == 1 && takes<bf16>(D, S));
}

// Runs one token of each sequence through a whole decoder. shape and table: see decoder.h; the table's last row has the
// last norm and the head. numbers: the norms' epsilon, the attention's scale. pointers: ids [N], the rows of the head
// that are the input, or null if x is the input; cos, sin [N, H]; mask [N, mask_places] or null; x [N, D], which is
// overwritten; logits [N, V].
extern "C" int lte_decode(int dtype, const int64_t* shape, const float* numbers, const int64_t* table, int threads,
                          int activation, void* const* pointers) try {
    const auto run_it = dtype == 0 ? run_decoder<float> : dtype == 1 ? run_decoder<bf16> : run_decoder<f16>;
    Shape s;
    std::memcpy(&s, shape, sizeof s);
    return run_it(s, numbers, table, threads, activation, pointers) ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}
