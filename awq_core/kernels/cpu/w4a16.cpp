// y = x · Wᵀ for 4-bit weights and bf16 activations, on AVX512-BF16 and, from a few rows on, AMX. Plain C interface.
//
//   y[m, n] = Σ_g s[n, g] · ( Σ_k∈g q[n, k] · x[m, k]  −  z[n, g] · Σ_k∈g x[m, k] )
//
// Both sums of the bracket run in fp32 over exact products of bf16 numbers (0..15 is exact in bf16), so nothing of a
// weight is rounded. Which thread computes a block of columns changes no bit of it. The layout is told in w4a16.h.

#include "w4a16.h"

#ifdef __AMX_BF16__
#include "w4a16_amx.h"
constexpr long AMX_ROWS = 4;  // from here on a matrix tile is faster than row after row, even when mostly empty
#endif

namespace {

// M rows times two blocks of columns; every decoded vector meets each row. vdpbf16ps takes some ten cycles and can start
// every other one, so few rows need several sums (C) side by side.
template <int M, int C = M == 1 ? 4 : M == 2 ? 2 : 1>
void few(const Weight& w, const Rows& r, long row, long block, const Tables& tables) {
    const uint16_t* x = r.x + row * w.inputs;
    const __m512i* vectors[2] = {w.vectors(block), w.vectors(block + 1)};
    __m512 total[M][2], dot[M][2][C];
    for (auto& line : total) line[0] = line[1] = _mm512_setzero_ps();
    for (long g = 0; g < w.groups(); g++) {
        for (auto& line : dot)
            for (int c = 0; c < C; c++) line[0][c] = line[1][c] = _mm512_setzero_ps();
        for (long t = g * w.group / 8; t < (g + 1) * w.group / 8; t++) {
            __m512i codes[2];
            for (int b = 0; b < 2; b++) {
                codes[b] = _mm512_loadu_si512(vectors[b] + t);
                _mm_prefetch((const char*)(vectors[b] + t + AHEAD), _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512bh weights[2] = {(__m512bh)decode(codes[0], j, tables), (__m512bh)decode(codes[1], j, tables)};
                for (int m = 0; m < M; m++) {
                    uint32_t pair;
                    std::memcpy(&pair, x + m * w.inputs + t * 8 + j * 2, 4);
                    const __m512bh inputs = (__m512bh)_mm512_set1_epi32(int(pair));
                    for (int b = 0; b < 2; b++) dot[m][b][j % C] = _mm512_dpbf16_ps(dot[m][b][j % C], weights[b], inputs);
                }
            }
        }
        for (int b = 0; b < 2; b++) {
            const __m512 scale = w.scale(block + b, g), zero = w.zero(block + b, g);
            for (int m = 0; m < M; m++) {
                const __m512 sum = _mm512_set1_ps(r.sums[(row + m) * w.groups() + g]);
                for (int c = 1; c < C; c++) dot[m][b][0] = _mm512_add_ps(dot[m][b][0], dot[m][b][c]);
                total[m][b] = _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, sum, dot[m][b][0]), total[m][b]);
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int b = 0; b < 2; b++) store(w, r, row + m, block + b, total[m][b]);
}

// All rows of two blocks, six at a time: as many sums as there are registers for.
void few_rows(const Weight& w, const Rows& r, long block, const Tables& tables) {
    long row = 0;
    for (; r.rows - row >= 6; row += 6) few<6>(w, r, row, block, tables);
    switch (r.rows - row) {
        case 1: return few<1>(w, r, row, block, tables);
        case 2: return few<2>(w, r, row, block, tables);
        case 3: return few<3>(w, r, row, block, tables);
        case 4: return few<4>(w, r, row, block, tables);
        case 5: return few<5>(w, r, row, block, tables);
    }
}

// Σ_k∈g x of one row, for every group.
void sum_groups(const Weight& w, const uint16_t* x, float* sums) {
    for (long g = 0; g < w.groups(); g++) {
        __m512 sum = _mm512_setzero_ps();
        for (long k = g * w.group; k < (g + 1) * w.group; k += 16) {
            const __mmask16 mask = (g + 1) * w.group - k >= 16 ? 0xFFFF : 0xFF;
            const __m256i raw = _mm256_maskz_loadu_epi16(mask, x + k);
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
        }
        sums[g] = _mm512_reduce_add_ps(sum);
    }
}

// One block of columns as rows of a bf16 matrix [columns, inputs].
void dequantize_block(const Weight& w, long block, uint16_t* out, const Tables& tables) {
    const long columns = std::min(COLUMNS, w.columns - block * COLUMNS);
    for (long t = 0; t < w.inputs / 8; t++) {
        const __m512 scale = w.scale(block, t * 8 / w.group), zero = w.zero(block, t * 8 / w.group);
        const __m512i codes = _mm512_loadu_si512(w.vectors(block) + t);
        alignas(64) uint32_t pairs[4][16];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_store_si512(pairs[j], decode_scaled(codes, j, scale, zero, tables));
        for (long c = 0; c < columns; c++) {
            const uint32_t eight[4] = {pairs[0][c], pairs[1][c], pairs[2][c], pairs[3][c]};
            std::memcpy(out + (block * COLUMNS + c) * w.inputs + t * 8, eight, 16);
        }
    }
}

// The vector of one block and eight inputs from the checkpoint's words [inputs, columns / 8], where column c of eight lies
// at bit 4 · {0, 4, 1, 5, 2, 6, 3, 7}[c]. The last block of an odd number of eights has one word, not two.
inline __m512i gather(const uint32_t* words, long stride, bool two, __m512i shifts) {
    __m512i vector = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512i low = _mm512_maskz_set1_epi32(0x00FF, int(words[i * stride]));
        const __m512i both = two ? _mm512_mask_set1_epi32(low, 0xFF00, int(words[i * stride + 1])) : low;
        const __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(both, shifts), _mm512_set1_epi32(15));
        vector = _mm512_or_si512(vector, _mm512_slli_epi32(codes, 4 * (i / 2) + 16 * (i % 2)));
    }
    return vector;
}

}  // namespace

