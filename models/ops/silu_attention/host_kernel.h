// The tiles of the silu attention. Included once per instruction set, after simd.h, product.h and pack.h.

// Whether the queries from i0 see no key, each key or some of the keys from j0; tokens count from the start of all sequences.
enum class Seen { kNone, kAll, kSome };

inline Seen seen_tile(const Ranks& ranks, int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    int32_t least_end = INT32_MAX, most_end = 0, least_begin = INT32_MAX, most_begin = 0, low = INT32_MAX, high = -1;
    for (int64_t i = i0; i < i0 + rows; ++i) {
        least_end = std::min(least_end, ranks.end[i]);
        most_end = std::max(most_end, ranks.end[i]);
        least_begin = std::min(least_begin, ranks.begin[i]);
        most_begin = std::max(most_begin, ranks.begin[i]);
    }
    for (int64_t j = j0; j < j0 + columns; ++j) {
        low = std::min(low, ranks.rank[j]);
        high = std::max(high, ranks.rank[j]);
    }
    if (low >= most_end || (low >= 0 && high < least_begin)) return Seen::kNone;
    return high < least_end && (low >= most_begin || high < 0 || most_begin == 0) ? Seen::kAll : Seen::kSome;
}

inline bool sees_itself(const Ranks& ranks, int64_t t) {
    int32_t rank = ranks.rank[t];
    return rank < ranks.end[t] && (rank < 0 || rank >= ranks.begin[t]);
}

GRZOO_INLINE Ints seen_keys(const int32_t* rank, int32_t begin, int32_t end) {
    Ints r = load(rank);
    return (r < splat(end)) & ((r >= splat(begin)) | (r < splat(0)));
}

// scores of the tile of queries from i0 and keys from j0 -> silu(scale * scores) / divisor, zero where not seen
inline void silu_weights(const SiluAttention& shape, float* scores, int64_t i0, int64_t rows, int64_t j0, int64_t vectors, bool masked) {
    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = shape.inverse[i0 + r];
        const int32_t begin = shape.ranks.begin[i0 + r], end = shape.ranks.end[i0 + r];
        for (int64_t w = 0; w < vectors; ++w) {
            float* at = scores + r * kTile + w * kLanes;
            Floats x = load(at) * splat(shape.scale), y = x * splat(inverse) / (splat(1.0f) + exponential(-x));
            if (masked) y = select(seen_keys(shape.ranks.rank + j0 + w * kLanes, begin, end), y, splat(0.0f));
            store(at, y);
        }
    }
}

// scores -> weights; grads of the weights -> grads of the scores
inline void silu_weights_backward(const SiluAttention& shape, float* scores, float* grads, int64_t i0, int64_t rows, int64_t j0,
                                  int64_t vectors, bool masked) {
    for (int64_t r = 0; r < rows; ++r) {
        const Floats inverse = splat(shape.inverse[i0 + r]), scale = splat(shape.scale);
        const int32_t begin = shape.ranks.begin[i0 + r], end = shape.ranks.end[i0 + r];
        for (int64_t w = 0; w < vectors; ++w) {
            float *at = scores + r * kTile + w * kLanes, *grad = grads + r * kTile + w * kLanes;
            Floats x = load(at) * scale, s = sigmoid(x), weight = x * s;
            Floats slope = load(grad) * inverse * scale * (s + weight * (splat(1.0f) - s));
            weight *= inverse;
            if (masked) {
                Ints seen = seen_keys(shape.ranks.rank + j0 + w * kLanes, begin, end);
                weight = select(seen, weight, splat(0.0f));
                slope = select(seen, slope, splat(0.0f));
            }
            store(at, weight);
            store(grad, slope);
        }
    }
}

inline float dot(const float* a, const float* b, int64_t width) {
    Floats total = splat(0.0f);
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) total += load(a + k) * load(b + k);
    float result = sum(total);
    for (; k < width; ++k) result += a[k] * b[k];
    return result;
}

inline void add_scaled(float* to, const float* from, float factor, int64_t width) {
    for (int64_t k = 0; k < width; ++k) to[k] += factor * from[k];
}

inline float sigmoid_of(float x) { return sigmoid(splat(x))[0]; }

