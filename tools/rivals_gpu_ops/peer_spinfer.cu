// SpInfer (https://github.com/HPMLL/SpInfer_EuroSys25): bitmaps of 8 x 8 in tiles of 64 x 64,
// tensor cores, 8 tokens and more.
#include <cstdlib>

#define SplitK_Reduction spinfer_split_reduction
#include "spinfer/csrc/SpMM_API.cu"

#include "peers.h"

namespace rivals {
namespace {

/// Its own code packs 64 rows at a time, so that all threads pack; the slabs are joined.
Form pack(const half* w, int n, int k) {
  constexpr int kSlab = 64;
  const int slabs = n / kSlab, tiles = k / 64;
  struct Slab {
    half* values;
    int *small, *medium, *large;
    uint64_t* bitmap;
    int most;
  };
  std::vector<Slab> packed(slabs);
  on_all_threads(slabs, [&](int i) {
    Slab& s = packed[i];
    InitSparseMatrixA_bitmap(const_cast<half*>(w) + size_t(i) * kSlab * k, kSlab, k, 8, 16, 64, 8,
                             64, 64, &s.values, &s.small, &s.medium, &s.large, &s.bitmap, s.most);
  });
  std::vector<size_t> first(slabs + 1, 0);
  int most = 0;
  for (int i = 0; i < slabs; ++i) {
    first[i + 1] = first[i] + packed[i].large[tiles];
    most = std::max(most, packed[i].most);
  }
  const size_t count = first[slabs], all = size_t(slabs) * tiles;
  std::vector<half> values(count + 64, __float2half(0.f));
  std::vector<int> large(all + 8, int(count)), medium(all * 4 + 8, 0);
  std::vector<uint64_t> bitmap(all * 64 + 64, 0);
  on_all_threads(slabs, [&](int i) {
    const Slab& s = packed[i];
    std::memcpy(values.data() + first[i], s.values, size_t(s.large[tiles]) * 2);
    for (int j = 0; j < tiles; ++j) large[size_t(i) * tiles + j] = int(first[i]) + s.large[j];
    std::memcpy(medium.data() + size_t(i) * tiles * 4, s.medium, size_t(tiles) * 16);
    std::memcpy(bitmap.data() + size_t(i) * tiles * 64, s.bitmap, size_t(tiles) * 512);
    free(s.values);
    free(s.small);
    free(s.medium);
    free(s.large);
    free(s.bitmap);
  });
  const std::vector<int> rounded = {(most + 63) / 64 * 64};
  Form form = {
      {bytes_of(values), bytes_of(large), bytes_of(medium), bytes_of(bitmap), bytes_of(rounded)},
      count * 2 + all * (4 + 16 + 512)};
  // More would write past its shared memory, which ends the process.
  constexpr int kRoom = 2304;
  if (rounded[0] > kRoom)
    form.refused = "a tile of 64x64 holds " + std::to_string(most) + " values; it has room for " +
                   std::to_string(kRoom);
  return form;
}

cudaError_t run(cudaStream_t stream, char* const* parts, const half* x, half* y, int n, int k,
                int t, int split, void* workspace) {
  return SpMM_SplitK_API_bitmap_v3(
      stream, nullptr, reinterpret_cast<half*>(parts[0]), reinterpret_cast<int*>(parts[1]),
      reinterpret_cast<int*>(parts[2]), reinterpret_cast<uint64_t*>(parts[3]),
      reinterpret_cast<int*>(parts[4]), x, y, n, t, k, static_cast<half*>(workspace), split);
}

}  // namespace
const Peer kSpInfer = {"spinfer", pack, run, 8, 64, true};
}  // namespace rivals