// The checkpoint's qweight [inputs, columns / 8] -> codes as w4a16.h has them, padded columns 0.
extern "C" void awq_w4_arrange(const void* qweight, void* codes, long columns, long inputs, int threads) {
    const long stride = columns / 8, vectors = inputs / 8, strip = 16;  // vectors of a block that are written in one go
    const long blocks = (columns + 2 * COLUMNS - 1) / (2 * COLUMNS) * 2;
    const __m128i order = _mm_setr_epi8(0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28);
    const __m512i shifts = _mm512_cvtepu8_epi32(order);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < vectors; first += strip)
        for (long block = 0; block < blocks; block++)
            for (long t = first; t < std::min(first + strip, vectors); t++) {
                const uint32_t* words = (const uint32_t*)qweight + t * 8 * stride + 2 * block;
                const long here = stride - 2 * block;  // words that are left in the row
                const __m512i vector = here > 0 ? gather(words, stride, here > 1, shifts) : _mm512_setzero_si512();
                _mm512_storeu_si512((__m512i*)codes + block * vectors + t, vector);
            }
}

// x bf16 [rows, inputs] · Wᵀ -> y [rows, columns], bf16 or fp32. `inputs` and `group` are multiples of 8.
extern "C" void awq_w4a16(const void* codes, const void* scales, const void* zeros, const void* x, void* y, long rows,
                          long columns, long inputs, long group, int bf16_scales, int bf16_out, int threads) {
    const Weight w{(const __m512i*)codes, (const uint16_t*)scales, (const uint8_t*)zeros, columns, inputs, group,
                   bf16_scales != 0};
    const Memory<float> sums(rows * w.groups());
    Rows r{(const uint16_t*)x, nullptr, sums.data, y, bf16_out != 0, rows};
    bool amx = false;
#ifdef __AMX_BF16__
    amx = rows >= AMX_ROWS && group % STEP == 0 && amx_permitted();
    const Memory<uint16_t> tiles(amx ? padded(rows) * inputs : 0);
    r.tiles = tiles.data;
#endif
    const Tables tables;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long m = 0; m < rows; m++) sum_groups(w, r.x + m * inputs, sums.data + m * w.groups());
#ifdef __AMX_BF16__
        if (amx) {
#pragma omp for schedule(static)
            for (long m = 0; m < rows; m += TILE)
                pack_tiles(r.x + m * inputs, rows - m, inputs, tiles.data + m * inputs);
            bf16_out && rows >= group ? many_rows<true>(w, r, threads, tables) : many_rows<false>(w, r, threads, tables);
        }
#endif
        if (!amx) {
#pragma omp for schedule(static)
            for (long pair = 0; pair < w.pairs(); pair++) few_rows(w, r, 2 * pair, tables);
        }
    }
}

// W as bf16 [columns, inputs].
extern "C" void awq_w4_dequantize(const void* codes, const void* scales, const void* zeros, void* out, long columns,
                                  long inputs, long group, int bf16_scales, int threads) {
    const Weight w{(const __m512i*)codes, (const uint16_t*)scales, (const uint8_t*)zeros, columns, inputs, group,
                   bf16_scales != 0};
    const Tables tables;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long block = 0; block < (columns + COLUMNS - 1) / COLUMNS; block++)
        dequantize_block(w, block, (uint16_t*)out, tables);
}
