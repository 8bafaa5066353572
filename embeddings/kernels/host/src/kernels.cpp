// Compiled with -DGRZOO_ISA=baseline|avx2|avx512 and the flags of that instruction set. Products and sums are never
// contracted and reductions have a fixed tree, so that all instruction sets give the same bits.
#include "kernels.h"

#include <math.h>
#include <string.h>

#include "bits.h"
#include "grzoo_host.h"

#ifndef GRZOO_ISA
#define GRZOO_ISA baseline
#endif
#define GRZOO_STRING_(x) #x
#define GRZOO_STRING(x) GRZOO_STRING_(x)

namespace grzoo {
namespace GRZOO_ISA {
namespace {

constexpr int64_t kAhead = 8;            // rows that are prefetched before they are used
constexpr int64_t kLine = 16;            // floats of a cache line
constexpr int32_t kMaxStep = 2147483646;  // MAX_STEP of kernels/base.py: where the count of updates stays

template <int kWrite>
GRZOO_INLINE void prefetch_row(const float* row, int64_t floats) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(row + floats);
    for (uintptr_t line = reinterpret_cast<uintptr_t>(row) / 64 * 64; line < end; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(line), kWrite, 3);
}

// Past the caches: what is written here is read much later, and half of the memory traffic of a plain store is the
// reading of what it overwrites. `out` on a 64-byte border, dim a multiple of 16.
inline void stream_row(float* out, const float* row, int64_t dim) {
#if defined(__clang__)
    typedef float Vector __attribute__((vector_size(32)));
    typedef float Unaligned __attribute__((vector_size(32), aligned(4)));
    for (int64_t j = 0; j < dim; j += 8)
        __builtin_nontemporal_store(*reinterpret_cast<const Unaligned*>(row + j), reinterpret_cast<Vector*>(out + j));
#elif defined(__AVX__)
    typedef float Vector __attribute__((vector_size(32)));
    typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
    for (int64_t j = 0; j < dim; j += 8)
        __builtin_ia32_movntps256(out + j, static_cast<Vector>(*reinterpret_cast<const Unaligned*>(row + j)));
#elif defined(__x86_64__)
    typedef float Vector __attribute__((vector_size(16)));
    typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
    for (int64_t j = 0; j < dim; j += 4)
        __builtin_ia32_movntps(out + j, static_cast<Vector>(*reinterpret_cast<const Unaligned*>(row + j)));
#else
    memcpy(out, row, sizeof(float) * static_cast<unsigned long>(dim));
#endif
}

inline bool can_stream(const float* out, int64_t dim, int64_t rows) {
    return dim % kLine == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 && rows * dim >= (1 << 18);   // 1 MiB: more than stays near
}

inline void finish_streaming() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

inline void copy_row(float* __restrict__ out, const float* __restrict__ row, int64_t dim) {
    for (int64_t j = 0; j < dim; ++j) out[j] = row[j];
}

typedef uint16_t __attribute__((may_alias)) Half;        // a bfloat16
typedef uint32_t __attribute__((may_alias)) Word;        // a float32

inline Half* halves(const RowsView& rows, int64_t h) { return reinterpret_cast<Half*>(rows.record(h)); }

inline void expand_row(float* __restrict__ out, const Half* __restrict__ row, int64_t dim) {
    Word* words = reinterpret_cast<Word*>(out);
    for (int64_t j = 0; j < dim; ++j) words[j] = uint32_t(row[j]) << 16;
}

inline uint32_t rounded(uint32_t bits, uint32_t noise) {
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (bits + noise) >> 16;
}

inline void store_nearest(Half* __restrict__ out, const float* __restrict__ row, int64_t dim) {
    const Word* words = reinterpret_cast<const Word*>(row);
    for (int64_t j = 0; j < dim; ++j)
        out[j] = static_cast<uint16_t>(rounded(words[j], 0x7FFFu + ((words[j] >> 16) & 1u)));
}

// The bits of (key, step, column) as in rounding.py.
inline void store_stochastic(Half* __restrict__ out, const float* __restrict__ row, int64_t dim, uint64_t key, int32_t step,
                             const uint64_t* __restrict__ column_words) {
    const Word* words = reinterpret_cast<const Word*>(row);
    const uint64_t word = mix64(static_cast<uint64_t>(static_cast<int64_t>(step)) + 0x632BE59BD9B4E019ull);
    const uint64_t base = mix64(key + 0x9E3779B97F4A7C15ull + word);
    for (int64_t j = 0; j < dim; ++j)
        out[j] = static_cast<uint16_t>(rounded(words[j], static_cast<uint32_t>(mix64(base + column_words[j]) >> 48)));
}

void store(const RowsView& rows, int64_t h, const float* row) {
    if (rows.bfloat16)
        store_nearest(halves(rows, h), row, rows.dim);
    else
        copy_row(rows.record(h), row, rows.dim);
}

void gather_halves(const RowsView& rows, const int64_t* handles, int64_t begin, int64_t end, float* out) {
    const int64_t dim = rows.dim;
    for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead < end && handles[i + kAhead] >= 0) prefetch_row<0>(rows.record(handles[i + kAhead]), rows.row_floats());
        if (handles[i] < 0)
            memset(out + i * dim, 0, sizeof(float) * dim);
        else
            expand_row(out + i * dim, halves(rows, handles[i]), dim);
    }
}

