// SPDX-License-Identifier: BSD-3-Clause
// The three stages in order, over as many tiles at a time as the workspace holds. Host code alone: nothing here needs CUDA.
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

int forward(const Forward& f, void* stream) {
  const Geometry& g = f.geometry;
  const Tiles tiles = tiles_of(g);
  const Layout layout = layout_of(g, f.domain, f.chunk);
  char* const v = static_cast<char*>(f.workspace);
  char* const m = v + layout.v;
  float* const scale = reinterpret_cast<float*>(m + layout.m);

  InputTransform input{};
  input.tiles = tiles;
  input.map = map_of(g.input.n, g.input.c, g.input.h, g.input.w, g.channels_last);
  input.channels = padded(g.input.c);
  input.pad_h = int(g.pad_h);
  input.pad_w = int(g.pad_w);
  input.dtype = g.dtype;
  input.domain = f.domain;
  input.relu = f.winograd_relu;
  input.input = f.input;
  input.v = v;
  input.scale = scale;

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

  for (int64_t first = 0; first < tiles.count; first += f.chunk) {
    input.first = output.first = first;
    input.count = product.tiles = output.count = std::min(f.chunk, tiles.count - first);
    if (const int error = pywino_winograd_input_transform(&input, stream)) return error;
    if (const int error = pywino_winograd_product(&product, stream)) return error;
    if (const int error = pywino_winograd_output_transform(&output, stream)) return error;
  }
  return 0;
}

}  // namespace pywino::winograd::cuda
