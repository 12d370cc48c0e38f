#include "lacuna/model/decode_device.h"

#include <ATen/Parallel.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>

#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/scratch.h"

namespace lacuna::model {

namespace decode = kernels::decode;

namespace {

/// Threads that spin between the operations; a sequence is called every time.
class CpuDevice : public DecodeDevice {
 public:
  CpuDevice(int64_t sequences, const decode::Operations* operations)
      : position_(static_cast<size_t>(sequences)),
        best_(static_cast<size_t>(sequences)),
        operations_(operations != nullptr ? *operations : *decode::cpu_operations().front()),
        pool_(at::get_num_threads()),
        executor_(pool_.executor()) {}

  const decode::Operations& operations() const override { return operations_; }
  void* queue() override { return &executor_; }
  const Executor& executor() const override { return executor_; }
  const int32_t* position() const override { return position_.data(); }
  const int32_t* ids() const override { return nullptr; }
  int32_t* best() override { return best_.data(); }
  std::vector<int32_t> run(const std::vector<int32_t>&, const std::vector<int32_t>& positions,
                           const std::function<void()>& sequence) override {
    position_ = positions;
    sequence();
    return best_;
  }
  void forget() override {}
  void finish() override {}

 private:
  std::vector<int32_t> position_, best_;
  const decode::Operations& operations_;
  ThreadPool pool_;
  Executor executor_;
};

/// A stream of its own, for the default one can't be recorded. Torch's products run on it too while
/// a sequence is called. A step of one token for each sequence is called twice, the second time to
/// be recorded: by then torch has all the memory that its products want.
class GpuDevice : public DecodeDevice {
 public:
  GpuDevice(at::Device device, int64_t max_tokens, int64_t sequences)
      : sequences_(sequences),
        device_(device),
        guard_(device.type()),
        stream_(guard_.getStreamFromGlobalPool(device)),
        table_(**kernels::gpu_library()) {
    const auto ints = at::TensorOptions().dtype(at::kInt);
    state_ = at::zeros({2 * sequences + max_tokens}, ints.device(device));
    staging_ = at::zeros({2 * sequences + max_tokens}, ints.pinned_memory(true));
  }
  ~GpuDevice() override {
    finish();
    forget();
  }

  const decode::Operations& operations() const override { return *table_.decode; }
  void* queue() override { return stream_.native_handle(); }
  const Executor& executor() const override { return none_; }
  const int32_t* position() const override { return state() + sequences_; }
  const int32_t* ids() const override { return state() + 2 * sequences_; }
  int32_t* best() override { return state_.mutable_data_ptr<int32_t>(); }

  std::vector<int32_t> run(const std::vector<int32_t>& ids, const std::vector<int32_t>& positions,
                           const std::function<void()>& sequence) override {
    // What torch's own stream was given so far (a prompt's keys, a larger cache) comes first.
    c10::Event before(device_.type());
    before.record(guard_.getStream(device_));
    before.block(stream_);
    auto* staged = staging_.mutable_data_ptr<int32_t>();
    const auto count = static_cast<size_t>(sequences_);
    std::memcpy(staged + count, positions.data(), count * sizeof(int32_t));
    std::memcpy(staged + 2 * count, ids.data(), ids.size() * sizeof(int32_t));
    copy(best() + count, staged + count, count + ids.size());
    if (ids.size() != count) {
      call(sequence);
    } else if (recording_ != nullptr) {
      check(table_.replay(recording_, queue()), "replay");
    } else if (++calls_ < 2) {
      call(sequence);
      held_ = scratch_buffer();
    } else {
      // The recording passes expanded weights through the buffer that is the scratch now, and
      // none may be allocated while it is made.
      if (!scratch_buffer().is_same(held_)) call(sequence);
      record(sequence);
      check(table_.replay(recording_, queue()), "replay");
    }
    copy(staged, best(), count);
    check(table_.wait(queue()), "run a step");
    return {staged, staged + count};
  }

  void forget() override {
    if (recording_ != nullptr) table_.forget(recording_);
    recording_ = nullptr;
    calls_ = 0;
  }
  void finish() override { table_.wait(queue()); }

 private:
  const int32_t* state() const { return state_.const_data_ptr<int32_t>(); }

  void check(int error, const char* what) const {
    TORCH_CHECK(error == 0, "the GPU can't ", what, ": ", table_.error_text(error));
  }

  void copy(int32_t* to, const int32_t* from, size_t count) {
    check(table_.copy(to, from, count * sizeof(int32_t), queue()), "copy");
  }

  void record(const std::function<void()>& sequence) {
    check(table_.record_begin(queue()), "record");
    try {
      call(sequence);
    } catch (...) {  // the stream must not stay in this state
      void* half = nullptr;
      if (table_.record_end(queue(), &half) == 0) table_.forget(half);
      throw;
    }
    check(table_.record_end(queue(), &recording_), "record");
  }

  /// With torch's products on our stream.
  void call(const std::function<void()>& sequence) {
    const c10::Stream before = guard_.exchangeStream(stream_);
    struct Back {
      const c10::impl::VirtualGuardImpl& guard;
      c10::Stream stream;
      ~Back() { guard.exchangeStream(stream); }
    } back{guard_, before};
    sequence();
    check(table_.last_error(), "launch a kernel of a decode step");
  }

  int64_t sequences_;
  at::Device device_;
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream stream_;
  const kernels::GpuTable& table_;
  Executor none_;
  at::Tensor state_;    // best, positions, ids
  at::Tensor staging_;  // the same in pinned memory
  at::Tensor held_;
  void* recording_ = nullptr;
  int calls_ = 0;
};

}  // namespace

std::optional<std::string> DecodeDevice::refusal(const Decoder& decoder) {
  if (decoder.compute().device.is_cpu()) return std::nullopt;
  if (const auto why_not = gpu_library_refusal()) return why_not;
  if (decoder.spec().hidden > decode::kMaxGpuRow)
    return fmt::format("rows of {} on a GPU", decoder.spec().hidden);
  if (decoder.ends().embedding().is_compact()) return "a compact embedding";
  for (const Linear* linear : decoder.linears())
    if (!linear->recordable()) return "a weight that torch expands";
  return std::nullopt;
}

std::unique_ptr<DecodeDevice> DecodeDevice::open(at::Device device, int64_t max_tokens,
                                                 int64_t sequences,
                                                 const decode::Operations* operations) {
  if (device.is_cpu()) return std::make_unique<CpuDevice>(sequences, operations);
  return std::make_unique<GpuDevice>(device, max_tokens, sequences);
}

}  // namespace lacuna::model
