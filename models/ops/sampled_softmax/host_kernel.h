// The parts of the sampled softmax. Included once per instruction set, after simd.h.

// x [width] -> y [padded] of length 1, padding zero; returns 1 / |x|, or -1 / floor where |x| is below the floor
inline float normalize(const float* x, int64_t width, int64_t padded, float* y) {
    memcpy(y, x, width * sizeof(float));
    for (int64_t k = width; k < padded; ++k) y[k] = 0.0f;
    Floats total = splat(0.0f);
    for (int64_t k = 0; k < padded; k += kLanes) total += load(y + k) * load(y + k);
    float norm = __builtin_sqrtf(sum(total)), scale = 1.0f / (norm < kNormFloor ? kNormFloor : norm);
    for (int64_t k = 0; k < padded; k += kLanes) store(y + k, load(y + k) * splat(scale));
    return norm < kNormFloor ? -scale : scale;
}

// gradient by y = x / |x| -> gradient by x [width]: (g - y (y . g)) / |x|; below the floor the norm is a constant
inline void normalize_backward(const float* grad, const float* y, float scale, int64_t width, int64_t padded, float* out) {
    Floats total = splat(0.0f);
    for (int64_t k = 0; k < padded; k += kLanes) total += load(grad + k) * load(y + k);
    float along = scale < 0.0f ? 0.0f : sum(total), factor = scale < 0.0f ? -scale : scale;
    for (int64_t k = 0; k < width; ++k) out[k] = (grad[k] - y[k] * along) * factor;
}

void normalize_rows(const Sampled& s, int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) s.row_scale[u] = normalize(s.rows + u * s.width, s.width, s.padded, s.unit_rows + u * s.padded);
}

GRZOO_INLINE void prefetch_row(const float* row, int64_t padded) {
    for (int64_t k = 0; k < padded; k += 16) __builtin_prefetch(row + k, 0, 3);
}

// out[n] = query . rows[index[n]] for n < count; index and out have room for whole vectors
inline void cosines(const Sampled& s, const float* query, const int32_t* index, int64_t count, bool far, float* out) {
    for (int64_t n = 0; n < count; n += kLanes) {
        const float* row[kLanes];
        Floats total[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            row[lane] = s.unit_rows + s.padded * index[std::min(n + lane, count - 1)];
            total[lane] = splat(0.0f);
        }
        if (far)
            for (int64_t ahead = n + 2 * kLanes; ahead < std::min(n + 3 * kLanes, count); ++ahead)
                prefetch_row(s.unit_rows + s.padded * index[ahead], s.padded);
        for (int64_t k = 0; k < s.padded; k += kLanes) {
            Floats q = load(query + k);
            for (int lane = 0; lane < kLanes; ++lane) total[lane] += q * load(row[lane] + k);
        }
        store(out + n, sums(total));
    }
}

// out[0 .. padded) = sum over n of weight[n] rows[index[n]]
inline void weighted_rows(const Sampled& s, const int32_t* index, const float* weight, int64_t count, float* out) {
    int64_t k = 0;
    auto block = [&](auto size) GRZOO_LAMBDA {
        constexpr int W = decltype(size)::value;
        Floats total[W];
        for (int w = 0; w < W; ++w) total[w] = splat(0.0f);
        for (int64_t n = 0; n < count; ++n) {
            const float* row = s.unit_rows + s.padded * index[n] + k;
            for (int w = 0; w < W; ++w) total[w] += splat(weight[n]) * load(row + w * kLanes);
        }
        for (int w = 0; w < W; ++w) store(out + k + w * kLanes, total[w]);
        k += W * kLanes;
    };
    while (s.padded - k >= 8 * kLanes) block(std::integral_constant<int, 8>());
    if (s.padded - k >= 4 * kLanes) block(std::integral_constant<int, 4>());
    if (s.padded - k >= 2 * kLanes) block(std::integral_constant<int, 2>());
    if (s.padded - k >= kLanes) block(std::integral_constant<int, 1>());
}

// 64-bit indices to 32 bits; false when one is not in [0, end).
inline bool narrow(const int64_t* __restrict index, int64_t count, int64_t end, int32_t* __restrict out) {
    int64_t bad = 0;
    for (int64_t n = 0; n < count; ++n) {
        out[n] = static_cast<int32_t>(index[n]);
        bad |= index[n] < 0 || index[n] >= end;
    }
    return bad == 0;
}

inline void scale_negatives(const uint8_t* __restrict accidental, int64_t count, float factor, float* __restrict logits) {
    for (int64_t n = 0; n < count; ++n) {
        float scaled = logits[n] * factor;
        logits[n] = accidental[n] ? -5e4f : scaled;
    }
}

