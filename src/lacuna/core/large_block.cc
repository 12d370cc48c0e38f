#include "lacuna/core/large_block.h"

#include <sys/mman.h>

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

}  // namespace lacuna