void silu_forward_unit(const SiluAttention& shape, const SiluUnit& unit, float* scratch) {
    const int64_t heads = shape.heads, keys = shape.key_width, values = shape.value_width, length = unit.length;
    const int64_t padded_values = round_up(values, kLanes), value_vectors = padded_values / kLanes;
    const int64_t tiles = (length + kTile - 1) / kTile;
    float* packed_key = scratch;                                       // [heads, tiles, keys, kTile]
    float* packed_value = packed_key + heads * tiles * keys * kTile;   // [heads, length, padded_values]
    float* sums = packed_value + heads * length * padded_values;       // [heads, kTile, padded_values]
    float* scores = sums + heads * kTile * padded_values;
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t tile = 0; tile < tiles; ++tile)
            pack_columns(shape.key.at(unit.token + tile * kTile, h), shape.key.token, std::min(kTile, length - tile * kTile), keys,
                         packed_key + (h * tiles + tile) * keys * kTile);
        pack_rows(shape.value.at(unit.token, h), shape.value.token, length, values, packed_value + h * length * padded_values,
                  padded_values);
    }
    for (int64_t i0 = unit.begin; i0 < unit.end; i0 += kTile) {
        const int64_t rows = std::min(kTile, unit.end - i0), i = unit.token + i0;
        memset(sums, 0, heads * kTile * padded_values * sizeof(float));
        for (int64_t j0 = 0; j0 < length; j0 += kTile) {
            const int64_t columns = std::min(kTile, length - j0), vectors = vectors_of(columns), j = unit.token + j0;
            const Seen seen = seen_tile(shape.ranks, i, rows, j, columns);
            if (seen == Seen::kNone) continue;
            for (int64_t h = 0; h < heads; ++h) {
                float* sum = sums + h * kTile * padded_values;
                tile_product<Causal::kNone>(rows, vectors, keys, Operand{shape.query.at(i, h), shape.query.token, 1},
                                            packed_key + (h * tiles + j0 / kTile) * keys * kTile, kTile, nullptr, scores, kTile, 0);
                silu_weights(shape, scores, i, rows, j, vectors, seen == Seen::kSome);
                tile_product<Causal::kNone>(rows, value_vectors, columns, Operand{scores, kTile, 1},
                                            packed_value + (h * length + j0) * padded_values, padded_values, sum, sum, padded_values, 0);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < heads; ++h) {
                float* sum = sums + (h * kTile + r) * padded_values;
                if (!sees_itself(shape.ranks, i + r)) {
                    float x = shape.scale * dot(shape.query.at(i + r, h), shape.key.at(i + r, h), keys);
                    add_scaled(sum, shape.value.at(i + r, h), x * sigmoid_of(x) * shape.inverse[i + r], values);
                }
                memcpy(shape.out + ((i + r) * heads + h) * values, sum, values * sizeof(float));
            }
    }
}

// The term of a token that the rule hides from itself.
inline void own_term_backward(const SiluAttention& shape, int64_t t, int64_t h, float* grad_query, float* grad_key, float* grad_value) {
    const float *query = shape.query.at(t, h), *key = shape.key.at(t, h), *value = shape.value.at(t, h), *grad = shape.grad_out.at(t, h);
    float x = shape.scale * dot(query, key, shape.key_width), s = sigmoid_of(x);
    float slope = dot(grad, value, shape.value_width) * shape.inverse[t] * shape.scale * (s + x * s * (1.0f - s));
    add_scaled(grad_query, key, slope, shape.key_width);
    add_scaled(grad_key, query, slope, shape.key_width);
    add_scaled(grad_value, grad, x * s * shape.inverse[t], shape.value_width);
}

