// What the instruction-set independent part of the sampled softmax hands to the kernels.
#pragma once
#include <stdint.h>

namespace grzoo {

struct Sampled {
    int64_t tokens, num_rows, width, padded;   // padded: width rounded up to whole vectors
    int64_t negatives;                         // of each token
    const float *query, *rows;                 // [tokens, width], [num_rows, width]
    const int64_t *positive, *negative;        // [tokens], [tokens, negatives], into the rows
    const uint8_t* accidental;                 // [tokens, negatives]
    float inverse_temperature;
    bool with_grads;
    float *unit_rows, *row_scale;              // [num_rows, padded] normalised, [num_rows] 1 / norm; negative below the floor
    float *unit_query;                         // [tokens, padded]
    int32_t* index;                            // [tokens, 1 + negatives]
    float* slope;                              // [tokens, 1 + negatives] gradient of the loss by the cosines
    float *row_sums;                           // [num_rows, padded] gradient by the normalised rows
    float *grad_query, *grad_rows;             // [tokens, width], [num_rows, width]
};

constexpr float kNormFloor = 1e-6f;
constexpr int64_t kFarFloats = 1 << 18;   // rows of more than this leave the second-level cache: fetch ahead

}  // namespace grzoo
