#include <c10/core/InferenceMode.h>

#include <cmath>
#include <mutex>
#include <numbers>

#include "lacuna/model/decoder.h"

namespace lacuna::model {
namespace {

/// Llama 3's scaling: long wavelengths are stretched by `factor`, short ones kept, those between
/// interpolated. https://arxiv.org/abs/2407.21783
float llama3_frequency(float frequency, const io::RopeSpec& rope) {
  const auto old_length = static_cast<float>(rope.original_max_positions);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto high = static_cast<float>(rope.high_freq_factor);
  const auto factor = static_cast<float>(rope.factor);
  const float wavelength = 2 * std::numbers::pi_v<float> / frequency;
  if (wavelength < old_length / high) return frequency;
  if (wavelength > old_length / low) return frequency / factor;
  const float smooth = (old_length / wavelength - low) / (high - low);
  return (1 - smooth) * frequency / factor + smooth * frequency;
}

}  // namespace

struct Rotary::Memo {
  std::mutex mutex;
  int64_t first = 0, tokens = 0;
  at::Tensor cos, sin;
};

Rotary::Rotary(const io::DecoderSpec& spec, const Compute& compute)
    : compute_(compute), memo_(std::make_shared<Memo>()) {
  const c10::InferenceMode off(false);
  const int64_t half = spec.head_dim / 2;
  // In float32 and by torch's own pow, as the models were trained.
  const at::Tensor exponent =
      at::arange(0, spec.head_dim, 2, at::kFloat) / static_cast<double>(spec.head_dim);
  inverse_frequency_ = at::pow(spec.rope.theta, exponent).reciprocal();
  auto* frequency = inverse_frequency_.data_ptr<float>();
  for (int64_t i = 0; i < half; ++i) {
    if (spec.rope.type == "linear") frequency[i] /= static_cast<float>(spec.rope.factor);
    if (spec.rope.type == "llama3") frequency[i] = llama3_frequency(frequency[i], spec.rope);
  }
  inverse_frequency_ = inverse_frequency_.to(compute.device);
}

std::pair<at::Tensor, at::Tensor> Rotary::at(int64_t first, int64_t tokens) const {
  // Every block of a pass asks for the same positions.
  const std::lock_guard lock(memo_->mutex);
  if (!memo_->cos.defined() || memo_->first != first || memo_->tokens != tokens) {
    const c10::InferenceMode off(false);  // what is remembered may meet autograd later
    const at::Tensor positions =
        at::arange(first, first + tokens, inverse_frequency_.options()).unsqueeze(1);
    const at::Tensor half = positions * inverse_frequency_;
    const at::Tensor angles = at::cat({half, half}, -1);
    memo_->cos = angles.cos().to(compute_.dtype);
    memo_->sin = angles.sin().to(compute_.dtype);
    memo_->first = first;
    memo_->tokens = tokens;
  }
  return {memo_->cos, memo_->sin};
}

}  // namespace lacuna::model
