// SPDX-License-Identifier: BSD-3-Clause
// A filter in the Winograd domain without its zeros, as one array of 32-bit words:
//
//   header   16 words
//   starts   lists + 1: list i is the entries starts[i] .. starts[i + 1] - 1
//   rows     kFour for each list: its output channels (Pattern::unstructured)
//   entries  from a multiple of 16 words on
//
// A unit is a vector of output channels. Position xi of the domain comes first in both orders of the lists:
//
//   Pattern::unstructured   list (xi, block of kSumBlock input channels, kFour output channels): entry i is the i-th weight of each
//                           of them that is not zero, and apart from these kFour bytes for their channels in the block
//   Pattern::blocks         list (xi, unit): input channels, and apart from them a vector of values for each
//
// A list is as long as the longest of its four; the others end in zeros. So kSorted output channels are sorted by how many
// weights they have left before they are taken four by four.
//
// Any weight has both forms. In the second a vector is left out where all of its weights are zero, so it pays for weights
// that were pruned in blocks of 16 output channels (whole vectors in every instruction set).
#pragma once

#include <type_traits>

#include "../common/product.h"
#include "../common/simd.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

struct SparseHeader {
  int32_t magic, pattern, lanes, tile;
  int64_t out_channels, in_channels, entries;
  int32_t unused[6];
};
static_assert(sizeof(SparseHeader) == 64);
constexpr int32_t kSparseMagic = 0x50535731;
constexpr int64_t kFour = 4;
constexpr int64_t kSorted = 64;
static_assert(kSumBlock <= 256);  // a byte tells a channel of a block

// Where the parts lie, for reading (Word is const) and for writing.
template <typename Word>
struct SparseView {
  template <typename X>
  using Like = std::conditional_t<std::is_const_v<Word>, const X, X>;

  Word* words;
  int64_t positions, units, sum_blocks, lists;
  Pattern pattern;

  SparseView(Word* w, Pattern p, int64_t K, int64_t C, int tile)
      : words(w),
        positions(int64_t(tile + 2) * (tile + 2)),
        units(ceil_div<int64_t>(K, kLanes)),
        sum_blocks(ceil_div(C, kSumBlock)),
        lists(positions * (p == Pattern::blocks ? units : sum_blocks * ceil_div(K, kFour))),
        pattern(p) {}

  auto starts() const { return words + 16; }
  auto rows() const { return words + 16 + lists + 1; }
  int64_t head() const {
    return round_up<int64_t>(16 + lists + 1 + (pattern == Pattern::blocks ? 0 : kFour * lists), 16);
  }
  int64_t size(int64_t entries) const {
    return head() + (pattern == Pattern::blocks ? round_up<int64_t>(entries, 16) + entries * kLanes
                                                : round_up<int64_t>(entries * (kFour + 1), 16));
  }
  // Pattern::unstructured
  auto numbers() const { return reinterpret_cast<Like<float>*>(words + head()); }
  auto places(int64_t entries) const {
    return reinterpret_cast<Like<uint8_t>*>(words + head() + entries * kFour);
  }
  // Pattern::blocks
  auto channels() const { return words + head(); }
  auto values(int64_t entries) const {
    return reinterpret_cast<Like<float>*>(words + head() + round_up<int64_t>(entries, 16));
  }
};

}  // namespace
}  // namespace pywino::winograd
