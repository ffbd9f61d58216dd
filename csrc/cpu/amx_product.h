// Products of bfloat16 factors by AMX: a tile register has 16 rows of 64 bytes, and one instruction adds the product of
// 16 x 32 and 32 x 16 numbers to 16 x 16 sums. Subnormal operands and sums count as zero, as with AVX512_BF16.
// Included by product_kernel.cpp, whose `pack` it uses.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace lomo {
namespace {

// A block is what a tile register holds: 16 rows of 16 words. A word is a pair of tokens' numbers.
constexpr int kBlock = 16, kBlockWords = kBlock * kBlock;

// Tile registers 0 to 3 are sums, 4 and 5 rows of the product, 6 and 7 columns.
LOMO_FN void configure_tiles() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof config == 64, "the layout is the processor's");
  _tile_loadconfig(&config);
}

// Rows of words become columns.
LOMO_FN void transpose(uint32_t* block) {
  __m512i rows[16], halves[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(block + 16 * i);
  // Groups of 4 x 4 words, then groups of 128 bits among the rows.
  for (int i = 0; i < 16; i += 2) {
    halves[i] = _mm512_maskz_unpacklo_epi32(0xffff, rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_maskz_unpacklo_epi64(0xff, halves[i], halves[i + 2]);
    rows[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, halves[i], halves[i + 2]);
    rows[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, halves[i + 1], halves[i + 3]);
    rows[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, halves[i + 1], halves[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    halves[i] = _mm512_maskz_shuffle_i32x4(0xffff, rows[i], rows[i + 4], 0x88);
    halves[i + 4] = _mm512_maskz_shuffle_i32x4(0xffff, rows[i], rows[i + 4], 0xdd);
    halves[i + 8] = _mm512_maskz_shuffle_i32x4(0xffff, rows[i + 8], rows[i + 12], 0x88);
    halves[i + 12] = _mm512_maskz_shuffle_i32x4(0xffff, rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(block + 16 * i, _mm512_maskz_shuffle_i32x4(0xffff, halves[i], halves[i + 8], 0x88));
    _mm512_store_si512(block + 16 * (i + 4), _mm512_maskz_shuffle_i32x4(0xffff, halves[i + 4], halves[i + 12], 0x88));
    _mm512_store_si512(block + 16 * (i + 8), _mm512_maskz_shuffle_i32x4(0xffff, halves[i], halves[i + 8], 0xdd));
    _mm512_store_si512(block + 16 * (i + 12), _mm512_maskz_shuffle_i32x4(0xffff, halves[i + 4], halves[i + 12], 0xdd));
  }
}

// out[16 * kDown][16 * kAcross] = or += the product of kDown panels of a and kAcross panels of b. The compiler takes
// register numbers as constants only.
template <int kDown, int kAcross>
LOMO_FN void multiply(float* out, int64_t stride, const uint32_t* a, const uint32_t* b, int64_t steps, bool add) {
  const int64_t panel = kBlock * steps, row_bytes = stride * static_cast<int64_t>(sizeof(float));
  float *const right = out + kBlock, *const below = out + kBlock * stride, *const last = below + kBlock;
  if (add) {
    _tile_loadd(0, out, row_bytes);
    if constexpr (kAcross == 2) _tile_loadd(1, right, row_bytes);
    if constexpr (kDown == 2) _tile_loadd(2, below, row_bytes);
    if constexpr (kDown == 2 && kAcross == 2) _tile_loadd(3, last, row_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kAcross == 2) _tile_zero(1);
    if constexpr (kDown == 2) _tile_zero(2);
    if constexpr (kDown == 2 && kAcross == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s += kBlock, a += kBlockWords, b += kBlockWords) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kAcross == 2) {
      _tile_loadd(7, b + panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kDown == 2) {
      _tile_loadd(5, a + panel, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kAcross == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, row_bytes);
  if constexpr (kAcross == 2) _tile_stored(1, right, row_bytes);
  if constexpr (kDown == 2) _tile_stored(2, below, row_bytes);
  if constexpr (kDown == 2 && kAcross == 2) _tile_stored(3, last, row_bytes);
}

// The part [rows][columns] of a product of up to 32 x 32 elements.
LOMO_FN void multiply_part(float* out, int64_t stride, int64_t rows, int64_t columns, const uint32_t* a,
                           const uint32_t* b, int64_t steps, bool add) {
  const bool down = rows > kBlock, across = columns > kBlock;
  const bool whole = rows % kBlock == 0 && columns % kBlock == 0;
  alignas(64) float buffer[4 * kBlockWords];
  float* to = whole ? out : buffer;
  const int64_t length = whole ? stride : 2 * kBlock;
  const bool sum = whole && add;
  if (down && across) {
    multiply<2, 2>(to, length, a, b, steps, sum);
  } else if (down) {
    multiply<2, 1>(to, length, a, b, steps, sum);
  } else if (across) {
    multiply<1, 2>(to, length, a, b, steps, sum);
  } else {
    multiply<1, 1>(to, length, a, b, steps, sum);
  }
  if (whole) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float element = buffer[r * length + c];
      out[r * stride + c] = add ? out[r * stride + c] + element : element;
    }
  }
}

// `product` of kernels.h.
void product_by_tiles(float* out, int64_t stride, const Rows& a, const Rows& b, int64_t row, int64_t rows,
                      int64_t column, int64_t columns, bool add, uint32_t* scratch) {
  static_assert(kProductDepth % kBlock == 0 && kProductRows % kBlock == 0 && kProductColumns % kBlock == 0, "whole");
  uint32_t *const packed_a = scratch, *const packed_b = scratch + kProductDepth * kProductRows;
  configure_tiles();  // for every product: oneDNN has its own in the same thread
  int64_t token = 0;
  do {  // once even without tokens: the product is zero then
    const int64_t left = ((a.rows - token + 1) / 2 + kBlock - 1) / kBlock * kBlock;
    const int64_t steps = left < kProductDepth ? left : kProductDepth;
    pack<kBlock, BFloat16>(packed_a, a, token, steps, row, rows);
    pack<kBlock, BFloat16>(packed_b, b, token, steps, column, columns);
    // A register that holds rows of the product has a row's tokens one after the other.
    for (int64_t words = 0; words < (rows + kBlock - 1) / kBlock * kBlock * steps; words += kBlockWords) {
      transpose(packed_a + words);
    }
    for (int64_t j = 0; j < columns; j += 2 * kBlock) {
      for (int64_t i = 0; i < rows; i += 2 * kBlock) {
        multiply_part(out + (row + i) * stride + column + j, stride, rows - i < 2 * kBlock ? rows - i : 2 * kBlock,
                      columns - j < 2 * kBlock ? columns - j : 2 * kBlock, packed_a + i * steps, packed_b + j * steps,
                      steps, add);
      }
    }
    token += 2 * steps;
    add = true;
  } while (token < a.rows);
  _tile_release();
}

}  // namespace
}  // namespace lomo