void gather(const RowsView& rows, const int64_t* handles, int64_t begin, int64_t end, float* out) {
    if (rows.bfloat16) return gather_halves(rows, handles, begin, end, out);
    const int64_t dim = rows.dim;
    const bool stream = can_stream(out, dim, end - begin);
    for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead < end && handles[i + kAhead] >= 0) prefetch_row<0>(rows.record(handles[i + kAhead]), dim);
        if (handles[i] < 0)
            memset(out + i * dim, 0, sizeof(float) * dim);
        else if (stream)
            stream_row(out + i * dim, rows.record(handles[i]), dim);
        else
            copy_row(out + i * dim, rows.record(handles[i]), dim);
    }
    if (stream) finish_streaming();
}

void take_rows(const float* values, const int64_t* index, int64_t begin, int64_t end, int64_t dim, float* out) {
    const bool stream = can_stream(out, dim, end - begin);
    for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead < end) prefetch_row<0>(values + index[i + kAhead] * dim, dim);
        if (stream)
            stream_row(out + i * dim, values + index[i] * dim, dim);
        else
            copy_row(out + i * dim, values + index[i] * dim, dim);
    }
    if (stream) finish_streaming();
}

inline void add_row(float* __restrict__ out, const float* __restrict__ row, int64_t dim) {
    for (int64_t j = 0; j < dim; ++j) out[j] += row[j];
}

void add_rows(const float* values, const int64_t* index, const uint32_t* positions, int64_t count, int64_t dim, float* out,
              uint8_t* seen) {
    for (int64_t k = 0; k < count; ++k) {
        if (k + kAhead < count) {
            const int64_t ahead = positions ? positions[k + kAhead] : k + kAhead;
            prefetch_row<1>(out + index[ahead] * dim, dim);
            if (positions) prefetch_row<0>(values + ahead * dim, dim);    // else in order, which the processor sees by itself
        }
        const int64_t p = positions ? positions[k] : k, s = index[p];
        if (seen[s]) {
            add_row(out + s * dim, values + p * dim, dim);
        } else {
            seen[s] = 1;
            copy_row(out + s * dim, values + p * dim, dim);
        }
    }
}

typedef float Floats4 __attribute__((vector_size(16)));
typedef float LooseFloats4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double Doubles4 __attribute__((vector_size(32)));

// The square of a float32 is exact in float64: contracted or not, the sum has the same bits.
GRZOO_INLINE void add_squares(Doubles4& sum, const float* g) {
    const Doubles4 x = __builtin_convertvector(static_cast<Floats4>(*reinterpret_cast<const LooseFloats4*>(g)), Doubles4);
#if defined(__FMA__) && defined(__AVX2__) && !defined(__clang__)
    sum = __builtin_ia32_vfmaddpd256(x, x, sum);
#else
    sum += x * x;
#endif
}

// In eight lanes, so that its order is that of no instruction set.
inline double sum_of_squares(const float* g, int64_t dim) {
    Doubles4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
    int64_t j = 0;
    for (; j + 8 <= dim; j += 8) {
        add_squares(low, g + j);
        add_squares(high, g + j + 4);
    }
    for (int l = 0; j < dim; ++j, ++l) (l < 4 ? low[l] : high[l - 4]) += double(g[j]) * double(g[j]);
    low += high;
    return (low[0] + low[1]) + (low[2] + low[3]);
}

