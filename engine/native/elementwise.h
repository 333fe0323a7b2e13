// What happens between the products: norms, rotations, activations. All sums in float32.
#pragma once

#include <cmath>

#include "tile.h"

namespace baton {

// e^x, to about two units in the last place; 0 far below. Range reduction by powers of two, then a polynomial (Cephes).
inline __m512 exponential(__m512 x) {
    const __m512 bounded = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-104.0f));
    const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693359375f), bounded);
    rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(sum, rest), rest, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(sum, twos);
}

// gate * sigmoid(gate) * up
inline __m512 silu_and_multiply(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 decay = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    return _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, decay)), up);
}

// to[i] = from[i] / rms(from) * weight[i]; in place if they are the same.
template <class Type>
void normalize(typename Type::Element* to, const typename Type::Element* from, const typename Type::Element* weight,
               int size, float epsilon) {
    __m512 squares = _mm512_setzero_ps();
    for (int at = 0; at < size; at += LANES) {
        const __m512 values = Type::load(from + at, lanes_of(size - at));
        squares = _mm512_fmadd_ps(values, values, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(size);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
    for (int at = 0; at < size; at += LANES) {
        const __mmask16 lanes = lanes_of(size - at);
        const __m512 scaled = _mm512_mul_ps(Type::load(from + at, lanes), scale);
        Type::store(to + at, _mm512_mul_ps(scaled, Type::load(weight + at, lanes)), lanes);
    }
}

// Rotates, in place, each pair (head[i], head[i + size / 2]) by the angle with cosine[i] and sine[i], i < size / 2.
template <class Type>
void rotate(typename Type::Element* head, const float* cosine, const float* sine, int size) {
    const int half = size / 2;
    for (int at = 0; at < half; at += LANES) {
        const __mmask16 lanes = lanes_of(half - at);
        const __m512 cosines = _mm512_maskz_loadu_ps(lanes, cosine + at);
        const __m512 sines = _mm512_maskz_loadu_ps(lanes, sine + at);
        const __m512 first = Type::load(head + at, lanes);
        const __m512 second = Type::load(head + half + at, lanes);
        Type::store(head + at, _mm512_fnmadd_ps(second, sines, _mm512_mul_ps(first, cosines)), lanes);
        Type::store(head + half + at, _mm512_fmadd_ps(first, sines, _mm512_mul_ps(second, cosines)), lanes);
    }
}

}  // namespace baton
