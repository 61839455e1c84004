// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels as torch ops: unpack, check, allocate, launch. Schemas, fakes and gradients are in pywino/ops/winograd.py,
// which also words the errors that a user can cause; the checks here only keep memory safe.
#include "core/winograd/winograd.h"

#include <array>
#include <tuple>

#include "tensor.h"

namespace pywino {
namespace {

using winograd::Status;

void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::out_of_memory, op, ": out of memory for the scratch buffers");
  STD_TORCH_CHECK(status == Status::ok, op, ": no such kernel in this build");
}

void check_fast(bool fast, int64_t filter_floats, const char* op) {
  STD_TORCH_CHECK(!fast || filter_floats > 0, op,
                  ": precision=\"fast\" needs a CPU with AVX512-BF16");
}

winograd::Geometry geometry_of(const Tensor& input, int64_t out_channels, int64_t tile,
                               torch::headeronly::IntHeaderOnlyArrayRef padding,
                               torch::headeronly::IntHeaderOnlyArrayRef dilation, const char* op) {
  check_dense(input, op, "input");
  STD_TORCH_CHECK(winograd::tile_exists(int(tile)), op, ": tile must be 2, 4 or 6, got ", tile);
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
  STD_TORCH_CHECK(g.out_h() > 0 && g.out_w() > 0, op, ": the output would be empty");
  return g;
}

winograd::FilterParams filter_params(const Tensor& weight, int64_t tile, bool rotate, bool spatial,
                                     bool fast, const char* op) {
  STD_TORCH_CHECK(winograd::tile_exists(int(tile)), op, ": tile must be 2, 4 or 6, got ", tile);
  const int64_t size = spatial ? 3 : tile + 2;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == size && weight.size(3) == size, op,
                  ": weight must be (K, C, ", size, ", ", size, ")");
  winograd::FilterParams p;
  p.weight = weight.const_data_ptr();
  p.dtype = dtype_of(weight, op, "weight");
  p.out_channels = weight.size(0);
  p.in_channels = weight.size(1);
  p.stride_k = weight.stride(0);
  p.stride_c = weight.stride(1);
  p.stride_h = weight.stride(2);
  p.stride_w = weight.stride(3);
  p.tile = int(tile);
  p.rotate = rotate;
  p.spatial = spatial;
  p.fast = fast;
  p.packed = nullptr;
  return p;
}

Tensor make_filter(const Tensor& weight, int64_t tile, bool rotate, bool spatial, bool fast,
                   const char* op) {
  winograd::FilterParams p = filter_params(weight, tile, rotate, spatial, fast, op);
  const int64_t floats = rotate
                             ? winograd::filter_size(p.in_channels, p.out_channels, p.tile, fast)
                             : winograd::filter_size(p.out_channels, p.in_channels, p.tile, fast);
  check_fast(fast, floats, op);
  Tensor packed = empty_cpu({floats}, ScalarType::Float, false);
  p.packed = static_cast<float*>(packed.mutable_data_ptr());
  check_status(winograd::filter(p, torch_threads()), op);
  return packed;
}

Tensor winograd_filter(const Tensor& weight, int64_t tile, bool rotate, bool fast) {
  return make_filter(weight, tile, rotate, true, fast, "pywino::_winograd_filter");
}

Tensor winograd_pack(const Tensor& weight, int64_t tile, bool rotate) {
  return make_filter(weight, tile, rotate, false, false, "pywino::_winograd_pack");
}

Tensor winograd_sparse_pack(const Tensor& weight, int64_t tile, bool rotate, bool blocks) {
  constexpr const char* op = "pywino::_winograd_sparse_pack";
  const winograd::FilterParams p = filter_params(weight, tile, rotate, false, false, op);
  const auto pattern = blocks ? winograd::Pattern::blocks : winograd::Pattern::unstructured;
  const int64_t words = winograd::sparse_filter_size(p, pattern, torch_threads());
  STD_TORCH_CHECK(words >= 0, op, ": the weight has too many entries, or memory has run out");
  Tensor packed = empty_cpu({words}, ScalarType::Int, false);
  check_status(winograd::sparse_filter(p, pattern, static_cast<int32_t*>(packed.mutable_data_ptr()),
                                       torch_threads()),
               op);
  return packed;
}

