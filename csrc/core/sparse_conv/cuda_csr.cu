// SPDX-License-Identifier: BSD-3-Clause
// Convolution with a weight whose zeros lie anywhere, in fp32 on ordinary cores: the kept weights of each output channel are a
// list (CSR), and a warp has one output channel of 256 pixels.
//
//   a warp     32 entries at a time, each lane finds where one of them reads, then all go through the 32
//   a lane     pixels lane, lane + 32, ...: an entry is eight loads of neighbouring lanes' neighbouring numbers, eight FMAs
//
// Operations: 2 C K taps a pixel times the part of the weights that is kept. Each multiply-add loads its number from the first
// level cache, where a multiprocessor finds 32 a cycle and could multiply 128: at most a quarter of the fp32 peak, which a dense
// fp32 convolution comes close to. So more than three quarters of the weights must be zero before this can pay. Bytes: the
// input from memory once where the blocks that share its pixels run side by side (groups of output channels innermost).
#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "cuda.h"

namespace pywino::sparse_conv::cuda {
namespace {

constexpr int kCsrWarps = 8, kCsrPixels = 8;  // output channels of a block, pixels of a lane
constexpr int kCut = 128;                     // terms of a partial sum

struct alignas(8) CsrEntry {
  int offset;  // from a pixel's first number of the input
  float value;
};

__global__ void __launch_bounds__(32 * kCsrWarps) csr(Csr p) {
  __shared__ CsrEntry entries[kCsrWarps][32];
  const Geometry& g = p.geometry;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t groups = (g.out_channels + kCsrWarps - 1) / kCsrWarps;
  const int64_t k = blockIdx.x % groups * kCsrWarps + warp;
  if (k >= g.out_channels) return;
  const int out_w = int(g.out_w()), pixels = int(g.out_h()) * out_w;
  const int parts = (pixels + 32 * kCsrPixels - 1) / (32 * kCsrPixels);  // of an image
  const int64_t n = blockIdx.x / groups / parts;
  const int pixel0 = int(blockIdx.x / groups % parts) * 32 * kCsrPixels + lane;
  const int plane = int(g.h * g.w), row = int(g.w);
  const int taps = int(g.kernel_h * g.kernel_w), width = int(g.kernel_w);
  const float* image = p.input + n * g.c * plane;

  int corner[kCsrPixels];  // the first number of each receptive field; where there is no pixel, any
#pragma unroll
  for (int i = 0; i < kCsrPixels; ++i) {
    const int pixel = pixel0 + i * 32 < pixels ? pixel0 + i * 32 : 0;
    corner[i] = pixel / out_w * int(g.stride_h) * row + pixel % out_w * int(g.stride_w);
  }

  float sum[kCsrPixels] = {}, part[kCsrPixels] = {};
  const int begin = p.starts[k], end = p.starts[k + 1];
  for (int first = begin; first < end; first += 32) {
    if (first + lane < end) {
      const int entry = p.entries[first + lane], c = entry / taps, tap = entry % taps;
      const int offset = c * plane + tap / width * int(g.dil_h) * row + tap % width * int(g.dil_w);
      ptx::store(&entries[warp][lane], CsrEntry{offset, p.values[first + lane]});
    }
    __syncwarp();
    const int count = end - first < 32 ? end - first : 32;
#pragma unroll 2
    for (int e = 0; e < count; ++e) {
      const CsrEntry entry = ptx::load<CsrEntry>(&entries[warp][e]);
#pragma unroll
      for (int i = 0; i < kCsrPixels; ++i)
        part[i] = fmaf(entry.value, image[entry.offset + corner[i]], part[i]);
    }
    __syncwarp();  // before the next entries take their place
    if (end - first > 32 && (first + 32 - begin) % kCut != 0) continue;
#pragma unroll
    for (int i = 0; i < kCsrPixels; ++i) {
      sum[i] += part[i];
      part[i] = 0.f;
    }
  }

  const float bias = p.bias ? p.bias[k] : 0.f;
  float* to = p.output + (n * g.out_channels + k) * pixels + pixel0;
#pragma unroll
  for (int i = 0; i < kCsrPixels; ++i)
    if (pixel0 + i * 32 < pixels) to[i * 32] = sum[i] + bias;
}

}  // namespace

extern "C" int pywino_sparse_conv_csr(const Csr* p, void* stream) {
  const Geometry& g = p->geometry;
  const int64_t parts = (g.out_h() * g.out_w() + 32 * kCsrPixels - 1) / (32 * kCsrPixels);
  const int64_t blocks = g.n * parts * ((g.out_channels + kCsrWarps - 1) / kCsrWarps);
  PYWINO_LAUNCH((csr), dim3(unsigned(blocks)), dim3(32 * kCsrWarps), 0,
                static_cast<cudaStream_t>(stream), *p);
  return int(cudaGetLastError());
}

}  // namespace pywino::sparse_conv::cuda
