// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels as torch ops: unpack, check, allocate, launch. Schemas, fakes and gradients are in pywino/ops/sparse_conv.py,
// which also words the errors that a user can cause; the checks here only keep memory safe.
#include "core/sparse_conv/sparse_conv.h"

#include "tensor.h"

namespace pywino {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

Tensor sparse_pack(const Tensor& weight, bool rotate, bool blocks) {
  constexpr const char* op = "pywino::_sparse_pack";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, op,
                  ": weight must be (K, C, height, width) without empty dimensions");
  sparse_conv::FilterParams p;
  p.weight = weight.const_data_ptr();
  p.dtype = dtype_of(weight, op, "weight");
  p.out_channels = weight.size(0);
  p.in_channels = weight.size(1);
  p.kernel_h = weight.size(2);
  p.kernel_w = weight.size(3);
  p.stride_k = weight.stride(0);
  p.stride_c = weight.stride(1);
  p.stride_h = weight.stride(2);
  p.stride_w = weight.stride(3);
  p.rotate = rotate;
  const auto pattern = blocks ? sparse_conv::Pattern::blocks : sparse_conv::Pattern::unstructured;
  const int64_t words = sparse_conv::filter_size(p, pattern);
  STD_TORCH_CHECK(words >= 0, op, ": the weight has too many entries");
  Tensor packed = empty_cpu({words}, ScalarType::Int, false);
  const auto status =
      sparse_conv::pack(p, pattern, static_cast<int32_t*>(packed.mutable_data_ptr()));
  STD_TORCH_CHECK(status == sparse_conv::Status::ok, op, ": the weight has too many entries");
  return packed;
}

sparse_conv::Geometry geometry_of(const Tensor& input, int64_t out_channels,
                                  IntHeaderOnlyArrayRef kernel_size, IntHeaderOnlyArrayRef stride,
                                  IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
                                  const char* op) {
  check_dense(input, op, "input");
  check_pair(kernel_size, 1, op, "kernel_size");
  check_pair(stride, 1, op, "stride");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  const sparse_conv::Geometry g = {input.size(0),
                                   input.size(1),
                                   input.size(2),
                                   input.size(3),
                                   out_channels,
                                   kernel_size[0],
                                   kernel_size[1],
                                   stride[0],
                                   stride[1],
                                   padding[0],
                                   padding[1],
                                   dilation[0],
                                   dilation[1],
                                   is_channels_last(input),
                                   dtype_of(input, op, "input")};
  STD_TORCH_CHECK(g.h + 2 * g.pad_h > g.dil_h * (g.kernel_h - 1) &&
                      g.w + 2 * g.pad_w > g.dil_w * (g.kernel_w - 1),
                  op, ": the output would be empty");
  return g;
}

Tensor sparse_forward(const Tensor& input, const Tensor& filter, const std::optional<Tensor>& bias,
                      int64_t out_channels, IntHeaderOnlyArrayRef kernel_size,
                      IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                      IntHeaderOnlyArrayRef dilation) {
  constexpr const char* op = "pywino::_sparse_forward";
  sparse_conv::ForwardParams p;
  const sparse_conv::Geometry& g = p.geometry =
      geometry_of(input, out_channels, kernel_size, stride, padding, dilation, op);
  const bool is_filter =
      filter.scalar_type() == ScalarType::Int && filter.is_contiguous() &&
      sparse_conv::filter_fits(static_cast<const int32_t*>(filter.const_data_ptr()), filter.numel(),
                               g);
  STD_TORCH_CHECK(is_filter, op,
                  ": the filter was packed for another weight or another instruction set");
  check_bias(bias, out_channels, op);
  Tensor output =
      empty_cpu({g.n, g.out_channels, g.out_h(), g.out_w()}, input.scalar_type(), g.channels_last);
  p.input = input.const_data_ptr();
  p.filter = static_cast<const int32_t*>(filter.const_data_ptr());
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.output = output.mutable_data_ptr();
  STD_TORCH_CHECK(sparse_conv::forward(p, torch_threads()) == sparse_conv::Status::ok, op,
                  ": out of memory for the scratch buffers");
  return output;
}

// dW of what is not zero in the weight, zero elsewhere.
Tensor sparse_kept_gradient(const Tensor& grad, const Tensor& input, const Tensor& weight,
                            IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                            IntHeaderOnlyArrayRef dilation) {
  constexpr const char* op = "pywino::_sparse_kept_gradient";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && input.dim() == 4 &&
                      weight.size(1) == input.size(1) &&
                      weight.scalar_type() == input.scalar_type(),
                  op, ": weight must be contiguous, of input's channels and dtype");
  sparse_conv::GradientParams p;
  const int64_t size[] = {weight.size(2), weight.size(3)};
  const sparse_conv::Geometry& g = p.geometry =
      geometry_of(input, weight.size(0), size, stride, padding, dilation, op);
  STD_TORCH_CHECK(weight.size(0) * g.c * size[0] * size[1] < INT32_MAX, op,
                  ": the weight has too many entries");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == g.n && grad.size(1) == g.out_channels &&
                      grad.size(2) == g.out_h() && grad.size(3) == g.out_w() &&
                      grad.scalar_type() == input.scalar_type() &&
                      (g.channels_last ? is_channels_last(grad) ||
                                             (grad.is_contiguous() &&
                                              (grad.size(1) == 1 || g.out_h() * g.out_w() == 1))
                                       : grad.is_contiguous()),
                  op, ": grad must be like the output, in input's dtype and memory format");
  Tensor gradient =
      empty_cpu({g.out_channels, g.c, g.kernel_h, g.kernel_w}, input.scalar_type(), false);
  torch::stable::zero_(gradient);
  p.input = input.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.gradient = gradient.mutable_data_ptr();
  STD_TORCH_CHECK(sparse_conv::kept_gradient(p, torch_threads()) == sparse_conv::Status::ok, op,
                  ": out of memory for the scratch buffers");
  return gradient;
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, CPU, m) {
  m.impl("_sparse_pack", TORCH_BOX(&pywino::sparse_pack));
  m.impl("_sparse_forward", TORCH_BOX(&pywino::sparse_forward));
  m.impl("_sparse_kept_gradient", TORCH_BOX(&pywino::sparse_kept_gradient));
}
