// Memory for what is read from front to back again and again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"

namespace lacuna {

/// A zeroed block of bytes in large pages where the system gives them: a prefetcher stops at the
/// end of a page, so 4 KiB pages cost a stream of weights up to a third of its speed. Blocks lie
/// one behind the other, so that no weight wastes the rest of its last page. Pages become memory
/// when they are first written, by whichever thread does.
class LargeBlock {
 public:
  LargeBlock() = default;
  explicit LargeBlock(size_t size);
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  class Region;
  class Free {
   public:
    Free() noexcept : size_(0) {}
    /// @param region  that the block is of; null: from malloc
    Free(std::shared_ptr<Region> region, size_t size) : region_(std::move(region)), size_(size) {}
    void operator()(uint8_t* data) const;

   private:
    std::shared_ptr<Region> region_;
    size_t size_;
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

/// A copy of the pieces, one after the other, in one such block.
Bytes in_large_pages(const std::vector<Bytes>& pieces,
                     const Executor& executor = Executor::serial());

}  // namespace lacuna