Tensor to_float(const Tensor& t) {
  return torch::stable::contiguous(
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

// What few callers ask for.
struct Extras {
  std::optional<Tensor> output;  // to be written; else a new one is
  const float* gate = nullptr;   // ForwardParams::gate and ::mean
  float* mean = nullptr;
  const winograd::FilterParams* weight = nullptr;  // ForwardParams::weight: there is no filter
};

bool has_size(const Tensor& t, const std::array<int64_t, 4>& size) {
  for (int d = 0; d < 4; ++d)
    if (t.size(d) != size[d]) return false;
  return true;
}

// A filter is dense or, as an int32 tensor, without its zeros.
void check_filter(const Tensor& filter, int64_t out_channels, int64_t in_channels, int tile,
                  bool fast, const char* op) {
  const bool fits =
      filter.scalar_type() == ScalarType::Int
          ? winograd::sparse_filter_fits(static_cast<const int32_t*>(filter.const_data_ptr()),
                                         filter.numel(), out_channels, in_channels, tile)
          : filter.scalar_type() == ScalarType::Float &&
                filter.numel() == winograd::filter_size(out_channels, in_channels, tile, fast);
  STD_TORCH_CHECK(
      filter.is_contiguous() && fits, op,
      ": the filter was packed for other channels, another tile or another instruction set");
}

Tensor forward(const Tensor& input, const Tensor& filter, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, int64_t out_channels, int64_t tile,
               torch::headeronly::IntHeaderOnlyArrayRef padding,
               torch::headeronly::IntHeaderOnlyArrayRef dilation, bool relu, bool winograd_relu,
               bool fast, const Extras& extras, const char* op) {
  winograd::ForwardParams p;
  p.geometry = geometry_of(input, out_channels, tile, padding, dilation, op);
  const winograd::Geometry& g = p.geometry;
  if (!extras.weight) {
    check_fast(fast, filter.numel(), op);
    check_filter(filter, out_channels, g.input.c, g.tile, fast, op);
    if (filter.scalar_type() == ScalarType::Int)
      p.sparse_filter = static_cast<const int32_t*>(filter.const_data_ptr());
    else
      p.filter = static_cast<const float*>(filter.const_data_ptr());
  }
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == out_channels), op,
                  ": bias must be ", out_channels, " numbers");
  const std::optional<Tensor> bias32 = bias ? std::optional(to_float(*bias)) : std::nullopt;
  const std::array<int64_t, 4> size = {g.input.n, out_channels, g.out_h(), g.out_w()};
  STD_TORCH_CHECK(!extras.output || (extras.output->scalar_type() == input.scalar_type() &&
                                     extras.output->dim() == 4 && has_size(*extras.output, size) &&
                                     is_channels_last(*extras.output) == g.channels_last &&
                                     (g.channels_last || extras.output->is_contiguous())),
                  op, ": output must have the output's size and input's dtype and layout");
  Tensor output =
      extras.output ? *extras.output : empty_cpu(size, input.scalar_type(), g.channels_last);
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == input.scalar_type() && residual->dim() == 4, op,
                    ": residual must be like the output");
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(residual->size(d) == output.size(d) &&
                          (output.size(d) == 1 || residual->stride(d) == output.stride(d)),
                      op, ": residual must have the output's size and strides");
  }
  p.input = input.const_data_ptr();
  p.weight = extras.weight;
  p.bias = bias ? static_cast<const float*>(bias32->const_data_ptr()) : nullptr;
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.relu = relu;
  p.winograd_relu = winograd_relu;
  p.fast = fast;
  p.gate = extras.gate;
  p.mean = extras.mean;
  check_status(winograd::forward(p, torch_threads()), op);
  return output;
}

Tensor winograd_forward(const Tensor& input, const Tensor& filter,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                        int64_t out_channels, int64_t tile,
                        torch::headeronly::IntHeaderOnlyArrayRef padding,
                        torch::headeronly::IntHeaderOnlyArrayRef dilation, bool relu,
                        bool winograd_relu, bool fast) {
  return forward(input, filter, bias, residual, out_channels, tile, padding, dilation, relu,
                 winograd_relu, fast, {}, "pywino::_winograd_forward");
}

