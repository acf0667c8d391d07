// Many rows, with AMX: two blocks of columns are decoded once, span after span of inputs, then multiplied with 16 rows at
// a time. Two ways:
//
//   exact    a span lies within a group; s and z are applied to the fp32 products
//   rounded  weights are made whole, (q − z) · s rounded to bf16, as in any bf16 product; products stay in the tiles
//
// The first visits the products once a group and row, the second pays for every weight once: they cost the same at about
// as many rows as a group has inputs.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "w4a16.h"

namespace {

constexpr long TILE = 16;                       // rows of a tile; its columns are 16 fp32, or 32 bf16
constexpr long STEP = 32;                       // inputs one tile product covers
constexpr long SPAN = 16 * STEP;                // inputs decoded at a time, at most
constexpr long DECODED = SPAN * COLUMNS;        // bf16 of one decoded block
constexpr long TOTALS = 128 * 1024;             // fp32 of the totals a thread keeps at a time, about: 512 KB
constexpr long CACHED = 512 * 1024;             // bf16 of x that a core keeps in its cache: 1 MB

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The kernel hands out the large register state on request only; the answer holds for all threads of the process.
bool amx_permitted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return granted;
}

long padded(long rows) { return (rows + TILE - 1) / TILE * TILE; }

// x as tiles of 16 rows × 32 inputs, each 1 KB in one piece, missing rows zero: [rows / 16][inputs / 32][16][32]. Read
// in place, rows a power of two apart would all fall into a few sets of the cache.
void pack_tiles(const uint16_t* x, long rows, long inputs, uint16_t* out) {
    for (long k = 0; k < inputs; k += STEP)
        for (long m = 0; m < TILE; m++, out += STEP)
            _mm512_store_si512(out, m < rows ? _mm512_loadu_si512(x + m * inputs + k) : _mm512_setzero_si512());
}

template <bool Rounded>
void decode_span(const Weight& w, long block, long begin, long end, uint16_t* out, const Tables& tables) {
    for (long t = begin / 8; t < end / 8; t++) {
        const __m512i* at = w.vectors(block) + t;
        const __m512i codes = _mm512_loadu_si512(at);
        _mm_prefetch((const char*)(at + AHEAD), _MM_HINT_T0);
        __m512 scale = _mm512_setzero_ps(), zero = scale;
        if (Rounded) scale = w.scale(block, t * 8 / w.group), zero = w.zero(block, t * 8 / w.group);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, out += 32)
            _mm512_store_si512(out, Rounded ? decode_scaled(codes, j, scale, zero, tables) : decode(codes, j, tables));
    }
}

// One tile of rows times two decoded blocks, on top of what tiles 0 and 1 hold.
inline void multiply_span(const uint16_t* x, long span, const uint16_t* weights) {
    for (long k = 0; k < span; k += STEP, x += TILE * STEP, weights += COLUMNS * STEP) {
        _tile_loadd(2, x, 64);
        _tile_loadd(3, weights, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(4, weights + DECODED, 64);
        _tile_dpbf16ps(1, 2, 4);
    }
}

// totals += s · (product − z · Σx); the sum belongs to the whole group, so z waits for its last span.
void add_products(const Weight& w, const Rows& r, const float* product, float* totals, long row, long block, long g,
                  bool last) {
    const __m512 scale = w.scale(block, g), zero = w.zero(block, g);
    const long rows = std::min(TILE, r.rows - row);
    for (long m = 0; m < rows; m++, totals += 2 * COLUMNS) {
        __m512 value = _mm512_load_ps(product + m * COLUMNS);
        if (last) value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(r.sums[(row + m) * w.groups() + g]), value);
        _mm512_store_ps(totals, _mm512_fmadd_ps(scale, value, _mm512_load_ps(totals)));
    }
}

// All rows of two blocks, for the inputs of one span. totals [rows padded to 16][2][16].
template <bool Rounded>
void add_span(const Weight& w, const Rows& r, long block, long begin, long end, uint16_t* decoded, float* products,
              float* totals, const Tables& tables) {
    constexpr long WIDTH = 2 * COLUMNS * sizeof(float);
    for (long b = 0; b < 2; b++) decode_span<Rounded>(w, block + b, begin, end, decoded + b * DECODED, tables);
    for (long row = 0; row < r.rows; row += TILE, totals += TILE * 2 * COLUMNS) {
        const uint16_t* x = r.tiles + row * w.inputs + begin * TILE;
        if (Rounded) {
            _tile_loadd(0, totals, WIDTH);
            _tile_loadd(1, totals + COLUMNS, WIDTH);
            multiply_span(x, end - begin, decoded);
            _tile_stored(0, totals, WIDTH);
            _tile_stored(1, totals + COLUMNS, WIDTH);
        } else {
            const long g = begin / w.group;
            _tile_zero(0);
            _tile_zero(1);
            multiply_span(x, end - begin, decoded);
            _tile_stored(0, products, 64);
            _tile_stored(1, products + TILE * COLUMNS, 64);
            for (long b = 0; b < 2; b++)
                add_products(w, r, products + b * TILE * COLUMNS, totals + b * COLUMNS, row, block + b, g,
                             end == (g + 1) * w.group);
        }
    }
}

// The share of one thread of the team. Pair after pair of blocks, which reads weights in one piece; where x is too large
// for the cache, eight pairs go through a span together, while that part of x is there.
template <bool Rounded>
void many_rows(const Weight& w, const Rows& r, long threads, const Tables& tables) {
    const long size = padded(r.rows) * 2 * COLUMNS;
    const long most = padded(r.rows) * w.inputs <= CACHED ? 1 : 8;
    const long together = std::max(1L, std::min({most, TOTALS / size, w.pairs() / threads}));
    const Memory<float> totals(together * size), products(2 * TILE * COLUMNS);
    const Memory<uint16_t> decoded(2 * DECODED);
    const TileConfig config;
    _tile_loadconfig(&config);
#pragma omp for schedule(static)
    for (long first = 0; first < w.pairs(); first += together) {
        const long count = std::min(together, w.pairs() - first);
        std::memset(totals.data, 0, size_t(count * size) * sizeof(float));
        for (long begin = 0, end; begin < w.inputs; begin = end) {
            end = std::min(begin + SPAN, Rounded ? w.inputs : (begin / w.group + 1) * w.group);
            for (long pair = 0; pair < count; pair++)
                add_span<Rounded>(w, r, 2 * (first + pair), begin, end, decoded.data, products.data,
                                  totals.data + pair * size, tables);
        }
        for (long pair = 0; pair < count; pair++)
            for (long row = 0; row < r.rows; row++)
                for (long b = 0; b < 2; b++)
                    store(w, r, row, 2 * (first + pair) + b,
                          _mm512_load_ps(totals.data + pair * size + (row * 2 + b) * COLUMNS));
    }
    _tile_release();
}

}  // namespace