double squares(const float* values, int64_t begin, int64_t end, int64_t dim) {
    return sum_of_squares(values + begin * dim, (end - begin) * dim);
}

void initial(const InitLaw& law, int64_t id, const uint64_t* column_words, int64_t dim, float* row) {
    if (law.kind == GRZOO_CONSTANT) {
        for (int64_t j = 0; j < dim; ++j) row[j] = law.value;
        return;
    }
    const uint64_t base = mix64(law.key + 0x9E3779B97F4A7C15ull + mix64(static_cast<uint64_t>(id) + 0x632BE59BD9B4E019ull));
    if (law.kind == GRZOO_UNIFORM) {
        for (int64_t j = 0; j < dim; ++j) {
            const int32_t s = static_cast<int32_t>(mix64(base + column_words[j]) >> 40) - (1 << 23);
            row[j] = law.value * static_cast<float>(s);
        }
        return;
    }
    for (int64_t j = 0; j < dim; ++j) row[j] = law.value * law.quantiles[mix64(base + column_words[j]) >> 48];
}

// apply(p, g, rule, h, t) on every row, the step of the row counted first.
template <typename Apply>
inline void for_each_row(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin,
                         int64_t end, Apply apply) {
    constexpr int64_t kUpdateAhead = 8;
    for (int64_t i = begin; i < begin + kUpdateAhead && i < end; ++i) prefetch_row<1>(rows.record(handles[i]), rows.record_floats);
    for (int64_t i = begin; i < end; ++i) {
        if (i + kUpdateAhead < end) prefetch_row<1>(rows.record(handles[i + kUpdateAhead]), rows.record_floats);
        const int64_t h = handles[i];
        int32_t& step = rows.step(h)[0];
        const int32_t t = step += step < kMaxStep;
        if (!rows.bfloat16) {
            apply(rows.record(h), grads + i * rows.dim, rule.slots, h, t);
            continue;
        }
        expand_row(rule.scratch, halves(rows, h), rows.dim);
        apply(rule.scratch, grads + i * rows.dim, rule.slots, h, t);
        if (rule.keys)
            store_stochastic(halves(rows, h), rule.scratch, rows.dim, static_cast<uint64_t>(rule.keys[i]), t, rule.column_words);
        else
            store_nearest(halves(rows, h), rule.scratch, rows.dim);
    }
}

void sgd(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin, int64_t end) {
    const float lr = rule.lr, momentum = rule.momentum, decay = rule.weight_decay;
    const int64_t dim = rows.dim;
    for_each_row(rows, rule, handles, grads, begin, end,
                 [&](float* __restrict__ p, const float* __restrict__ g, const SlotPlace* slots, int64_t h, int32_t) {
                     if (momentum == 0) {
                         for (int64_t j = 0; j < dim; ++j) p[j] -= lr * (decay == 0 ? g[j] : g[j] + decay * p[j]);
                         return;
                     }
                     float* __restrict__ b = slots[0].of(rows, h);
                     for (int64_t j = 0; j < dim; ++j) {
                         b[j] = b[j] * momentum + (decay == 0 ? g[j] : g[j] + decay * p[j]);
                         p[j] -= lr * b[j];
                     }
                 });
}

void adagrad(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin, int64_t end) {
    const float lr = rule.lr, eps = rule.eps;
    const int64_t dim = rows.dim;
    for_each_row(rows, rule, handles, grads, begin, end,
                 [&](float* __restrict__ p, const float* __restrict__ g, const SlotPlace* slots, int64_t h, int32_t) {
                     float* __restrict__ sum = slots[0].of(rows, h);
                     for (int64_t j = 0; j < dim; ++j) {
                         sum[j] += g[j] * g[j];
                         p[j] -= lr * g[j] / (sqrtf(sum[j]) + eps);
                     }
                 });
}