// The same with a filter that is used once.
Tensor winograd_convolve(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                         int64_t tile, torch::headeronly::IntHeaderOnlyArrayRef padding,
                         torch::headeronly::IntHeaderOnlyArrayRef dilation, bool relu,
                         bool winograd_relu, bool rotate, bool fast) {
  constexpr const char* op = "pywino::_winograd_convolve";
  const bool spatial = weight.dim() == 4 && weight.size(3) == 3;  // else of the Winograd domain
  const winograd::FilterParams p = filter_params(weight, tile, rotate, spatial, fast, op);
  const int64_t out_channels = rotate ? p.in_channels : p.out_channels;
  const winograd::Geometry g = geometry_of(input, out_channels, tile, padding, dilation, op);
  STD_TORCH_CHECK(p.dtype == g.dtype && g.input.c == (rotate ? p.out_channels : p.in_channels), op,
                  ": weight must have input's dtype and channels");
  Extras extras;
  if (winograd::takes_weight(g, fast, torch_threads().threads)) extras.weight = &p;
  const Tensor filter =
      extras.weight ? input : make_filter(weight, tile, rotate, spatial, fast, op);
  return forward(input, filter, bias, residual, out_channels, tile, padding, dilation, relu,
                 winograd_relu, fast, extras, op);
}

// The same of one image, and the means of the output's channels, which take no pass of their own. With a gate the input is
// relu(gate * input).
std::tuple<Tensor, Tensor> forward_mean(const std::optional<Tensor>& output, const Tensor& input,
                                        const std::optional<Tensor>& gate, const Tensor& filter,
                                        const std::optional<Tensor>& bias, int64_t out_channels,
                                        int64_t tile,
                                        torch::headeronly::IntHeaderOnlyArrayRef padding,
                                        torch::headeronly::IntHeaderOnlyArrayRef dilation,
                                        bool fast, const char* op) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(0) == 1 && is_channels_last(input) &&
                      filter.scalar_type() == ScalarType::Float && out_channels >= 1,
                  op, ": input must be one image in channels_last, and the filter dense");
  STD_TORCH_CHECK(!gate || (input.scalar_type() == ScalarType::Float &&
                            gate->scalar_type() == ScalarType::Float && gate->is_contiguous() &&
                            gate->numel() == input.size(1)),
                  op, ": gate must be a number for each channel, of an input in float32");
  Tensor mean = empty_cpu({1, out_channels}, ScalarType::Float, false);
  const Extras extras{output, gate ? static_cast<const float*>(gate->const_data_ptr()) : nullptr,
                      static_cast<float*>(mean.mutable_data_ptr()), nullptr};
  return {forward(input, filter, bias, std::nullopt, out_channels, tile, padding, dilation, false,
                  false, fast, extras, op),
          mean};
}

std::tuple<Tensor, Tensor> winograd_forward_mean(
    const Tensor& input, const std::optional<Tensor>& gate, const Tensor& filter,
    const std::optional<Tensor>& bias, int64_t out_channels, int64_t tile,
    torch::headeronly::IntHeaderOnlyArrayRef padding,
    torch::headeronly::IntHeaderOnlyArrayRef dilation, bool fast) {
  return forward_mean(std::nullopt, input, gate, filter, bias, out_channels, tile, padding,
                      dilation, fast, "pywino::_winograd_forward_mean");
}

Tensor winograd_forward_mean_out(Tensor output, const Tensor& input,
                                 const std::optional<Tensor>& gate, const Tensor& filter,
                                 const std::optional<Tensor>& bias, int64_t out_channels,
                                 int64_t tile, torch::headeronly::IntHeaderOnlyArrayRef padding,
                                 torch::headeronly::IntHeaderOnlyArrayRef dilation, bool fast) {
  return std::get<1>(forward_mean(output, input, gate, filter, bias, out_channels, tile, padding,
                                  dilation, fast, "pywino::_winograd_forward_mean_out"));
}

void check_state(const std::optional<Tensor>& state, const Tensor& input, int64_t channels,
                 const char* op, const char* name) {
  STD_TORCH_CHECK(!state || (state->scalar_type() == ScalarType::Float && state->dim() == 4 &&
                             is_channels_last(*state) && state->size(0) == input.size(0) &&
                             state->size(1) == channels && state->size(2) == input.size(2) &&
                             state->size(3) == input.size(3)),
                  op, ": ", name, " must be (N, C, H, W) in float32, channels_last");
}

