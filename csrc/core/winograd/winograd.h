// SPDX-License-Identifier: BSD-3-Clause
// Winograd convolution F(m x m, 3 x 3), stride 1, on the CPU. Raw pointers, no torch. The maths is in docs/winograd.md.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A       d: a x a patch of the input, a = m + 2;  g: 3 x 3 filter;  Y: m x m outputs
#pragma once

#include <cstdint>

#include "../common/copies.h"
#include "../common/dtype.h"
#include "../common/executor.h"
#include "../common/isa.h"

namespace pywino::winograd {

enum class Status : int { ok, out_of_memory, unsupported };

// A 4-d tensor: (n, c, h, w), dense, either channels_last (c innermost) or not (w innermost).
struct Shape {
  int64_t n, c, h, w;
};

struct Geometry {
  Shape input;           // n, C, H, W
  int64_t out_channels;  // K
  int64_t pad_h, pad_w;  // >= 0
  int64_t dil_h, dil_w;  // >= 1
  int tile;              // m: 2, 4 or 6
  bool channels_last;    // of input and output
  DType dtype;           // of input and output; the arithmetic is fp32

  int64_t out_h() const { return input.h + 2 * pad_h - 2 * dil_h; }
  int64_t out_w() const { return input.w + 2 * pad_w - 2 * dil_w; }
};

struct FilterParams;

// Some of the pixels (core/masked_conv): input and output are zero at the others.
struct Mask {
  const uint8_t* pixels;  // (n, h, w), 0 or 1
  const int32_t* tiles;   // list_tiles()
  int64_t count;
};

// The state of a convolutional LSTM (core/conv_lstm), channels_last.
struct LstmState {
  const float* cell;  // or nullptr: zeros
  float *hidden, *next_cell;
};

struct ForwardParams {
  Geometry geometry;
  const void* input;
  const float* filter;   // from transform_filter or pack_filter, by the same instruction set
  const float* bias;     // K floats or nullptr
  const void* residual;  // like output, or nullptr: added before the ReLU
  void* output;          // (n, K, out_h, out_w)
  bool relu;             // on the output
  bool winograd_relu;    // on B^T d B (Liu et al., ICLR 2018)
  bool fast;             // products of bfloat16, summed in fp32; the filter must be packed so
  const int32_t* sparse_filter = nullptr;  // from sparse_filter: instead of `filter`
  // Instead of `filter`, where takes_weight(): a filter that is used once is never written as a whole. Of the input's dtype.
  const FilterParams* weight = nullptr;

  // Of dense filters and outputs of the input's size: tiles that the mask does not meet are not computed.
  const Mask* mask = nullptr;

