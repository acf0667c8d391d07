// 4-bit weights as the kernels read them.
//
//   W[n, k] = (q[n, k] − z[n, g]) · s[n, g],  g = k / group
//
// One 512-bit vector holds the codes of 16 columns × 8 inputs, as 32 words of 16 bits. Nibble j of lane 2c + p of vector
// t is the code of column c, input 8t + 2j + p. So `shift right by 4j`, then `vpermw` with the lane as an index into a
// table of 0..15 (written twice, as vpermw looks at five bits), gives bf16 pairs of neighbouring inputs: what vdpbf16ps
// takes, and, sixteen such vectors below each other, what AMX calls a B tile.
//
//   codes  [blocks][inputs / 8]    vectors; a block is 16 columns, and their number is padded to an even one
//   scales [blocks][groups][16]    fp16 or bf16, as in the checkpoint
//   zeros  [blocks][groups][16]    uint8

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr long COLUMNS = 16;  // of one block
constexpr long AHEAD = 64;    // vectors: 4 KB, the best prefetch distance measured

struct Weight {
    const __m512i* codes;
    const uint16_t* scales;
    const uint8_t* zeros;
    long columns, inputs, group;
    bool bf16_scales;

    long groups() const { return inputs / group; }
    long pairs() const { return (columns + 2 * COLUMNS - 1) / (2 * COLUMNS); }
    const __m512i* vectors(long block) const { return codes + block * (inputs / 8); }

    __m512 scale(long block, long g) const {
        const __m256i raw = _mm256_loadu_si256((const __m256i*)(scales + (block * groups() + g) * COLUMNS));
        if (bf16_scales) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
        return _mm512_cvtph_ps(raw);
    }
    __m512 zero(long block, long g) const {
        const __m128i raw = _mm_loadu_si128((const __m128i*)(zeros + (block * groups() + g) * COLUMNS));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(raw));
    }
};

// What is multiplied, and where the result goes.
struct Rows {
    const uint16_t* x;      // bf16 [rows, inputs]
    const uint16_t* tiles;  // the same, as AMX loads it; see pack_tiles
    const float* sums;      // [rows, groups]: Σ_k∈g x
    void* y;                // [rows, columns], bf16 or fp32
    bool bf16_out;
    long rows;
};

// Uninitialized memory, aligned to a cache line.
template <typename T>
struct Memory {
    T* data;
    explicit Memory(long count) : data(count ? (T*)_mm_malloc(size_t(count) * sizeof(T), 64) : nullptr) {}
    ~Memory() { _mm_free(data); }
    Memory(const Memory&) = delete;
};

// The two constants of decoding, kept in registers.
struct Tables {
    __m512i codes;       // 0..15 as bf16, twice
    __m512i interleave;  // sixteen even inputs, then sixteen odd ones -> pairs

    Tables() {
        uint16_t values[32], order[32];
        for (int i = 0; i < 32; i++) {
            const float value = float(i & 15);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            values[i] = uint16_t(bits >> 16);
            order[i] = uint16_t(i / 2 + 16 * (i % 2));
        }
        codes = _mm512_loadu_si512(values);
        interleave = _mm512_loadu_si512(order);
    }
};

// q of one nibble plane.
inline __m512i decode(__m512i codes, int nibble, const Tables& tables) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * nibble), tables.codes);
}

// (q − z) · s of one nibble plane, rounded to bf16.
inline __m512i decode_scaled(__m512i codes, int nibble, __m512 scale, __m512 zero, const Tables& tables) {
    const __m512i both = decode(codes, nibble, tables);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))));
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_sub_ps(odd, zero), scale),
                                                 _mm512_mul_ps(_mm512_sub_ps(even, zero), scale));
    return _mm512_permutexvar_epi16(tables.interleave, (__m512i)rounded);
}

// One row of one block of y; columns that are padding are left out.
inline void store(const Weight& w, const Rows& r, long row, long block, __m512 value) {
    const long at = row * w.columns + block * COLUMNS;
    const long here = std::max(0L, std::min(COLUMNS, w.columns - block * COLUMNS));
    const __mmask16 mask = __mmask16((1u << here) - 1);
    if (r.bf16_out)
        _mm256_mask_storeu_epi16((uint16_t*)r.y + at, mask, (__m256i)_mm512_cvtneps_pbh(value));
    else
        _mm512_mask_storeu_ps((float*)r.y + at, mask, value);
}

}  // namespace
