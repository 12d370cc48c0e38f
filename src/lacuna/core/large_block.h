// Memory for what is read from front to back again and again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"

namespace lacuna {

/// A zeroed block of bytes in large pages where the system gives them: a prefetcher stops at the
/// end of a page, so 4 KiB pages cost a stream of weights up to a third of its speed.
class LargeBlock {
 public:
  LargeBlock() = default;
  explicit LargeBlock(size_t size);
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* data) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

/// A copy of the pieces, one after the other, in one such block.
Bytes in_large_pages(const std::vector<Bytes>& pieces,
                     const Executor& executor = Executor::serial());

}  // namespace lacuna