  // Of fp32 tensors in channels_last and dense filters:
  float* mean = nullptr;         // K floats: of each channel of the output, of one image; any dtype
  const float* gate = nullptr;   // C floats: the input is relu(gate * input)
  const void* second = nullptr;  // the input's last channels, where they are a tensor of their own;
  int64_t second_channels = 0;   // these and those before them are a multiple of 16
  const LstmState* lstm = nullptr;  // in the output's place: its gates i, f, g, o are the K = 4 C'
                                    // outputs, C' a multiple of 16
};

// How a sparse filter is packed (sparse.h): without each zero, or without the vectors of output channels that are zero.
enum class Pattern : int { unstructured, blocks };

// Filters of K x C kernels, each (size x size), any strides in elements.
struct FilterParams {
  const void* weight;
  DType dtype;
  int64_t out_channels, in_channels;
  int64_t stride_k, stride_c, stride_h, stride_w;
  int tile;
  bool
      rotate;  // the filter of the input gradient: K and C change places, spatial kernels turn by 180 degrees
  bool spatial;   // 3 x 3 kernels, to be transformed; else a x a, already in the Winograd domain
  bool fast;      // for the products of ForwardParams::fast
  float* packed;  // filter_size() floats
  bool stream = false;  // set by the kernel: write past the caches
};

// dW = G^T [ sum over tiles (A dY A^T) . (B^T d B) ] G
struct WeightGradientParams {
  Geometry geometry;
  const void* input;
  const void* grad;    // (n, K, out_h, out_w)
  bool spatial;        // else no G: the weight itself is in the Winograd domain
  bool winograd_relu;  // ReLU on B^T d B
  float* gradient;     // (K, C, 3, 3), or (K, C, a, a)
};

// dX = sum over tiles B [ (U^T (A dY A^T)) . (B^T d B > 0) ] B^T, without the mask where there is no ReLU
struct DomainInputGradientParams {
  Geometry geometry;
  const void* input;  // for the mask
  const void* grad;
  bool winograd_relu;
  const float* filter;    // packed with `rotate`
  float* input_gradient;  // like input, but fp32
  // Instead of `filter`: unstructured, packed with `rotate`; or, where input_gradient_takes_weight(), a weight that is used once,
  // with `rotate`, of the input's dtype.
  const int32_t* sparse_filter = nullptr;
  const FilterParams* weight = nullptr;
};

// One set of these for each instruction set (common/isa.h), defined in cpu_forward.cpp and cpu_backward.cpp.
struct ForwardKernels {
  Status (*forward)(const ForwardParams&, const Executor&);
  bool (*takes_weight)(const Geometry&, bool fast, int threads);
  Status (*filter)(const FilterParams&, const Executor&);
  int64_t (*filter_size)(int64_t out_channels, int64_t in_channels, int tile, bool fast);
};
struct SparseKernels {
  Status (*forward)(const ForwardParams&, const Executor&);
  Status (*domain_input_gradient)(const DomainInputGradientParams&, const Executor&);
  int64_t (*size)(const FilterParams&, Pattern, const Executor&);
  Status (*pack)(const FilterParams&, Pattern, int32_t* packed, const Executor&);
  bool (*fits)(const int32_t* packed, int64_t words, int64_t out_channels, int64_t in_channels,
               int tile);
};
struct BackwardKernels {
  Status (*weight_gradient)(const WeightGradientParams&, const Executor&);
  Status (*domain_input_gradient)(const DomainInputGradientParams&, const Executor&);
  bool (*takes_weight)(const Geometry&, int threads);
};

PYWINO_API bool tile_exists(int tile);
// B^T (a x a), G (a x 3), A^T (m x a), row-major.
PYWINO_API void transform_matrices(int tile, double* bt, double* g, double* at);

PYWINO_API Status forward(const ForwardParams&, const Executor&);
// The numbers of the tiles, rising, that meet a mask (n, h, w) of the output's size; their count. `list` has room for
// tile_count() of them.
PYWINO_API int64_t tile_count(const Geometry&);
PYWINO_API int64_t list_tiles(const Geometry&, const uint8_t* mask, int32_t* list);
PYWINO_API bool takes_weight(const Geometry&, bool fast, int threads);
PYWINO_API Status filter(const FilterParams&, const Executor&);
PYWINO_API Status weight_gradient(const WeightGradientParams&, const Executor&);
PYWINO_API Status domain_input_gradient(const DomainInputGradientParams&, const Executor&);
PYWINO_API bool input_gradient_takes_weight(const Geometry&, int threads);
// A filter of the Winograd domain (`spatial`, `fast` and `packed` of the params are not read) without its zeros: its size in
// 32-bit words, its packing, and whether an array is such a filter of the instruction set in force.
PYWINO_API int64_t sparse_filter_size(const FilterParams&, Pattern, const Executor&);
PYWINO_API Status sparse_filter(const FilterParams&, Pattern, int32_t* packed, const Executor&);
PYWINO_API bool sparse_filter_fits(const int32_t* packed, int64_t words, int64_t out_channels,
                                   int64_t in_channels, int tile);
// Floats of a packed filter, in the instruction set in force; 0 where it has no such products.
PYWINO_API int64_t filter_size(int64_t out_channels, int64_t in_channels, int tile, bool fast);

}  // namespace pywino::winograd
