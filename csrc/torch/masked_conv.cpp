// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels as torch ops: unpack, check, allocate, launch. Schemas, fakes and gradients are in pywino/ops/masked_conv.py,
// which also words the errors that a user can cause; the checks here only keep memory safe.
#include "core/masked_conv/masked_conv.h"

#include <algorithm>
#include <functional>
#include <tuple>

#include "core/winograd/winograd.h"

#include "tensor.h"

namespace pywino {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

std::tuple<Tensor, Tensor> masked_pixels(const Tensor& mask) {
  constexpr const char* op = "pywino::_masked_pixels";
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(), op,
                  ": mask must be contiguous and bool");
  const int64_t size = mask.numel();
  STD_TORCH_CHECK(size < (int64_t(1) << 31), op, ": the mask has too many pixels");
  const uint8_t* m = static_cast<const uint8_t*>(mask.const_data_ptr());
  Tensor list = empty_cpu({masked_conv::count(m, size)}, ScalarType::Int, false);
  Tensor place = empty_cpu({size}, ScalarType::Int, false);
  masked_conv::list_pixels(m, size, static_cast<int32_t*>(list.mutable_data_ptr()),
                           static_cast<int32_t*>(place.mutable_data_ptr()));
  return {list, place};
}

Tensor masked_pack(const Tensor& weight) {
  constexpr const char* op = "pywino::_masked_pack";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, op,
                  ": weight must be (K, C, height, width) without empty dimensions");
  const masked_conv::FilterParams p = {weight.const_data_ptr(), dtype_of(weight, op, "weight"),
                                       weight.size(0),          weight.size(1),
                                       weight.size(2),          weight.size(3),
                                       weight.stride(0),        weight.stride(1),
                                       weight.stride(2),        weight.stride(3)};
  Tensor packed = empty_cpu({masked_conv::filter_size(p)}, ScalarType::Float, false);
  masked_conv::pack(p, static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor masked_forward(const Tensor& input, const Tensor& list, const Tensor& place,
                      const Tensor& filter, const std::optional<Tensor>& bias, int64_t out_channels,
                      IntHeaderOnlyArrayRef kernel_size, IntHeaderOnlyArrayRef padding,
                      IntHeaderOnlyArrayRef dilation) {
  constexpr const char* op = "pywino::_masked_forward";
  check_dense(input, op, "input");
  check_pair(kernel_size, 1, op, "kernel_size");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  masked_conv::ForwardParams p;
  masked_conv::Geometry& g = p.geometry;
  g = {input.size(0),
       input.size(1),
       input.size(2),
       input.size(3),
       out_channels,
       kernel_size[0],
       kernel_size[1],
       padding[0],
       padding[1],
       dilation[0],
       dilation[1],
       is_channels_last(input),
       dtype_of(input, op, "input")};
  STD_TORCH_CHECK(list.scalar_type() == ScalarType::Int && list.is_contiguous() &&
                      place.scalar_type() == ScalarType::Int && place.is_contiguous() &&
                      place.numel() == g.n * g.h * g.w && list.numel() <= place.numel(),
                  op, ": the pixels are those of another mask");
  masked_conv::FilterParams f = {};
  f.out_channels = out_channels, f.in_channels = g.c;
  f.kernel_h = g.kernel_h, f.kernel_w = g.kernel_w;
  STD_TORCH_CHECK(out_channels >= 1 && filter.scalar_type() == ScalarType::Float &&
                      filter.is_contiguous() && filter.numel() == masked_conv::filter_size(f),
                  op, ": the filter was packed for another weight or another instruction set");
  check_bias(bias, out_channels, op);
  Tensor output = empty_cpu({g.n, g.out_channels, g.h, g.w}, input.scalar_type(), g.channels_last);
  const int64_t count = list.numel();
  Tensor rows = empty_cpu({g.channels_last ? 0 : count * g.c}, ScalarType::Float, false);
  p.pixels = {static_cast<const int32_t*>(list.const_data_ptr()),
              static_cast<const int32_t*>(place.const_data_ptr()), count};
  p.input = input.const_data_ptr();
  p.filter = static_cast<const float*>(filter.const_data_ptr());
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.rows = static_cast<float*>(rows.mutable_data_ptr());
  p.output = output.mutable_data_ptr();
  STD_TORCH_CHECK(masked_conv::forward(p, torch_threads()) == masked_conv::Status::ok, op,
                  ": out of memory for the scratch buffers");
  return output;
}

// --- by Winograd tiles ---
winograd::Geometry tile_geometry(int64_t n, int64_t c, int64_t h, int64_t w, int64_t out_channels,
                                 int64_t tile, IntHeaderOnlyArrayRef dilation, const char* op) {
  STD_TORCH_CHECK(winograd::tile_exists(int(tile)), op, ": tile must be 2, 4 or 6, got ", tile);
  check_pair(dilation, 1, op, "dilation");
  winograd::Geometry g = {};
  g.input = {n, c, h, w};
  g.out_channels = out_channels;
  g.pad_h = g.dil_h = dilation[0];
  g.pad_w = g.dil_w = dilation[1];
  g.tile = int(tile);
  return g;
}

// The tiles that a mask (N, 1, H, W) meets.
Tensor masked_tiles(const Tensor& mask, int64_t tile, IntHeaderOnlyArrayRef dilation) {
  constexpr const char* op = "pywino::_masked_tiles";
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() &&
                      mask.dim() == 4 && mask.size(1) == 1 && mask.numel() > 0,
                  op, ": mask must be (N, 1, H, W), contiguous and bool");
  const winograd::Geometry g =
      tile_geometry(mask.size(0), 1, mask.size(2), mask.size(3), 1, tile, dilation, op);
  const int64_t most = winograd::tile_count(g);
  STD_TORCH_CHECK(most < (int64_t(1) << 31), op, ": the mask has too many pixels");
  Tensor list = empty_cpu({most}, ScalarType::Int, false);
  const int64_t count = winograd::list_tiles(g, static_cast<const uint8_t*>(mask.const_data_ptr()),
                                             static_cast<int32_t*>(list.mutable_data_ptr()));
  return torch::stable::narrow(list, 0, 0, count);
}