// One step of a convolutional LSTM with 3 x 3 kernels: the gates are never written.
std::tuple<Tensor, Tensor> winograd_conv_lstm(const Tensor& input,
                                              const std::optional<Tensor>& hidden,
                                              const std::optional<Tensor>& cell,
                                              const Tensor& filter,
                                              const std::optional<Tensor>& bias, int64_t channels,
                                              int64_t tile, bool fast) {
  constexpr const char* op = "pywino::_winograd_conv_lstm";
  STD_TORCH_CHECK(input.dim() == 4 && input.scalar_type() == ScalarType::Float &&
                      is_channels_last(input) && input.size(1) % 16 == 0 && channels % 16 == 0 &&
                      input.numel() > 0 && channels > 0,
                  op, ": input must be in float32, channels_last, and channels multiples of 16");
  check_state(hidden, input, channels, op, "hidden");
  check_state(cell, input, channels, op, "cell");
  const std::array<int64_t, 2> one = {1, 1};
  winograd::ForwardParams p{};
  p.geometry = geometry_of(input, 4 * channels, tile, one, one, op);
  winograd::Geometry& g = p.geometry;
  p.input = input.const_data_ptr();
  if (hidden) {
    p.second = hidden->const_data_ptr();
    p.second_channels = channels;
    g.input.c += channels;
  }
  check_fast(fast, filter.numel(), op);
  STD_TORCH_CHECK(
      filter.scalar_type() == ScalarType::Float && filter.is_contiguous() &&
          filter.numel() == winograd::filter_size(g.out_channels, g.input.c, g.tile, fast),
      op, ": the filter was packed for other channels, another tile or instructions");
  check_bias(bias, 4 * channels, op);
  const auto empty_state = [&] {
    return empty_cpu({g.input.n, channels, g.input.h, g.input.w}, ScalarType::Float, true);
  };
  Tensor next_hidden = empty_state(), next_cell = empty_state();
  const winograd::LstmState state{
      cell ? static_cast<const float*>(cell->const_data_ptr()) : nullptr,
      static_cast<float*>(next_hidden.mutable_data_ptr()),
      static_cast<float*>(next_cell.mutable_data_ptr())};
  p.filter = static_cast<const float*>(filter.const_data_ptr());
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.fast = fast;
  p.lstm = &state;
  check_status(winograd::forward(p, torch_threads()), op);
  return {next_hidden, next_cell};
}

// The geometry of a gradient op: grad must have the size of the forward's output.
winograd::Geometry gradient_geometry(const Tensor& grad, const Tensor& input, int64_t tile,
                                     torch::headeronly::IntHeaderOnlyArrayRef padding,
                                     torch::headeronly::IntHeaderOnlyArrayRef dilation,
                                     const char* op) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == input.scalar_type(), op,
                  ": grad must be 4-d, of input's dtype");
  const winograd::Geometry g = geometry_of(input, grad.size(1), tile, padding, dilation, op);
  STD_TORCH_CHECK(
      grad.size(0) == g.input.n && grad.size(2) == g.out_h() && grad.size(3) == g.out_w(), op,
      ": grad must have the size of the output");
  return g;
}

// grad in input's memory format: autograd may hand over either.
Tensor like_input(const Tensor& grad, bool channels_last) {
  if (is_channels_last(grad) == channels_last && (channels_last || grad.is_contiguous()))
    return grad;
  Tensor dense = empty_cpu({grad.size(0), grad.size(1), grad.size(2), grad.size(3)},
                           grad.scalar_type(), channels_last);
  return torch::stable::copy_(dense, grad);
}

Tensor winograd_backward_weight(const Tensor& grad, const Tensor& input, int64_t tile,
                                torch::headeronly::IntHeaderOnlyArrayRef padding,
                                torch::headeronly::IntHeaderOnlyArrayRef dilation, bool spatial,
                                bool winograd_relu) {
  constexpr const char* op = "pywino::_winograd_backward_weight";
  winograd::WeightGradientParams p;
  p.geometry = gradient_geometry(grad, input, tile, padding, dilation, op);
  const winograd::Geometry& g = p.geometry;
  const Tensor dense = like_input(grad, g.channels_last);
  const int64_t size = spatial ? 3 : tile + 2;
  Tensor gradient = empty_cpu({g.out_channels, g.input.c, size, size}, ScalarType::Float, false);
  if (g.input.n == 0 || gradient.numel() == 0)
    return torch::stable::to(torch::stable::zero_(gradient), input.scalar_type());
  p.input = input.const_data_ptr();
  p.grad = dense.const_data_ptr();
  p.spatial = spatial;
  p.winograd_relu = winograd_relu;
  p.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  check_status(winograd::weight_gradient(p, torch_threads()), op);
  return input.scalar_type() == ScalarType::Float
             ? gradient
             : torch::stable::to(gradient, input.scalar_type());
}

