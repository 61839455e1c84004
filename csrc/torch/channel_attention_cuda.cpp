// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels under the names of the CPU's: unpack, check, allocate, launch on the current stream of the tensors' device.
#include "core/channel_attention/cuda.h"

#include <tuple>

#include "channel_attention.h"
#include "launch.h"

namespace pywino {
namespace {

namespace cuda = channel_attention::cuda;

// The weights as the kernels read them, in input's dtype, and what keeps their memory.
class Weights {
 public:
  Weights(const Tensor& input, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
          const std::optional<Tensor>& b2, const std::optional<Tensor>& w3, const char* op)
      : input_(input), op_(op) {
    STD_TORCH_CHECK(w1.dim() == 2, op, ": w1 must be (hidden, channels)");
    const int64_t channels = input.size(1);
    layers.hidden = w1.size(0);
    // Of shared memory a block can have 99 KB on every GPU.
    STD_TORCH_CHECK(channels + layers.hidden <= 24 * 1024, op,
                    ": the kernel takes 24576 channels and hidden numbers together, got ",
                    channels + layers.hidden, "; use backend=\"aten\"");
    layers.w1 = keep(0, w1, layers.hidden * channels);
    layers.b1 = b1 ? keep(1, *b1, layers.hidden) : nullptr;
    layers.w2 = keep(2, w2, channels * layers.hidden);
    layers.b2 = b2 ? keep(3, *b2, channels) : nullptr;
    layers.w3 = w3 ? keep(4, *w3, channels * channels) : nullptr;
  }

  cuda::Layers layers{};

 private:
  const void* keep(int slot, const Tensor& t, int64_t size) {
    STD_TORCH_CHECK(t.numel() == size, op_, ": a weight or bias does not fit input's channels");
    check_same_device(input_, t, op_, "a weight or bias");
    const ScalarType dtype = input_.scalar_type();
    kept_[slot] =
        torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
    return kept_[slot]->const_data_ptr();
  }

  const Tensor& input_;
  const char* op_;
  std::optional<Tensor> kept_[5];
};

Tensor empty_as(const Tensor& input) {
  return empty_like(input, {input.size(0), input.size(1), input.size(2), input.size(3)},
                    input.scalar_type(), is_channels_last(input));
}

Tensor empty_sums(const Tensor& input, int64_t parts) {
  return empty_like(input, {input.size(0), parts, input.size(1)}, ScalarType::Float, false);
}

Tensor empty_gate(const Tensor& input) {
  return empty_like(input, {input.size(0), input.size(1)}, ScalarType::Float, false);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& w1,
                                           const std::optional<Tensor>& b1, const Tensor& w2,
                                           const std::optional<Tensor>& b2,
                                           const std::optional<Tensor>& w3,
                                           const std::optional<Tensor>& residual, bool relu,
                                           bool residual_relu) {
  constexpr const char* op = "pywino::_channel_attention_forward";
  cuda::Forward p{};
  p.shape = shape_of(input, op);
  const Launch launch(input, op, cuda::pywino_channel_attention_cuda_error);
  const Weights weights(input, w1, b1, w2, b2, w3, op);
  if (residual) check_like(*residual, input, op, "residual");
  if (residual) check_same_device(input, *residual, op, "residual");
  Tensor output = empty_as(input), mean = empty_gate(input), gate = empty_gate(input);
  Tensor partial = empty_sums(input, cuda::parts_of(p.shape));
  p.layers = weights.layers;
  p.input = input.const_data_ptr();
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.mean = floats(mean);
  p.gate = floats(gate);
  p.partial = floats(partial);
  p.relu = relu;
  p.residual_relu = residual_relu;
  launch.check(cuda::pywino_channel_attention_forward(&p, launch.stream()));
  return {output, mean, gate};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                    const Tensor& gate, const Tensor& w1,
                                    const std::optional<Tensor>& b1, const Tensor& w2,
                                    const std::optional<Tensor>& w3, bool relu) {
  constexpr const char* op = "pywino::_channel_attention_backward";
  cuda::Backward p{};
  p.shape = shape_of(input, op);
  const Launch launch(input, op, cuda::pywino_channel_attention_cuda_error);
  const Weights weights(input, w1, b1, w2, std::nullopt, w3, op);
  check_like(grad, input, op, "grad");
  check_same_device(input, grad, op, "grad");
  for (const Tensor* t : {&mean, &gate}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                        t->numel() == p.shape.n * p.shape.c,
                    op, ": mean and gate must be those of the forward pass");
    check_same_device(input, *t, op, "mean and gate");
  }
  Tensor input_gradient = empty_as(input), logit_gradient = empty_gate(input);
  Tensor partial = empty_sums(input, cuda::parts_of(p.shape)), shift = empty_gate(input);
  p.layers = weights.layers;
  p.grad = grad.const_data_ptr();
  p.input = input.const_data_ptr();
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.gate = static_cast<const float*>(gate.const_data_ptr());
  p.relu = relu;
  p.input_gradient = input_gradient.mutable_data_ptr();
  p.logit_gradient = floats(logit_gradient);
  p.partial = floats(partial);
  p.shift = floats(shift);
  launch.check(cuda::pywino_channel_attention_backward(&p, launch.stream()));
  return {input_gradient, logit_gradient};
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, PYWINO_CUDA_KEY, m) {
  m.impl("_channel_attention_forward", TORCH_BOX(&pywino::forward));
  m.impl("_channel_attention_backward", TORCH_BOX(&pywino::backward));
}