Tensor masked_tiles_forward(const Tensor& input, const Tensor& mask, const Tensor& tiles,
                            const Tensor& filter, const std::optional<Tensor>& bias,
                            int64_t out_channels, int64_t tile, IntHeaderOnlyArrayRef dilation) {
  constexpr const char* op = "pywino::_masked_tiles_forward";
  check_dense(input, op, "input");
  winograd::ForwardParams p = {};
  winograd::Geometry& g = p.geometry;
  g = tile_geometry(input.size(0), input.size(1), input.size(2), input.size(3), out_channels, tile,
                    dilation, op);
  g.channels_last = is_channels_last(input);
  g.dtype = dtype_of(input, op, "input");
  const int32_t* list = static_cast<const int32_t*>(tiles.const_data_ptr());
  const int64_t count = tiles.numel();
  const bool rises = tiles.scalar_type() == ScalarType::Int && tiles.is_contiguous() && count > 0 &&
                     std::adjacent_find(list, list + count, std::greater_equal<>()) == list + count;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() &&
                      mask.numel() == g.input.n * g.input.h * g.input.w && rises && list[0] >= 0 &&
                      list[count - 1] < winograd::tile_count(g),
                  op, ": the tiles are those of another mask, or there are none");
  STD_TORCH_CHECK(
      out_channels >= 1 && filter.scalar_type() == ScalarType::Float && filter.is_contiguous() &&
          filter.numel() == winograd::filter_size(out_channels, g.input.c, g.tile, false),
      op, ": the filter was packed for another weight or another instruction set");
  check_bias(bias, out_channels, op);
  Tensor output = empty_cpu({g.input.n, out_channels, g.input.h, g.input.w}, input.scalar_type(),
                            g.channels_last);
  const winograd::Mask meets = {static_cast<const uint8_t*>(mask.const_data_ptr()), list, count};
  p.input = input.const_data_ptr();
  p.filter = static_cast<const float*>(filter.const_data_ptr());
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.output = output.mutable_data_ptr();
  p.mask = &meets;
  STD_TORCH_CHECK(winograd::forward(p, torch_threads()) == winograd::Status::ok, op,
                  ": out of memory for the scratch buffers");
  return output;
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, CPU, m) {
  m.impl("_masked_pixels", TORCH_BOX(&pywino::masked_pixels));
  m.impl("_masked_pack", TORCH_BOX(&pywino::masked_pack));
  m.impl("_masked_forward", TORCH_BOX(&pywino::masked_forward));
  m.impl("_masked_tiles", TORCH_BOX(&pywino::masked_tiles));
  m.impl("_masked_tiles_forward", TORCH_BOX(&pywino::masked_tiles_forward));
}
