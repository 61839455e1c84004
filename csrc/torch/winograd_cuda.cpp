// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels as torch ops: unpack, check, allocate, launch on the current stream of the tensors' device. No CUDA header:
// this file compiles, and the library loads, on a machine without a GPU. pywino/ops/_winograd_cuda.py has schemas and fakes.
#include <algorithm>
#include <array>
#include <tuple>

#include "core/winograd/cuda.h"
#include "launch.h"

namespace pywino {
namespace {

namespace cuda = winograd::cuda;

winograd::Geometry geometry_of(const Tensor& input, int64_t out_channels, int64_t tile,
                               IntArray padding, IntArray dilation, const char* op) {
  check_dense(input, op, "input");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  winograd::Geometry g;
  g.input = {input.size(0), input.size(1), input.size(2), input.size(3)};
  g.out_channels = out_channels;
  g.pad_h = padding[0];
  g.pad_w = padding[1];
  g.dil_h = dilation[0];
  g.dil_w = dilation[1];
  g.tile = int(tile);
  g.channels_last = is_channels_last(input);
  g.dtype = dtype_of(input, op, "input");
  STD_TORCH_CHECK(
      g.input.n > 0 && g.input.c > 0 && out_channels > 0 && g.out_h() > 0 && g.out_w() > 0, op,
      ": the call is empty");
  return g;
}

// Tiles of a launch within the limit.
int64_t chunk_of(const winograd::Geometry& g, cuda::Domain domain, int64_t workspace_limit,
                 const char* op) {
  const int64_t chunk = cuda::tiles_within(g, domain, workspace_limit);
  const int64_t least =
      cuda::workspace_bytes(g, domain, std::min<int64_t>(128, cuda::tiles_of(g).count));
  STD_TORCH_CHECK(chunk > 0, op, ": workspace_limit must be at least ", least,
                  " bytes for this call, got ", workspace_limit,
                  "; raise it, or take another algorithm");
  return chunk;
}

Tensor workspace_of(const Tensor& like, const winograd::Geometry& g, cuda::Domain domain,
                    int64_t chunk) {
  return empty_like(like, {cuda::workspace_bytes(g, domain, chunk)}, ScalarType::Byte, false);
}

// Checks a filter; what it leaves out, where it has no zeros: then `places` says where its numbers lie (cuda::Zeros), of blocks
// in one dimension, of 2:4 in four. What it says of them is not checked: it is on the device.
std::optional<cuda::Zeros> check_filter(const Tensor& input, const Tensor& filter,
                                        const Tensor& scale, const std::optional<Tensor>& places,
                                        int64_t taps, int64_t out_channels, int64_t in_channels,
                                        bool strict, const char* op) {
  check_same_device(input, filter, op, "filter");
  check_same_device(input, scale, op, "scale");
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
  std::optional<cuda::Zeros> zeros;
  int64_t numbers = taps * cuda::padded(out_channels) * cuda::padded(in_channels);
  bool fits = true;
  if (places) {
    check_same_device(input, *places, op, "places");
    zeros.emplace();
    zeros->places = static_cast<const int32_t*>(places->const_data_ptr());
    fits = places->scalar_type() == ScalarType::Int && places->is_contiguous();
    if (places->dim() == 1) {
      const int64_t group = filter.dim() == 3 ? filter.size(1) : 0;
      fits &= (group == 64 || group == 128) && filter.size(2) == cuda::kBlockChannels &&
              places->numel() == taps * up(out_channels, group) + 1 + filter.size(0);
      zeros->group = int(group);
      numbers = filter.numel();
    } else {
      const int64_t rows = up(out_channels, cuda::kOutChannels) * cuda::kOutChannels;
      const int64_t steps = taps * up(in_channels, cuda::kStep);
      numbers = steps * rows * (cuda::kStep / 2);
      fits &= !strict && places->numel() == steps * rows * 2;
      zeros->group = 0;
    }
  }
  STD_TORCH_CHECK(fits && filter.scalar_type() == (strict ? ScalarType::Float : ScalarType::Half) &&
                      filter.is_contiguous() && filter.numel() == numbers &&
                      scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
                      scale.numel() == out_channels,
                  op,
                  ": the filter was made for other channels, another tile or another precision");
  return zeros;
}

// Dense in a memory format, one number a pixel and one pixel an image being dense in both.
bool has_format(const Tensor& t, bool channels_last) {
  const bool both = t.size(1) == 1 || t.size(2) * t.size(3) == 1;
  return channels_last ? is_channels_last(t) || (both && t.is_contiguous()) : t.is_contiguous();
}

// The output's gradient: of the output's size, in the input's dtype and memory format.
winograd::Geometry gradient_geometry(const Tensor& grad, const Tensor& input, int64_t tile,
                                     IntArray padding, IntArray dilation, const char* op) {
  STD_TORCH_CHECK(cuda::has_tile(tile), op, ": tile must be 2, 4 or 6, got ", tile);
  STD_TORCH_CHECK(grad.dim() == 4, op, ": grad must have four dimensions, got ", grad.dim());
  const winograd::Geometry g = geometry_of(input, grad.size(1), tile, padding, dilation, op);
  STD_TORCH_CHECK(grad.size(0) == g.input.n && grad.size(2) == g.out_h() &&
                      grad.size(3) == g.out_w() && grad.scalar_type() == input.scalar_type(),
                  op, ": grad must be of the output's size and input's dtype");
  STD_TORCH_CHECK(has_format(grad, g.channels_last), op, ": grad must have input's memory format");
  check_same_device(input, grad, op, "grad");
  return g;
}

// bias and residual as the kernels read them, alive as long as the launch.
struct Epilogue {
  std::optional<Tensor> bias;
  const float* bias_data = nullptr;
  const void* residual_data = nullptr;

