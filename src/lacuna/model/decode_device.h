// Where a decode step runs: its operations, where its state lies, how its sequence is started.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/kernels/decode/decode.h"
#include "lacuna/model/decoder.h"

namespace lacuna::model {

class DecodeDevice {
 public:
  /// Why this decoder's weights can't be run step by step on their device, or nothing.
  static std::optional<std::string> refusal(const Decoder& decoder);
  /// @param sequences  that a step goes on with: several take one token each
  /// @param operations  null = the fastest ones
  static std::unique_ptr<DecodeDevice> open(at::Device device, int64_t max_tokens,
                                            int64_t sequences,
                                            const kernels::decode::Operations* operations);
  virtual ~DecodeDevice() = default;

  virtual const kernels::decode::Operations& operations() const = 0;
  virtual void* queue() = 0;
  /// Of Linear::forward_into, where it needs one.
  virtual const Executor& executor() const = 0;
  /// In the memory of the device; of positions and best ones there are as many as sequences.
  virtual const int32_t* position() const = 0;
  virtual const int32_t* ids() const = 0;  ///< null: whoever needs them has them
  virtual int32_t* best() = 0;
  /// Sets ids and positions, does what `sequence` calls and returns what it left at best().
  virtual std::vector<int32_t> run(const std::vector<int32_t>& ids,
                                   const std::vector<int32_t>& positions,
                                   const std::function<void()>& sequence) = 0;
  /// The operands of a step of one token a sequence lie elsewhere from now on.
  virtual void forget() = 0;
  /// Waits for all that was started.
  virtual void finish() = 0;
};

}  // namespace lacuna::model