void rowwise_adagrad(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin,
                     int64_t end) {
    const float lr = rule.lr, eps = rule.eps;
    const int64_t dim = rows.dim;
    for_each_row(rows, rule, handles, grads, begin, end,
                 [&](float* __restrict__ p, const float* __restrict__ g, const SlotPlace* slots, int64_t h, int32_t) {
                     float* sum = slots[0].of(rows, h);
                     *sum += static_cast<float>(sum_of_squares(g, dim) / double(dim));
                     const float rate = lr / (sqrtf(*sum) + eps);
                     for (int64_t j = 0; j < dim; ++j) p[j] -= rate * g[j];
                 });
}

// kDecay: 0 none, 1 into the gradient (adam), 2 of the row (adamw)
template <int kDecay>
void adam_rows(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin,
               int64_t end) {
    const float beta2 = rule.beta2, eps = rule.eps, w1 = rule.first_weight, w2 = rule.second_weight;
    const float decay = rule.weight_decay, shrink = rule.decay_factor;
    const bool near_old = w1 < 0.5f;       // the two forms of lerp: each exact at its own end
    const int64_t dim = rows.dim;
    for_each_row(
        rows, rule, handles, grads, begin, end,
        [&](float* __restrict__ p, const float* __restrict__ g, const SlotPlace* slots, int64_t h, int32_t t) {
            float* __restrict__ m = slots[0].of(rows, h);
            float* __restrict__ v = slots[1].of(rows, h);
            const Correction c = rule.has_global                           ? rule.global
                                 : uint32_t(t) < rule.correction_count ? rule.corrections[t]
                                                                       : rule.correction_of(rule, t);
            const float step_size = static_cast<float>(rule.lr_exact / c.first), root = c.root;
            for (int64_t j = 0; j < dim; ++j) {
                float x = p[j], grad = g[j];
                if (kDecay == 1) grad = grad + decay * x;
                if (kDecay == 2) x = x * shrink;
                const float first = near_old ? m[j] + w1 * (grad - m[j]) : grad - (grad - m[j]) * (1 - w1);
                const float second = v[j] * beta2 + w2 * grad * grad;
                m[j] = first;
                v[j] = second;
                p[j] = x - step_size * first / (sqrtf(second) / root + eps);
            }
        });
}

void adam(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin, int64_t end) {
    (rule.weight_decay == 0 ? adam_rows<0> : adam_rows<1>)(rows, rule, handles, grads, begin, end);
}

void adamw(const RowsView& rows, const UpdateRule& rule, const int64_t* handles, const float* grads, int64_t begin, int64_t end) {
    (rule.weight_decay == 0 ? adam_rows<0> : adam_rows<2>)(rows, rule, handles, grads, begin, end);
}

// A product is rounded before it is added, as in `kernels/base.py`.
inline void add_weighted(float* __restrict__ out, const float* __restrict__ row, float weight, int64_t dim) {
    for (int64_t j = 0; j < dim; ++j) out[j] += row[j] * weight;
}

void pool_rows(const float* values, const int64_t* index, const int64_t* offsets, const float* weights, int64_t begin,
               int64_t end, int64_t dim, float* out) {
    const int64_t stop = offsets[end];
    for (int64_t b = begin; b < end; ++b) {
        float* sum = out + b * dim;
        memset(sum, 0, sizeof(float) * dim);
        for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
            if (i + kAhead < stop) prefetch_row<0>(values + index[i + kAhead] * dim, dim);
            if (weights)
                add_weighted(sum, values + index[i] * dim, weights[i], dim);
            else
                add_row(sum, values + index[i] * dim, dim);
        }
    }
}

void unpool_rows(const float* grads, const int64_t* index, const int64_t* offsets, const float* weights, int64_t bags,
                 int64_t dim, int64_t first, int64_t last, float* out) {
    const int64_t width = last - first, stop = offsets[bags];
    for (int64_t b = 0; b < bags; ++b) {
        const float* grad = grads + b * dim + first;
        for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
            if (i + kAhead < stop) prefetch_row<1>(out + index[i + kAhead] * dim + first, width);
            if (weights)
                add_weighted(out + index[i] * dim + first, grad, weights[i], width);
            else
                add_row(out + index[i] * dim + first, grad, width);
        }
    }
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    GRZOO_STRING(GRZOO_ISA), gather, take_rows, add_rows, squares, initial, store, {sgd, adagrad, rowwise_adagrad, adam, adamw},
    pool_rows, unpool_rows,
};

}  // namespace GRZOO_ISA
}  // namespace grzoo
