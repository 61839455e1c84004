// SPDX-License-Identifier: BSD-3-Clause
// Winograd convolution on NVIDIA GPUs, in three stages that meet in a workspace, and the direct convolution beside it.
// Raw device pointers and a stream, no torch; a C++ compiler without CUDA can read this file.
//
//   input transform   V[tap][tile][C']  = B^T d B          one warp (or several) a tile
//   product           M[tap][tile][K']  = V U^T            tensor cores, one product a tap
//   output transform  Y                 = A^T M A + bias + residual, ReLU
//
// Gradients meet there, too. Of the weight, D[tap][tile][K'] = A dY A^T and V are multiplied along the tiles,
//
//   summed product    S[split][tap][K'][C'] = sum over tiles D V
//   filter gradient   dW = G^T S G
//
// and of the input, with a weight in the Winograd domain, M[tap][tile][C'] = D U, then dX = sum over tiles B [M . (V > 0)] B^T.
//
// C' and K' are C and K rounded up to 16-byte rows, the rest zero.
#pragma once

#include <cstdint>

#include "winograd.h"

namespace pywino::winograd::cuda {

// The numbers in V, U and M.
//   f16   half precision with a power of two for each tile of V and each filter of U, so that both are at most 1 and no sum
//         of C products can overflow; summed in fp32. For 16-bit tensors, and fp32 ones where TF32 is allowed: its ten
//         mantissa bits are TF32's.
//   f32   single precision, products by 3xTF32: for fp32 tensors.
enum class Domain : int { f16, f32 };

// Where tiles lie. A convolution of dilation d is d x d interleaved ones (phases): output row o = d (m t + i) + phase is
// row i of tile row t. Tiles are numbered image by image, phase by phase, row by row.
struct Tiles {
  int size;                // m
  int phases_h, phases_w;  // min(d, output size): a phase beyond has no output
  int rows, columns;       // of tiles in one phase, the largest one
  int dil_h, dil_w;
  int64_t count;  // over the whole batch
};

// A dense 4-d tensor, strides in elements.
struct TensorMap {
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

struct InputTransform {
  Tiles tiles;
  TensorMap map;
  int64_t first, count;  // the tiles of this launch
  int64_t channels;      // C'
  int pad_h, pad_w;
  DType dtype;
  Domain domain;
  bool relu;      // on V: the Winograd-ReLU layer
  bool gradient;  // `input` is the output's gradient, V is D = A dY A^T; pad_h and pad_w are 0
  const void* input;
  void* v;
  float* scale;  // count powers of two that undo the tiles' scaling; unused by Domain::f32
  // max |input| of each channel: then the powers are of channels, not of tiles, over which the weight gradient sums.
  const float* peaks;
  const float*
      gate;  // C numbers: what is transformed is relu(gate input); or nullptr. Of one image
};

struct Product {
  int64_t tiles, channels, out_channels;  // count, C', K'
  int taps;
  Domain domain;
  const void* v;
  const void* u;
  void* m;
};

// What a product leaves out: Product::u has the kept numbers alone, in the domain's element type, and `places` says where.
//
//   blocks   kBlockChannels input channels of one tap and a group of output channels: u[block][group][kBlockChannels], zeros in
//            what sticks out. places: for each tap and group its first block, the number of all, then for each block which
//            channels (c / kBlockChannels)
//   2:4      two of four neighbouring input channels (../common/sparse_gemm.cuh), K' rounded up to kOutChannels and C' to
//            kStep: u[tap][step][K'][kStep / 2]. places: metadata[tap][step][K' / 16][32]
constexpr int kBlockChannels = 32;
constexpr int kStep = 64, kOutChannels = 128;
struct Zeros {
  int group;  // 64 or 128 output channels of a block, 0: 2:4
  const int32_t* places;
};

// S[split][tap] (+)= D^T V over the tiles of each split. Splits are equal parts of a launch's tiles.
struct SummedProduct {
  int64_t tiles, channels, out_channels;  // count, C', K'
  int taps, splits;
  Domain domain;
  bool accumulate;  // add to S, which an earlier launch has written
  const void* d;
  const void* v;
  float* s;
};

struct OutputTransform {
  Tiles tiles;
  TensorMap map;  // of the output
  int64_t first, count;
  int64_t channels;  // K'
  DType dtype;
  Domain domain;
  bool relu;
  const void* m;
  const float* tile_scale;    // of InputTransform
  const float* filter_scale;  // K powers of two
  const float* bias;          // K, or nullptr
  const void* residual;       // like the output, or nullptr
  void* output;
  float*
      partial;  // sum_parts() x K: sums of the output over a block's tiles, of one image; or nullptr
};

// dW = G^T S G of the sum over all splits.
struct FilterGradient {
  int64_t out_channels, in_channels, padded_out, padded_in;  // K, C, K', C'
  int tile, splits;
  DType dtype;
  bool spatial;  // else S itself: the weight is in the Winograd domain
  const float* s;
  const float* grad_peaks;  // what D and V were scaled by, nullptr for Domain::f32
  const float* input_peaks;
  void* gradient;  // K x C kernels, dense
};

// dX += B [ M . (B^T d B > 0) ] B^T, without the mask where V goes through no ReLU. Patches of neighbouring tiles overlap by two rows and columns, so a launch has every
// other tile of every other row, four launches have all of them, and a pixel's sum has a fixed order.
struct InputGradient {
  Tiles tiles;
  TensorMap map;  // of the input
  int64_t first, count;
  int64_t channels;  // C'
  int pad_h, pad_w;
  DType dtype;
  Domain domain;
  int row, column;    // 0 or 1: which tiles, by the last bit of their row and column
  const void* input;  // for the mask, nullptr: none
  const void* m;
  const float* tile_scale;    // of InputTransform, with `gradient`
  const float* filter_scale;  // C powers of two
  float* gradient;            // like the input, in fp32
};

// U[tap][K'][C'] from K x C kernels of any strides. For the direct kernel (tile 1) the taps are the nine of the kernel
// itself, in the element type that its products have.
struct FilterTransform {
  const void* weight;
  DType dtype;
  int64_t out_channels, in_channels;               // of U: after the exchange where `rotate`
  int64_t stride_k, stride_c, stride_h, stride_w;  // of the weight, k and c after the exchange
  int64_t padded_out, padded_in;                   // K', C'
  int tile;                                        // m, or 1: no transform
  bool rotate;                                     // turn spatial kernels by 180 degrees
  bool spatial;   // 3 x 3 kernels; else a x a, already in the Winograd domain
  DType element;  // f16: scaled by filter; f32; bf16 for the direct kernel alone
  void* u;
  float* scale;  // K, or nullptr: no scaling
};

// mean[c] of partial sums [part][c], in the order of the parts' shares.
struct Means {
  int64_t parts, channels, pixels;
  const float* partial;
  float* mean;
};

// y = act(conv(x, w) + bias + residual), stride 1, 3 x 3, as one product over the nine taps. channels_last tensors whose
// rows of C elements are multiples of 16 bytes.
struct Direct {
  int64_t n, h, w, c, out_h, out_w, k;
  int64_t padded_out;  // K'
  int pad_h, pad_w, dil_h, dil_w;
  DType dtype;
  bool strict;  // fp32: 3xTF32 instead of TF32
  bool relu;
  const void* input;
  const void* u;  // [9][K'][C], FilterTransform with tile 1
  const float* bias;
  const void* residual;
  void* output;
  // Of one image, or nullptr each:
  const float* gate;  // C numbers: what is convolved is relu(gate input)
  float* mean;        // K: of the output's channels
  float* partial;     // direct_parts() x K
  // Where next_cell is there, one step of a convolutional LSTM of K / 4 channels, an even number: the output's channels are the
  // gates i, f, g, o of the first channel, then those of the second ... (so are U's rows and the bias), and what is written is
  // h' to `output` and c'.
  const void* second;  // h, second_c channels behind those of the input, or nullptr
  int64_t second_c;    // multiples of 16 bytes
  const void* cell;    // c, or nullptr for zeros
  void* next_cell;     // c'
};

inline bool has_tile(int64_t tile) { return tile == 2 || tile == 4 || tile == 6; }
// Rows of V, U and M are whole 16-byte chunks.
inline int64_t padded(int64_t channels) { return (channels + 7) / 8 * 8; }
inline int64_t element_size(Domain domain) { return domain == Domain::f16 ? 2 : 4; }

PYWINO_API Tiles tiles_of(const Geometry&);
// Bytes of workspace for `count` tiles: V or M of C', M or D of K', and tiles' scales; the gradients' are alike.
PYWINO_API int64_t workspace_bytes(const Geometry&, Domain, int64_t count);
// Tiles that a launch takes at once so that the workspace stays within `limit` bytes; 0 where not even the least one fits.
PYWINO_API int64_t tiles_within(const Geometry&, Domain, int64_t limit);

struct Forward {
  Geometry geometry;
  Domain domain;
  bool relu, winograd_relu;
  const void* input;
  const void* filter;         // U
  const float* filter_scale;  // Domain::f16
  const float* bias;
  const void* residual;
  void* output;
  void* workspace;
  int64_t chunk;      // tiles_within()
  const float* gate;  // as Direct's
  float* mean;
  float* partial;  // mean_floats()
};

struct WeightGradient {
  Geometry geometry;
  Domain domain;
  bool spatial, winograd_relu;
  const void* input;
  const void* grad;          // in the input's memory format
  const float* input_peaks;  // max |x| of each channel, Domain::f16
  const float* grad_peaks;
  void* gradient;
  float* sums;  // sum_floats(): beside the workspace
  void* workspace;
  int64_t chunk;
};

// Of a weight in the Winograd domain, with ReLU on V or without.
struct DomainInputGradient {
  Geometry geometry;
  Domain domain;
  bool winograd_relu;
  const void* input;
  const void* grad;           // in the input's memory format
  const void* filter;         // U, made with `rotate`
  const float* filter_scale;  // Domain::f16
  float* gradient;            // like the input, in fp32, all zero
  void* workspace;
  int64_t chunk;
};

// Parts into which the weight gradient's sum is cut where there are few channels, and the floats of their sums.
PYWINO_API int64_t splits_of(const Geometry&, Domain);
PYWINO_API int64_t sum_floats(const Geometry&, Domain);

// The means of the output take a float for each block and channel: blocks of a launch, of the direct convolution, and at most
// so many floats in all launches of a call.
PYWINO_API int64_t sum_parts(const OutputTransform&);
inline int64_t direct_parts(int64_t pixels) { return (pixels + 127) / 128; }
PYWINO_API int64_t mean_floats(const Geometry&, int64_t chunk);

// Each returns a cudaError_t, 0 where the launch went well.
// zeros: of the filter, nullptr for a dense one.
PYWINO_API int forward(const Forward&, void* stream, const Zeros* zeros = nullptr);
PYWINO_API int weight_gradient(const WeightGradient&, void* stream);
PYWINO_API int domain_input_gradient(const DomainInputGradient&, void* stream);
extern "C" {
PYWINO_API int pywino_winograd_input_transform(const InputTransform*, void* stream);
// The same of NCHW tensors, which these two are called for.
int pywino_winograd_input_transform_nchw(const InputTransform*, void* stream);
int pywino_winograd_output_transform_nchw(const OutputTransform*, void* stream);
PYWINO_API int pywino_winograd_product(const Product*, void* stream);
// The same in the f16 domain by wgmma and TMA, where this library has it: pywino_winograd_product calls it.
int pywino_winograd_product_sm90(const Product*, void* stream);
// Why the current device's products have no wgmma, or nullptr where the large ones of the f16 domain have.
PYWINO_API const char* pywino_winograd_why_no_wgmma();
// For the process: tests and benches hold one kind against the other.
PYWINO_API void pywino_winograd_allow_wgmma(bool allowed);
PYWINO_API int pywino_winograd_sparse_product(const Product*, const Zeros*, void* stream);
PYWINO_API int pywino_winograd_summed_product(const SummedProduct*, void* stream);
PYWINO_API int pywino_winograd_filter_gradient(const FilterGradient*, void* stream);
PYWINO_API int pywino_winograd_input_gradient(const InputGradient*, void* stream);
PYWINO_API int pywino_winograd_output_transform(const OutputTransform*, void* stream);
PYWINO_API int pywino_winograd_filter_transform(const FilterTransform*, void* stream);
PYWINO_API int pywino_winograd_means(const Means*, void* stream);
PYWINO_API int pywino_winograd_direct(const Direct*, void* stream);
PYWINO_API const char* pywino_cuda_error(int error);
// The newest CUDA that the driver runs (0: there is no driver), and the one in this library: 13000 is 13.0.
PYWINO_API int pywino_cuda_versions(int* driver, int* library);
}

}  // namespace pywino::winograd::cuda
