#include "lacuna/core/large_block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace lacuna {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;

}  // namespace

LargeBlock::LargeBlock(size_t size) : size_(size) {
  if (size == 0) return;
  // A block of less than a page would only waste the rest of it.
  const size_t alignment = size >= kLargePage ? kLargePage : 64;
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(alignment, rounded));
  if (data == nullptr) throw std::bad_alloc();
  data_.reset(data);
  if (alignment == kLargePage) madvise(data, rounded, MADV_HUGEPAGE);  // a hint; refusal is fine
  std::memset(data, 0, size);
}

void LargeBlock::Free::operator()(uint8_t* data) const { std::free(data); }

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