  Epilogue(const Tensor& output, const std::optional<Tensor>& bias_,
           const std::optional<Tensor>& residual, const char* op) {
    if (bias_) {
      STD_TORCH_CHECK(bias_->dim() == 1 && bias_->numel() == output.size(1), op, ": bias must be ",
                      output.size(1), " numbers");
      check_same_device(output, *bias_, op, "bias");
      bias = torch::stable::contiguous(bias_->scalar_type() == ScalarType::Float
                                           ? *bias_
                                           : torch::stable::to(*bias_, ScalarType::Float));
      bias_data = static_cast<const float*>(bias->const_data_ptr());
    }
    if (residual) {
      STD_TORCH_CHECK(residual->scalar_type() == output.scalar_type() && residual->dim() == 4, op,
                      ": residual must be like the output");
      check_same_device(output, *residual, op, "residual");
      for (int d = 0; d < 4; ++d)
        STD_TORCH_CHECK(residual->size(d) == output.size(d) &&
                            (output.size(d) == 1 || residual->stride(d) == output.stride(d)),
                        op, ": residual must have the output's size and strides");
      residual_data = residual->const_data_ptr();
    }
  }
};

// U[tap][K'][C'] and a power of two for each filter (all ones where the domain has no scales). tile 1: the nine taps
// themselves, in the weight's dtype, for the direct kernel.
std::tuple<Tensor, Tensor> filter(const Tensor& weight, int64_t tile, bool strict, bool rotate,
                                  bool spatial) {
  constexpr const char* op = "pywino::_winograd_cuda_filter";
  STD_TORCH_CHECK(tile == 1 || cuda::has_tile(tile), op, ": tile must be 1, 2, 4 or 6, got ", tile);
  const int64_t size = tile == 1 || spatial ? 3 : tile + 2;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == size && weight.size(3) == size, op,
                  ": weight must be (K, C, ", size, ", ", size, ")");
  const Launch launch(weight, op, cuda::pywino_cuda_error);
  cuda::FilterTransform p{};
  p.weight = weight.const_data_ptr();
  p.dtype = dtype_of(weight, op, "weight");
  p.out_channels = weight.size(rotate ? 1 : 0);
  p.in_channels = weight.size(rotate ? 0 : 1);
  p.stride_k = weight.stride(rotate ? 1 : 0);
  p.stride_c = weight.stride(rotate ? 0 : 1);
  p.stride_h = weight.stride(2);
  p.stride_w = weight.stride(3);
  p.padded_out = cuda::padded(p.out_channels);
  p.padded_in = tile == 1 ? p.in_channels : cuda::padded(p.in_channels);
  p.tile = int(tile);
  p.rotate = rotate;
  p.spatial = spatial;
  p.element = tile == 1 ? p.dtype : strict ? DType::f32 : DType::f16;
  const int64_t taps = tile == 1 ? 9 : (tile + 2) * (tile + 2);
  const ScalarType element = tile == 1 ? weight.scalar_type()
                             : strict  ? ScalarType::Float
                                       : ScalarType::Half;
  Tensor u = empty_like(weight, {taps, p.padded_out, p.padded_in}, element, false);
  Tensor scale =
      torch::stable::fill_(empty_like(weight, {p.out_channels}, ScalarType::Float, false), 1.0);
  p.u = u.mutable_data_ptr();
  p.scale = tile == 1 || strict ? nullptr : static_cast<float*>(scale.mutable_data_ptr());
  launch.check(cuda::pywino_winograd_filter_transform(&p, launch.stream()));
  return {u, scale};
}

Tensor partial_of(const Tensor& like, int64_t floats) {
  return empty_like(like, {floats}, ScalarType::Float, false);
}

// Of one image: a gate for the input's channels, and the means of the output's.
struct Extras {
  const float* gate = nullptr;
  float* mean = nullptr;
};

Tensor staged(const Tensor& input, const Tensor& filter, const Tensor& scale,
              const std::optional<Tensor>& places, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, int64_t out_channels, int64_t tile,
              IntArray padding, IntArray dilation, bool relu, bool winograd_relu, bool strict,
              int64_t workspace_limit, const Extras& extras, const char* op) {
  STD_TORCH_CHECK(cuda::has_tile(tile), op, ": tile must be 2, 4 or 6, got ", tile);
  cuda::Forward p{};
  p.geometry = geometry_of(input, out_channels, tile, padding, dilation, op);
  const winograd::Geometry& g = p.geometry;
  p.domain = strict ? cuda::Domain::f32 : cuda::Domain::f16;
  const auto zeros = check_filter(input, filter, scale, places, (tile + 2) * (tile + 2),
                                  out_channels, g.input.c, strict, op);
  p.chunk = chunk_of(g, p.domain, workspace_limit, op);
  const Launch launch(input, op, cuda::pywino_cuda_error);
  Tensor workspace = workspace_of(input, g, p.domain, p.chunk);
  Tensor output = empty_like(input, {g.input.n, out_channels, g.out_h(), g.out_w()},
                             input.scalar_type(), g.channels_last);
  const Epilogue epilogue(output, bias, residual, op);
  p.relu = relu;
  p.winograd_relu = winograd_relu;
  p.input = input.const_data_ptr();
  p.filter = filter.const_data_ptr();
  p.filter_scale = static_cast<const float*>(scale.const_data_ptr());
  p.bias = epilogue.bias_data;
  p.residual = epilogue.residual_data;
  p.output = output.mutable_data_ptr();
  p.workspace = workspace.mutable_data_ptr();
  Tensor partial = partial_of(input, extras.mean ? cuda::mean_floats(g, p.chunk) : 0);
  p.gate = extras.gate;
  p.mean = extras.mean;
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  launch.check(cuda::forward(p, launch.stream(), zeros ? &*zeros : nullptr));
  return output;
}

Tensor forward(const Tensor& input, const Tensor& filter, const Tensor& scale,
               const std::optional<Tensor>& places, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, int64_t out_channels, int64_t tile,
               IntArray padding, IntArray dilation, bool relu, bool winograd_relu, bool strict,
               int64_t workspace_limit) {
  return staged(input, filter, scale, places, bias, residual, out_channels, tile, padding, dilation,
                relu, winograd_relu, strict, workspace_limit, {}, "pywino::_winograd_cuda_forward");
}

// dW. grad_peaks and input_peaks, the largest magnitude of each channel, where the domain is fp16.
Tensor backward_weight(const Tensor& grad, const Tensor& input,
                       const std::optional<Tensor>& grad_peaks,
                       const std::optional<Tensor>& input_peaks, int64_t tile, IntArray padding,
                       IntArray dilation, bool spatial, bool winograd_relu, bool strict,
                       int64_t workspace_limit) {
  constexpr const char* op = "pywino::_winograd_cuda_backward_weight";
  cuda::WeightGradient p{};
  p.geometry = gradient_geometry(grad, input, tile, padding, dilation, op);
  const winograd::Geometry& g = p.geometry;
  p.domain = strict ? cuda::Domain::f32 : cuda::Domain::f16;
  const auto peaks = [&](const std::optional<Tensor>& t, int64_t channels) -> const float* {
    if (strict) return nullptr;
    STD_TORCH_CHECK(
        t && t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == channels,
        op, ": the peaks must be a float32 number for each channel");
    check_same_device(input, *t, op, "the peaks");
    return static_cast<const float*>(t->const_data_ptr());
  };
  p.grad_peaks = peaks(grad_peaks, g.out_channels);
  p.input_peaks = peaks(input_peaks, g.input.c);
  p.chunk = chunk_of(g, p.domain, workspace_limit, op);
  const Launch launch(input, op, cuda::pywino_cuda_error);
  Tensor workspace = workspace_of(input, g, p.domain, p.chunk);
  Tensor sums = empty_like(input, {cuda::sum_floats(g, p.domain)}, ScalarType::Float, false);
  const int64_t size = spatial ? 3 : tile + 2;
  Tensor gradient =
      empty_like(input, {g.out_channels, g.input.c, size, size}, input.scalar_type(), false);
  p.spatial = spatial;
  p.winograd_relu = winograd_relu;
  p.input = input.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.gradient = gradient.mutable_data_ptr();
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  launch.check(cuda::weight_gradient(p, launch.stream()));
  return gradient;
}

// dX of a weight in the Winograd domain, with a filter made with `rotate`.
Tensor domain_backward_input(const Tensor& grad, const Tensor& input, const Tensor& filter,
                             const Tensor& scale, int64_t tile, IntArray padding, IntArray dilation,
                             bool winograd_relu, bool strict, int64_t workspace_limit) {
  constexpr const char* op = "pywino::_winograd_cuda_domain_backward_input";
  cuda::DomainInputGradient p{};
  p.geometry = gradient_geometry(grad, input, tile, padding, dilation, op);
  const winograd::Geometry& g = p.geometry;
  p.domain = strict ? cuda::Domain::f32 : cuda::Domain::f16;
  p.winograd_relu = winograd_relu;
  check_filter(input, filter, scale, std::nullopt, (tile + 2) * (tile + 2), g.input.c,
               g.out_channels, strict, op);
  p.chunk = chunk_of(g, p.domain, workspace_limit, op);
  const Launch launch(input, op, cuda::pywino_cuda_error);
  Tensor workspace = workspace_of(input, g, p.domain, p.chunk);
  Tensor gradient = empty_like(input, {g.input.n, g.input.c, g.input.h, g.input.w},
                               ScalarType::Float, g.channels_last);
  torch::stable::zero_(gradient);
  p.input = input.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.filter = filter.const_data_ptr();
  p.filter_scale = static_cast<const float*>(scale.const_data_ptr());
  p.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  launch.check(cuda::domain_input_gradient(p, launch.stream()));
  return input.scalar_type() == ScalarType::Float
             ? gradient
             : torch::stable::to(gradient, input.scalar_type());
}

// A tensor whose pixels the direct kernel reads in whole 16 bytes.
void check_pixels(const Tensor& t, const char* op, const char* name) {
  const bool dense = t.is_contiguous() && (t.size(1) == 1 || t.size(2) * t.size(3) == 1);
  STD_TORCH_CHECK(is_channels_last(t) || dense, op, ": ", name, " must be channels_last");
  const int64_t bytes = t.size(1) * int64_t(t.element_size());
  STD_TORCH_CHECK(bytes % 16 == 0, op, ": a pixel's channels must be a multiple of 16 bytes, got ",
                  bytes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op, ": ", name,
                  " must begin at a multiple of 16 bytes; clone it");
}

// What a direct convolution reads. Of `more` channels behind the input's, the caller says where they are.
cuda::Direct direct_params(const Tensor& input, int64_t more, const Tensor& filter,
                           int64_t out_channels, IntArray padding, IntArray dilation, bool strict,
                           const char* op) {
  const winograd::Geometry g = geometry_of(input, out_channels, 2, padding, dilation, op);
  check_pixels(input, op, "input");
  STD_TORCH_CHECK(g.input.n * g.input.h * g.input.w < (int64_t(1) << 31) &&
                      g.input.n * g.out_h() * g.out_w() < (int64_t(1) << 31),
                  op, ": input and output must have less than 2^31 pixels");
  STD_TORCH_CHECK(filter.scalar_type() == input.scalar_type() && filter.is_contiguous() &&
                      filter.numel() == 9 * cuda::padded(out_channels) * (g.input.c + more),
                  op, ": the filter was made for other channels, another dtype or an algorithm");
  check_same_device(input, filter, op, "filter");
  cuda::Direct p{};
  p.n = g.input.n;
  p.h = g.input.h;
  p.w = g.input.w;
  p.c = g.input.c;
  p.out_h = g.out_h();
  p.out_w = g.out_w();
  p.k = out_channels;
  p.padded_out = cuda::padded(out_channels);
  p.pad_h = int(g.pad_h);
  p.pad_w = int(g.pad_w);
  p.dil_h = int(g.dil_h);
  p.dil_w = int(g.dil_w);
  p.dtype = g.dtype;
  p.strict = strict;
  p.input = input.const_data_ptr();
  p.u = filter.const_data_ptr();
  return p;
}

Tensor run_direct(const Tensor& input, const Tensor& filter, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, int64_t out_channels, IntArray padding,
                  IntArray dilation, bool relu, bool strict, const Extras& extras, const char* op) {
  cuda::Direct p = direct_params(input, 0, filter, out_channels, padding, dilation, strict, op);
  const Launch launch(input, op, cuda::pywino_cuda_error);
  Tensor output =
      empty_like(input, {p.n, out_channels, p.out_h, p.out_w}, input.scalar_type(), true);
  const Epilogue epilogue(output, bias, residual, op);
  p.relu = relu;
  p.bias = epilogue.bias_data;
  p.residual = epilogue.residual_data;
  p.output = output.mutable_data_ptr();
  const int64_t parts = extras.mean ? cuda::direct_parts(p.n * p.out_h * p.out_w) : 0;
  Tensor partial = partial_of(input, parts * out_channels);
  p.gate = extras.gate;
  p.mean = extras.mean;
  p.partial = extras.mean ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  launch.check(cuda::pywino_winograd_direct(&p, launch.stream()));
  return output;
}

// (h', c') of a convolutional LSTM with 3 x 3 kernels. The filter and the bias have a channel's four gates side by side.
std::tuple<Tensor, Tensor> conv_lstm(const Tensor& input, const std::optional<Tensor>& hidden,
                                     const std::optional<Tensor>& cell, const Tensor& filter,
                                     const std::optional<Tensor>& bias, int64_t channels,
                                     bool strict) {
  constexpr const char* op = "pywino::_winograd_cuda_conv_lstm";
  STD_TORCH_CHECK(channels > 0 && channels % 2 == 0, op, ": channels must be even, got ", channels);
  const std::array<int64_t, 2> one = {1, 1};
  cuda::Direct p =
      direct_params(input, hidden ? channels : 0, filter, 4 * channels, one, one, strict, op);
  for (const std::optional<Tensor>* state : {&hidden, &cell})
    if (*state) {
      const Tensor& t = **state;
      STD_TORCH_CHECK(t.scalar_type() == input.scalar_type() && t.dim() == 4 && t.size(0) == p.n &&
                          t.size(1) == channels && t.size(2) == p.h && t.size(3) == p.w,
                      op, ": hidden and cell must be (N, ", channels, ", H, W) in input's dtype");
      check_pixels(t, op, "hidden and cell");
      check_same_device(input, t, op, "hidden and cell");
    }
  check_bias(bias, 4 * channels, op);
  if (bias) check_same_device(input, *bias, op, "bias");
  const Launch launch(input, op, cuda::pywino_cuda_error);
  const auto empty_state = [&] {
    return empty_like(input, {p.n, channels, p.h, p.w}, input.scalar_type(), true);
  };
  Tensor next_hidden = empty_state(), next_cell = empty_state();
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.second = hidden ? hidden->const_data_ptr() : nullptr;
  p.second_c = hidden ? channels : 0;
  p.cell = cell ? cell->const_data_ptr() : nullptr;
  p.output = next_hidden.mutable_data_ptr();
  p.next_cell = next_cell.mutable_data_ptr();
  launch.check(cuda::pywino_winograd_direct(&p, launch.stream()));
  return {next_hidden, next_cell};
}

Tensor direct(const Tensor& input, const Tensor& filter, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, int64_t out_channels, IntArray padding,
              IntArray dilation, bool relu, bool strict) {
  return run_direct(input, filter, bias, residual, out_channels, padding, dilation, relu, strict,
                    {}, "pywino::_winograd_cuda_direct");
}

// conv of one image, or of relu(gate input), and the means of its output's channels. tile 1: the direct kernel.
std::tuple<Tensor, Tensor> forward_mean(const Tensor& input, const std::optional<Tensor>& gate,
                                        const Tensor& filter, const Tensor& scale,
                                        const std::optional<Tensor>& bias, int64_t out_channels,
                                        int64_t tile, IntArray padding, IntArray dilation,
                                        bool strict, int64_t workspace_limit) {
  constexpr const char* op = "pywino::_winograd_cuda_forward_mean";
  STD_TORCH_CHECK(input.dim() == 4 && input.size(0) == 1 && out_channels >= 1, op,
                  ": input must be one image");
  if (gate) {
    STD_TORCH_CHECK(gate->scalar_type() == ScalarType::Float && gate->is_contiguous() &&
                        gate->numel() == input.size(1),
                    op, ": gate must be a float32 number for each channel of the input");
    check_same_device(input, *gate, op, "gate");
  }
  Tensor mean = empty_like(input, {1, out_channels}, ScalarType::Float, false);
  const Extras extras{gate ? static_cast<const float*>(gate->const_data_ptr()) : nullptr,
                      static_cast<float*>(mean.mutable_data_ptr())};
  if (tile == 1)
    return {run_direct(input, filter, bias, std::nullopt, out_channels, padding, dilation, false,
                       strict, extras, op),
            mean};
  return {staged(input, filter, scale, std::nullopt, bias, std::nullopt, out_channels, tile,
                 padding, dilation, false, false, strict, workspace_limit, extras, op),
          mean};
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, PYWINO_CUDA_KEY, m) {
  m.impl("_winograd_cuda_filter", TORCH_BOX(&pywino::filter));
  m.impl("_winograd_cuda_forward", TORCH_BOX(&pywino::forward));
  m.impl("_winograd_cuda_backward_weight", TORCH_BOX(&pywino::backward_weight));
  m.impl("_winograd_cuda_domain_backward_input", TORCH_BOX(&pywino::domain_backward_input));
  m.impl("_winograd_cuda_forward_mean", TORCH_BOX(&pywino::forward_mean));
  m.impl("_winograd_cuda_conv_lstm", TORCH_BOX(&pywino::conv_lstm));
  m.impl("_winograd_cuda_direct", TORCH_BOX(&pywino::direct));
}
