#include "lacuna/prune/activations.h"

#include <algorithm>

#include "lacuna/io/file.h"
#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

/// A tensor that lies in a file (io::scratch_memory()); nothing of it is set.
Result<at::Tensor> tensor_in_file(const std::filesystem::path& folder, at::IntArrayRef shape,
                                  at::ScalarType type) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(shape)) * c10::elementSize(type);
  LACUNA_TRY(const auto memory, io::scratch_memory(folder, bytes));
  return at::from_blob(
      memory.get(), shape, [memory](void*) {}, at::TensorOptions().dtype(type));
}

void give_back(const at::Tensor& rows) { io::release_pages(rows.data_ptr(), rows.nbytes()); }

}  // namespace

Batches::Batches(int64_t samples, int64_t length, const io::DecoderSpec& spec,
                 const PruneOptions& options) {
  const bool cpu = options.compute.device.is_cpu();
  const int64_t tokens_at_once = cpu ? 512 : 8192;
  batch = std::clamp<int64_t>(tokens_at_once / length, 1, samples);
  // Inputs kept for the statistics in float32, and what attention and the products of the MLP
  // make on the way.
  const auto element = static_cast<uint64_t>(c10::elementSize(options.compute.dtype));
  const uint64_t width = static_cast<uint64_t>(3 * spec.hidden + spec.intermediate) * 4 +
                         static_cast<uint64_t>(6 * spec.hidden + 3 * spec.intermediate) * element;
  const uint64_t one = std::max<uint64_t>(static_cast<uint64_t>(batch * length) * width, 1);
  const auto fit = static_cast<int64_t>(options.working_bytes / 2 / one);
  at_once = std::clamp<int64_t>(fit, 1, cpu ? model::torch_executor().threads : 1);
  bytes = static_cast<uint64_t>(at_once) * one;
}

Result<Activations> Activations::embed(const io::Checkpoint& checkpoint,
                                       const io::DecoderSpec& spec, const Calibration& calibration,
                                       const PruneOptions& options,
                                       const std::filesystem::path& folder) {
  const int64_t samples = calibration.samples();
  Activations made(Batches(samples, calibration.length(), spec, options), options.compute.device);
  made.in_file_ = !folder.empty();
  made.executor_ = model::executor_for(options.compute.device);
  LACUNA_TRY(const auto ends, model::Ends::load(checkpoint, spec, options.compute));
  for (int64_t first = 0; first < samples; first += made.batch_) {
    const int64_t n = std::min(samples - first, made.batch_);
    const at::Tensor hidden = ends.embed(calibration.ids_of(first, n, options.compute.device));
    const std::vector<int64_t> shape = {samples, hidden.size(1), hidden.size(2)};
    if (!made.hidden_.defined() && made.in_file_) {
      LACUNA_TRY(made.hidden_, tensor_in_file(folder, shape, hidden.scalar_type()));
    } else if (!made.hidden_.defined()) {
      made.hidden_ = at::empty(shape, hidden.options());
    }
    const at::Tensor rows = made.hidden_.narrow(0, first, hidden.size(0));
    rows.copy_(hidden);
    if (made.in_file_) give_back(rows);
  }
  if (spec.positions == io::Positions::kRotary) made.rotary_ = model::Rotary(spec, options.compute);
  return made;
}

Activations Activations::copy() const {
  Activations other = *this;
  other.hidden_ = hidden_.clone();
  other.in_file_ = false;
  return other;
}

Status Activations::run(const model::Block& block, bool replace, const ObserverAt& observe,
                        const After& after) {
  const int64_t samples = hidden_.size(0);
  for (int64_t first = 0; first < samples; first += batch_ * at_once_) {
    const int64_t last = std::min(samples, first + batch_ * at_once_);
    parallel_chunks(executor_, (last - first + batch_ - 1) / batch_, [&](int64_t place) {
      const int64_t begin = first + place * batch_;
      const at::Tensor rows = hidden_.narrow(0, begin, std::min(batch_, last - begin));
      const model::LinearObserver observer = observe(place);
      // Of a block without a norm in front the observer holds the states themselves for a while:
      // until others took their place, or would be read from the file again.
      const bool held = observer && (replace || in_file_);
      const at::Tensor batch = rows.to(device_, /*non_blocking=*/false, /*copy=*/held);
      const at::Tensor out = observer ? block.observe(batch, rotary_, observer, /*outputs=*/replace)
                                      : block.forward(batch, rotary_);
      if (replace) rows.copy_(out);
      if (in_file_) give_back(rows);
    });
    LACUNA_CHECK(after(last - first));
  }
  return {};
}

}  // namespace lacuna::prune