void silu_backward_unit(const SiluAttention& shape, const SiluUnit& unit, float* scratch) {
    const int64_t heads = shape.heads, keys = shape.key_width, values = shape.value_width, length = unit.length;
    const int64_t padded_keys = round_up(keys, kLanes), padded_values = round_up(values, kLanes);
    float* packed_query = scratch;                                     // [heads, length, padded_keys]
    float* packed_grad = packed_query + heads * length * padded_keys;  // [heads, length, padded_values]
    float* query_sums = packed_grad + heads * length * padded_values;  // [heads, length, padded_keys]
    float* packed_key = query_sums + heads * length * padded_keys;     // [heads, kTile, padded_keys]
    float* key_columns = packed_key + heads * kTile * padded_keys;     // [heads, keys, kTile]
    float* value_columns = key_columns + heads * keys * kTile;         // [heads, values, kTile]
    float* key_sums = value_columns + heads * values * kTile;          // [heads, kTile, padded_keys]
    float* value_sums = key_sums + heads * kTile * padded_keys;        // [heads, kTile, padded_values]
    float* scores = value_sums + heads * kTile * padded_values;
    float* grads = scores + kTile * kTile;
    for (int64_t h = 0; h < heads; ++h) {
        pack_rows(shape.query.at(unit.token, h), shape.query.token, length, keys, packed_query + h * length * padded_keys, padded_keys);
        pack_rows(shape.grad_out.at(unit.token, h), shape.grad_out.token, length, values, packed_grad + h * length * padded_values,
                  padded_values);
    }
    memset(query_sums, 0, heads * length * padded_keys * sizeof(float));
    for (int64_t j0 = unit.begin; j0 < unit.end; j0 += kTile) {
        const int64_t columns = std::min(kTile, unit.end - j0), vectors = vectors_of(columns), j = unit.token + j0;
        for (int64_t h = 0; h < heads; ++h) {
            const float* key = shape.key.at(j, h);
            pack_rows(key, shape.key.token, columns, keys, packed_key + h * kTile * padded_keys, padded_keys);
            pack_columns(key, shape.key.token, columns, keys, key_columns + h * keys * kTile);
            pack_columns(shape.value.at(j, h), shape.value.token, columns, values, value_columns + h * values * kTile);
        }
        memset(key_sums, 0, heads * kTile * (padded_keys + padded_values) * sizeof(float));
        for (int64_t i0 = 0; i0 < length; i0 += kTile) {
            const int64_t rows = std::min(kTile, length - i0), i = unit.token + i0;
            const Seen seen = seen_tile(shape.ranks, i, rows, j, columns);
            if (seen == Seen::kNone) continue;
            for (int64_t h = 0; h < heads; ++h) {
                const float* query = packed_query + (h * length + i0) * padded_keys;
                const float* grad = packed_grad + (h * length + i0) * padded_values;
                float* key_sum = key_sums + h * kTile * padded_keys;
                float* value_sum = value_sums + h * kTile * padded_values;
                float* query_sum = query_sums + (h * length + i0) * padded_keys;
                tile_product<Causal::kNone>(rows, vectors, keys, Operand{query, padded_keys, 1}, key_columns + h * keys * kTile, kTile,
                                            nullptr, scores, kTile, 0);
                tile_product<Causal::kNone>(rows, vectors, values, Operand{grad, padded_values, 1}, value_columns + h * values * kTile,
                                            kTile, nullptr, grads, kTile, 0);
                silu_weights_backward(shape, scores, grads, i, rows, j, vectors, seen == Seen::kSome);
                tile_product<Causal::kNone>(columns, padded_values / kLanes, rows, Operand{scores, 1, kTile}, grad, padded_values,
                                            value_sum, value_sum, padded_values, 0);
                tile_product<Causal::kNone>(columns, padded_keys / kLanes, rows, Operand{grads, 1, kTile}, query, padded_keys, key_sum,
                                            key_sum, padded_keys, 0);
                tile_product<Causal::kNone>(rows, padded_keys / kLanes, columns, Operand{grads, kTile, 1},
                                            packed_key + h * kTile * padded_keys, padded_keys, query_sum, query_sum, padded_keys, 0);
            }
        }
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t c = 0; c < columns; ++c) {
                float *key_sum = key_sums + (h * kTile + c) * padded_keys, *value_sum = value_sums + (h * kTile + c) * padded_values;
                if (!sees_itself(shape.ranks, j + c))
                    own_term_backward(shape, j + c, h, query_sums + (h * length + j0 + c) * padded_keys, key_sum, value_sum);
                int64_t row = (j + c) * heads + h;
                memcpy(shape.grad_key + row * keys, key_sum, keys * sizeof(float));
                memcpy(shape.grad_value + row * values, value_sum, values * sizeof(float));
            }
    }
    float* grad_query = unit.query_partial ? unit.query_partial : shape.grad_query + unit.token * heads * keys;
    for (int64_t r = 0; r < length; ++r)
        for (int64_t h = 0; h < heads; ++h)
            memcpy(grad_query + (r * heads + h) * keys, query_sums + (h * length + r) * padded_keys, keys * sizeof(float));
}
