// Rows of LayerNorm, gate and dropout; see host.cpp. Sums run over eight lanes, then over the tail, always in this order.

GRZOO_INLINE float row_sum(const float* a, const float* b, int64_t n) {   // of a * b
    Floats total = splat(0.0f);
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) total += load(a + c) * load(b + c);
    float rest = sum(total);
    for (; c < n; ++c) rest += a[c] * b[c];
    return rest;
}

GRZOO_INLINE float row_sum(const float* a, int64_t n) {
    Floats total = splat(0.0f);
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) total += load(a + c);
    float rest = sum(total);
    for (; c < n; ++c) rest += a[c];
    return rest;
}

// normed = (x - mean) / sqrt(var + eps); returns 1 / sqrt(var + eps).
GRZOO_INLINE float normalize(const float* x, int64_t n, float eps, float* normed) {
    const float mean = row_sum(x, n) / static_cast<float>(n);
    for (int64_t c = 0; c < n; ++c) normed[c] = x[c] - mean;
    const float scale = 1.0f / __builtin_sqrtf(row_sum(normed, normed, n) / static_cast<float>(n) + eps);
    for (int64_t c = 0; c < n; ++c) normed[c] *= scale;
    return scale;
}

// factor[c]: what dropout multiplies column c of token t by.
GRZOO_INLINE void dropout_factors(const NormGate& s, int64_t t, float* factor) {
    const uint64_t key = static_cast<uint64_t>(s.row_keys[t]);
    for (int64_t c = 0; c < s.columns; ++c) factor[c] = mix_upper_bits(key + s.addends[c]) >= s.least ? s.kept : 0.0f;
}

// scratch: 3 * columns floats
static void forward_rows(const NormGate& s, int64_t first, int64_t end, float* scratch) {
    const int64_t n = s.columns;
    float *normed = scratch, *factor = scratch + n;
    for (int64_t t = first; t < end; ++t) {
        normalize(s.x + t * s.x_stride, n, s.eps, normed);
        const float* gate = s.gate + t * s.gate_stride;
        float* out = s.out + t * n;
        for (int64_t c = 0; c < n; ++c) out[c] = normed[c] * gate[c];
        if (s.row_keys == nullptr) continue;
        dropout_factors(s, t, factor);
        for (int64_t c = 0; c < n; ++c) out[c] *= factor[c];
    }
}

// With d = dy * factor * gate: dx = scale * (d - mean(d) - normed * mean(d * normed)); dgate = dy * factor * normed.
static void backward_rows(const NormGate& s, int64_t first, int64_t end, float* scratch) {
    const int64_t n = s.columns;
    float *normed = scratch, *d = scratch + n, *factor = scratch + 2 * n;
    for (int64_t t = first; t < end; ++t) {
        const float scale = normalize(s.x + t * s.x_stride, n, s.eps, normed);
        const float *gate = s.gate + t * s.gate_stride, *grad = s.grad + t * s.grad_stride;
        float *dx = s.out + t * n, *dgate = s.dgate + t * n;
        if (s.row_keys != nullptr) {
            dropout_factors(s, t, factor);
            for (int64_t c = 0; c < n; ++c) factor[c] *= grad[c];
        } else {
            for (int64_t c = 0; c < n; ++c) factor[c] = grad[c];
        }
        for (int64_t c = 0; c < n; ++c) dgate[c] = factor[c] * normed[c];
        for (int64_t c = 0; c < n; ++c) d[c] = factor[c] * gate[c];
        const float mean = row_sum(d, n) / static_cast<float>(n);
        const float along = row_sum(d, normed, n) / static_cast<float>(n);
        for (int64_t c = 0; c < n; ++c) dx[c] = scale * (d[c] - mean - normed[c] * along);
    }
}
