#include "lacuna/core/large_block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace lacuna {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
/// Blocks below this come from malloc: pages don't matter to them.
constexpr size_t kSmallest = size_t{256} << 10;
constexpr size_t kRegion = size_t{64} << 20;
constexpr size_t kAlignment = 64;

size_t rounded_up(size_t size, size_t to) { return (size + to - 1) / to * to; }

}  // namespace

/// A run of large pages, handed out from front to back and never twice, so that all of it is zero.
/// What nobody has touched yet takes no memory.
class LargeBlock::Region {
 public:
  explicit Region(size_t size) : size_(rounded_up(size, kLargePage)) {
    mapped_size_ = size_ + kLargePage;  // somewhere in it lies the beginning of a large page
    mapped_ =
        ::mmap(nullptr, mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(mapped_);
    data_ = static_cast<uint8_t*>(mapped_) + (rounded_up(address, kLargePage) - address);
    ::madvise(data_, size_, MADV_HUGEPAGE);  // a hint; refusal is fine
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() { ::munmap(mapped_, mapped_size_); }

  bool has_room(size_t size) const { return size <= size_ - used_; }
  uint8_t* take(size_t size) {
    uint8_t* const block = data_ + used_;
    used_ += std::min(rounded_up(size, kAlignment), size_ - used_);
    return block;
  }
  /// Gives the memory of a block back, whole pages of it, before the region ends.
  static void give_back(uint8_t* block, size_t size) {
    const auto page = static_cast<size_t>(::sysconf(_SC_PAGE_SIZE));
    const auto address = reinterpret_cast<uintptr_t>(block);
    const uintptr_t begin = rounded_up(address, page), end = (address + size) / page * page;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

  /// The region that the next block of a size comes from.
  static std::shared_ptr<Region> with_room(size_t size, uint8_t*& block) {
    static std::mutex mutex;
    static std::weak_ptr<Region> last;  // lives as long as its blocks
    const std::lock_guard lock(mutex);
    std::shared_ptr<Region> region = last.lock();
    if (region == nullptr || !region->has_room(size)) {
      region = std::make_shared<Region>(std::max(size, kRegion));
      last = region;
    }
    block = region->take(size);
    return region;
  }

 private:
  size_t size_, mapped_size_, used_ = 0;
  void* mapped_;
  uint8_t* data_;
};

LargeBlock::LargeBlock(size_t size) : size_(size) {
  if (size == 0) return;
  uint8_t* data = nullptr;
  std::shared_ptr<Region> region;
  if (size >= kSmallest) {
    region = Region::with_room(size, data);
  } else {
    data = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded_up(size, kAlignment)));
    if (data == nullptr) throw std::bad_alloc();
    std::memset(data, 0, size);
  }
  data_ = {data, Free{std::move(region), size}};
}

void LargeBlock::Free::operator()(uint8_t* data) const {
  region_ != nullptr ? Region::give_back(data, size_) : std::free(data);
}

Bytes in_large_pages(const std::vector<Bytes>& pieces, const Executor& executor) {
  size_t total = 0;
  for (const Bytes& piece : pieces) total += piece.size();
  if (total == 0) return {};
  auto block = std::make_shared<LargeBlock>(total);
  uint8_t* next = block->data();
  for (const Bytes& piece : pieces) {
    const auto strides = static_cast<int64_t>((piece.size() + kLargePage - 1) / kLargePage);
    executor.parallel_for(strides, [&](int64_t stride) {
      const size_t begin = static_cast<size_t>(stride) * kLargePage;
      std::memcpy(next + begin, piece.data() + begin, std::min(kLargePage, piece.size() - begin));
    });
    next += piece.size();
  }
  const auto* data = reinterpret_cast<const std::byte*>(block->data());
  return {std::move(block), data, total};
}

}  // namespace lacuna