// By a filter, or by a weight where there is none.
Tensor domain_backward_input(const Tensor& grad, const Tensor& input, const Tensor* filter,
                             const winograd::FilterParams* weight, int64_t tile,
                             torch::headeronly::IntHeaderOnlyArrayRef padding,
                             torch::headeronly::IntHeaderOnlyArrayRef dilation, bool winograd_relu,
                             const char* op) {
  winograd::DomainInputGradientParams p;
  p.geometry = gradient_geometry(grad, input, tile, padding, dilation, op);
  const winograd::Geometry& g = p.geometry;
  const Tensor dense = like_input(grad, g.channels_last);
  Tensor gradient =
      empty_cpu({g.input.n, g.input.c, g.input.h, g.input.w}, ScalarType::Float, g.channels_last);
  p.input = input.const_data_ptr();
  p.grad = dense.const_data_ptr();
  p.weight = weight;
  if (filter) {
    check_filter(*filter, g.input.c, g.out_channels, g.tile, false, op);
    if (filter->scalar_type() == ScalarType::Int)
      p.sparse_filter = static_cast<const int32_t*>(filter->const_data_ptr());
    else
      p.filter = static_cast<const float*>(filter->const_data_ptr());
  }
  p.winograd_relu = winograd_relu;
  p.input_gradient = static_cast<float*>(gradient.mutable_data_ptr());
  if (gradient.numel() && g.out_channels)
    check_status(winograd::domain_input_gradient(p, torch_threads()), op);
  else
    torch::stable::zero_(gradient);
  return input.scalar_type() == ScalarType::Float
             ? gradient
             : torch::stable::to(gradient, input.scalar_type());
}

Tensor winograd_domain_backward_input(const Tensor& grad, const Tensor& input, const Tensor& filter,
                                      int64_t tile,
                                      torch::headeronly::IntHeaderOnlyArrayRef padding,
                                      torch::headeronly::IntHeaderOnlyArrayRef dilation,
                                      bool winograd_relu) {
  return domain_backward_input(grad, input, &filter, nullptr, tile, padding, dilation,
                               winograd_relu, "pywino::_winograd_domain_backward_input");
}

// The same with a filter that is used once.
Tensor winograd_domain_backward_input_once(const Tensor& grad, const Tensor& input,
                                           const Tensor& weight, int64_t tile,
                                           torch::headeronly::IntHeaderOnlyArrayRef padding,
                                           torch::headeronly::IntHeaderOnlyArrayRef dilation,
                                           bool winograd_relu) {
  constexpr const char* op = "pywino::_winograd_domain_backward_input_once";
  const winograd::FilterParams p = filter_params(weight, tile, true, false, false, op);
  const winograd::Geometry g = gradient_geometry(grad, input, tile, padding, dilation, op);
  STD_TORCH_CHECK(
      p.dtype == g.dtype && p.out_channels == g.out_channels && p.in_channels == g.input.c, op,
      ": weight must have input's dtype, and the channels of grad and input");
  if (winograd::input_gradient_takes_weight(g, torch_threads().threads))
    return domain_backward_input(grad, input, nullptr, &p, tile, padding, dilation, winograd_relu,
                                 op);
  const Tensor filter = make_filter(weight, tile, true, false, false, op);
  return domain_backward_input(grad, input, &filter, nullptr, tile, padding, dilation,
                               winograd_relu, op);
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, CPU, m) {
  m.impl("_winograd_filter", TORCH_BOX(&pywino::winograd_filter));
  m.impl("_winograd_pack", TORCH_BOX(&pywino::winograd_pack));
  m.impl("_winograd_sparse_pack", TORCH_BOX(&pywino::winograd_sparse_pack));
  m.impl("_winograd_forward", TORCH_BOX(&pywino::winograd_forward));
  m.impl("_winograd_convolve", TORCH_BOX(&pywino::winograd_convolve));
  m.impl("_winograd_forward_mean", TORCH_BOX(&pywino::winograd_forward_mean));
  m.impl("_winograd_forward_mean_out", TORCH_BOX(&pywino::winograd_forward_mean_out));
  m.impl("_winograd_conv_lstm", TORCH_BOX(&pywino::winograd_conv_lstm));
  m.impl("_winograd_backward_weight", TORCH_BOX(&pywino::winograd_backward_weight));
  m.impl("_winograd_domain_backward_input", TORCH_BOX(&pywino::winograd_domain_backward_input));
  m.impl("_winograd_domain_backward_input_once",
         TORCH_BOX(&pywino::winograd_domain_backward_input_once));
}
