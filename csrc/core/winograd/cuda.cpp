// SPDX-License-Identifier: BSD-3-Clause
// The stages in order, forward and of the gradients, over as many tiles at a time as the workspace holds. Host code alone: nothing here needs CUDA.
#include "cuda.h"

#include <algorithm>

namespace pywino::winograd::cuda {
namespace {

constexpr int64_t kAlign = 256;  // of each array in the workspace
// A launch takes whole multiples of the product's rows, so that no block but the last one is partly empty.
constexpr int64_t kLeastTiles = 128;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct Layout {
  int64_t v, m, scale;  // bytes
};

Layout layout_of(const Geometry& g, Domain domain, int64_t count) {
  const int64_t taps = int64_t(g.tile + 2) * (g.tile + 2), size = element_size(domain);
  return {aligned(taps * count * padded(g.input.c) * size),
          aligned(taps * count * padded(g.out_channels) * size),
          domain == Domain::f16 ? aligned(count * int64_t(sizeof(float))) : 0};
}

TensorMap map_of(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return {n, c, h, w, h * w * c, 1, w * c, c};
  return {n, c, h, w, c * h * w, h * w, w, 1};
}

}  // namespace

Tiles tiles_of(const Geometry& g) {
  const auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Tiles t;
  t.size = g.tile;
  t.dil_h = int(g.dil_h);
  t.dil_w = int(g.dil_w);
  t.phases_h = int(std::min(g.dil_h, g.out_h()));
  t.phases_w = int(std::min(g.dil_w, g.out_w()));
  t.rows = int(divided(divided(g.out_h(), g.dil_h), g.tile));
  t.columns = int(divided(divided(g.out_w(), g.dil_w), g.tile));
  t.count = g.input.n * t.phases_h * t.phases_w * t.rows * t.columns;
  return t;
}

int64_t workspace_bytes(const Geometry& g, Domain domain, int64_t count) {
  const Layout layout = layout_of(g, domain, count);
  return layout.v + layout.m + layout.scale;
}

int64_t tiles_within(const Geometry& g, Domain domain, int64_t limit) {
  const int64_t count = tiles_of(g).count, all = (count + kLeastTiles - 1) / kLeastTiles;
  int64_t low = 0, high = all;  // in multiples of kLeastTiles: the largest that fits
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (workspace_bytes(g, domain, std::min(count, middle * kLeastTiles)) <= limit)
      low = middle;
    else
      high = middle - 1;
  }
  // Launches of equal size.
  return low == 0 ? 0
                  : std::min(count, ((all + (all + low - 1) / low - 1) / ((all + low - 1) / low)) *
                                        kLeastTiles);
}

int64_t splits_of(const Geometry& g, Domain domain) {
  constexpr int64_t kBlocks = 512;  // of 128 x 128, that keep every multiprocessor busy
  const auto blocks = [](int64_t channels) { return (channels + 127) / 128; };
  const int64_t taps = int64_t(g.tile + 2) * (g.tile + 2);
  const int64_t at_hand = taps * blocks(g.input.c) * blocks(g.out_channels);
  const int64_t steps = tiles_of(g).count / (domain == Domain::f16 ? 128 : 64);  // of some length
  return std::max<int64_t>(1, std::min(kBlocks / at_hand, steps));
}

int64_t sum_floats(const Geometry& g, Domain domain) {
  return splits_of(g, domain) * (g.tile + 2) * (g.tile + 2) * padded(g.out_channels) *
         padded(g.input.c);
}

int64_t mean_floats(const Geometry& g, int64_t chunk) {
  // A block has 256 channels at most of a tile, or several tiles.
  const int64_t least = std::max<int64_t>(1, 256 / g.out_channels), count = tiles_of(g).count;
  const int64_t launches = (count + chunk - 1) / chunk;
  return launches * ((chunk + least - 1) / least) * g.out_channels;
}

namespace {

// V of the input.
InputTransform input_transform_of(const Geometry& g, Domain domain, const void* input, void* v) {
  InputTransform p{};
  p.tiles = tiles_of(g);
  p.map = map_of(g.input.n, g.input.c, g.input.h, g.input.w, g.channels_last);
  p.channels = padded(g.input.c);
  p.pad_h = int(g.pad_h);
  p.pad_w = int(g.pad_w);
  p.dtype = g.dtype;
  p.domain = domain;
  p.input = input;
  p.v = v;
  return p;
}

// D of the output's gradient.
InputTransform grad_transform_of(const Geometry& g, Domain domain, const void* grad, void* d) {
  InputTransform p = input_transform_of(g, domain, grad, d);
  p.map = map_of(g.input.n, g.out_channels, g.out_h(), g.out_w(), g.channels_last);
  p.channels = padded(g.out_channels);
  p.pad_h = p.pad_w = 0;
  p.gradient = true;
  return p;
}

}  // namespace