// sums [padded] += weight * query
GRZOO_INLINE void add_scaled(float* sums, float weight, const float* query, int64_t padded) {
    const Floats factor = splat(weight);
    int64_t k = 0;
    for (; k + 4 * kLanes <= padded; k += 4 * kLanes) {
        Floats total[4];
        for (int w = 0; w < 4; ++w) total[w] = load(sums + k + w * kLanes) + factor * load(query + k + w * kLanes);
        for (int w = 0; w < 4; ++w) store(sums + k + w * kLanes, total[w]);
    }
    for (; k < padded; k += kLanes) store(sums + k, load(sums + k) + factor * load(query + k));
}

// Loss of tokens [begin, end), gradient of their queries, slopes for `sum_rows`. Scratch: padded + 3 (1 + negatives + 8) floats.
// Returns false when an index is out of range.
bool token_losses(const Sampled& s, int64_t begin, int64_t end, float* scratch, double* loss) {
    const int64_t count = 1 + s.negatives, room = round_up_lanes(count);
    const bool far = s.num_rows * s.padded > kFarFloats;
    float* logits = scratch;
    float* grad = logits + room;
    for (int64_t t = begin; t < end; ++t) {
        int32_t* index = s.index + t * count;
        index[0] = static_cast<int32_t>(s.positive[t]);
        bool valid = narrow(s.negative + t * s.negatives, s.negatives, s.num_rows, index + 1);
        if (!valid || static_cast<uint64_t>(s.positive[t]) >= static_cast<uint64_t>(s.num_rows)) return false;
        float* query = s.unit_query + t * s.padded;
        float scale = normalize(s.query + t * s.width, s.width, s.padded, query);
        cosines(s, query, index, count, far, logits);
        float positive = logits[0] * s.inverse_temperature;
        logits[0] = positive;
        scale_negatives(s.accidental + t * s.negatives, s.negatives, s.inverse_temperature, logits + 1);
        for (int64_t n = count; n < room; ++n) logits[n] = -__builtin_inff();
        Floats most = load(logits);
        for (int64_t n = kLanes; n < room; n += kLanes) most = load(logits + n) > most ? load(logits + n) : most;
        float largest = most[0];
        for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
        Floats total = splat(0.0f);
        for (int64_t n = 0; n < room; n += kLanes) {
            Floats x = load(logits + n) - splat(largest);
            Floats e = x < splat(-87.0f) ? splat(0.0f) : exponential(x);
            store(logits + n, e);
            total += e;
        }
        float denominator = sum(total);
        *loss += __builtin_log(static_cast<double>(denominator)) + (static_cast<double>(largest) - positive);
        if (!s.with_grads) continue;
        Floats factor = splat(s.inverse_temperature / denominator);
        for (int64_t n = 0; n < room; n += kLanes) store(logits + n, load(logits + n) * factor);
        // Minus the sum of the others instead of p - 1: exact where p is close to 1.
        Floats others = splat(0.0f);
        logits[0] = 0.0f;
        for (int64_t n = 0; n < room; n += kLanes) others += load(logits + n);
        logits[0] = -sum(others);
        memcpy(s.slope + t * count, logits, count * sizeof(float));
        weighted_rows(s, index, logits, count, grad);
        normalize_backward(grad, query, scale, s.width, s.padded, s.grad_query + t * s.width);
    }
    return true;
}

// Gradient of rows [begin, end), summed in the order of the tokens whatever the ranges are. Scratch: 2 (1 + negatives) floats.
void sum_rows(const Sampled& s, int64_t begin, int64_t end, float* scratch) {
    const int64_t count = 1 + s.negatives;
    int32_t* row = reinterpret_cast<int32_t*>(scratch);
    float* weight = scratch + count;
    memset(s.row_sums + begin * s.padded, 0, (end - begin) * s.padded * sizeof(float));
    float* const all = s.row_sums;
    const int64_t padded = s.padded;
    const bool far = (end - begin) * padded > kFarFloats;
    const uint32_t first = static_cast<uint32_t>(begin), size = static_cast<uint32_t>(end - begin);
    for (int64_t t = 0; t < s.tokens; ++t) {
        const int32_t* index = s.index + t * count;
        const float* slope = s.slope + t * count;
        int64_t mine = 0;
        for (int64_t n = 0; n < count; ++n) {   // no branch to mispredict
            row[mine] = index[n];
            weight[mine] = slope[n];
            mine += static_cast<uint32_t>(index[n]) - first < size;
        }
        const float* query = s.unit_query + t * s.padded;
        for (int64_t m = 0; m < mine; ++m) {
            if (far && m + 8 < mine) prefetch_row(all + padded * row[m + 8], padded);
            add_scaled(all + padded * row[m], weight[m], query, padded);
        }
    }
    for (int64_t u = begin; u < end; ++u)
        normalize_backward(s.row_sums + u * s.padded, s.unit_rows + u * s.padded, s.row_scale[u], s.width, s.padded,
                           s.grad_rows + u * s.width);
}