int forward(const Forward& f, void* stream, const Zeros* zeros) {
  const Geometry& g = f.geometry;
  const Layout layout = layout_of(g, f.domain, f.chunk);
  char* const v = static_cast<char*>(f.workspace);
  char* const m = v + layout.v;
  float* const scale = reinterpret_cast<float*>(m + layout.m);

  InputTransform input = input_transform_of(g, f.domain, f.input, v);
  input.relu = f.winograd_relu;
  input.scale = scale;
  input.gate = f.gate;
  const Tiles& tiles = input.tiles;

  Product product{};
  product.channels = input.channels;
  product.out_channels = padded(g.out_channels);
  product.taps = (g.tile + 2) * (g.tile + 2);
  product.domain = f.domain;
  product.v = v;
  product.u = f.filter;
  product.m = m;

  OutputTransform output{};
  output.tiles = tiles;
  output.map = map_of(g.input.n, g.out_channels, g.out_h(), g.out_w(), g.channels_last);
  output.channels = product.out_channels;
  output.dtype = g.dtype;
  output.domain = f.domain;
  output.relu = f.relu;
  output.m = m;
  output.tile_scale = scale;
  output.filter_scale = f.filter_scale;
  output.bias = f.bias;
  output.residual = f.residual;
  output.output = f.output;

  Means means{0, g.out_channels, g.out_h() * g.out_w(), f.partial, f.mean};
  for (int64_t first = 0; first < tiles.count; first += f.chunk) {
    input.first = output.first = first;
    input.count = product.tiles = output.count = std::min(f.chunk, tiles.count - first);
    if (f.mean) {
      output.partial = f.partial + means.parts * means.channels;
      means.parts += sum_parts(output);
    }
    if (const int error = pywino_winograd_input_transform(&input, stream)) return error;
    if (const int error = zeros ? pywino_winograd_sparse_product(&product, zeros, stream)
                                : pywino_winograd_product(&product, stream))
      return error;
    if (const int error = pywino_winograd_output_transform(&output, stream)) return error;
  }
  return f.mean ? pywino_winograd_means(&means, stream) : 0;
}

int weight_gradient(const WeightGradient& f, void* stream) {
  const Geometry& g = f.geometry;
  char* const v = static_cast<char*>(f.workspace);
  char* const d = v + layout_of(g, f.domain, f.chunk).v;

  InputTransform input = input_transform_of(g, f.domain, f.input, v);
  input.relu = f.winograd_relu;
  input.peaks = f.input_peaks;
  InputTransform grad = grad_transform_of(g, f.domain, f.grad, d);
  grad.peaks = f.grad_peaks;

  SummedProduct product{};
  product.channels = input.channels;
  product.out_channels = grad.channels;
  product.taps = (g.tile + 2) * (g.tile + 2);
  product.splits = int(splits_of(g, f.domain));
  product.domain = f.domain;
  product.d = d;
  product.v = v;
  product.s = f.sums;

  const int64_t count = input.tiles.count;
  for (int64_t first = 0; first < count; first += f.chunk) {
    input.first = grad.first = first;
    input.count = grad.count = product.tiles = std::min(f.chunk, count - first);
    product.accumulate = first > 0;
    if (const int error = pywino_winograd_input_transform(&grad, stream)) return error;
    if (const int error = pywino_winograd_input_transform(&input, stream)) return error;
    if (const int error = pywino_winograd_summed_product(&product, stream)) return error;
  }

  FilterGradient filter{};
  filter.out_channels = g.out_channels;
  filter.in_channels = g.input.c;
  filter.padded_out = product.out_channels;
  filter.padded_in = product.channels;
  filter.tile = g.tile;
  filter.splits = product.splits;
  filter.dtype = g.dtype;
  filter.spatial = f.spatial;
  filter.s = f.sums;
  filter.grad_peaks = f.grad_peaks;
  filter.input_peaks = f.input_peaks;
  filter.gradient = f.gradient;
  return pywino_winograd_filter_gradient(&filter, stream);
}

int domain_input_gradient(const DomainInputGradient& f, void* stream) {
  const Geometry& g = f.geometry;
  const Layout layout = layout_of(g, f.domain, f.chunk);
  char* const m = static_cast<char*>(f.workspace);  // of C', where forward has V
  char* const d = m + layout.v;
  float* const scale = reinterpret_cast<float*>(d + layout.m);

  InputTransform grad = grad_transform_of(g, f.domain, f.grad, d);
  grad.scale = scale;

  Product product{};
  product.channels = grad.channels;
  product.out_channels = padded(g.input.c);
  product.taps = (g.tile + 2) * (g.tile + 2);
  product.domain = f.domain;
  product.v = d;
  product.u = f.filter;
  product.m = m;

  InputGradient output{};
  output.tiles = grad.tiles;
  output.map = map_of(g.input.n, g.input.c, g.input.h, g.input.w, g.channels_last);
  output.channels = product.out_channels;
  output.pad_h = int(g.pad_h);
  output.pad_w = int(g.pad_w);
  output.dtype = g.dtype;
  output.domain = f.domain;
  output.input = f.winograd_relu ? f.input : nullptr;
  output.m = m;
  output.tile_scale = scale;
  output.filter_scale = f.filter_scale;
  output.gradient = f.gradient;

  const int64_t count = grad.tiles.count;
  for (int64_t first = 0; first < count; first += f.chunk) {
    grad.first = output.first = first;
    grad.count = product.tiles = output.count = std::min(f.chunk, count - first);
    if (const int error = pywino_winograd_input_transform(&grad, stream)) return error;
    if (const int error = pywino_winograd_product(&product, stream)) return error;
    for (int part = 0; part < 4; ++part) {
      output.row = part / 2;
      output.column = part % 2;
      if (const int error = pywino_winograd_input_gradient(&output, stream)) return error;
    }
  }
  return 0;
}

}  // namespace pywino::winograd::cuda
