// Flash-LLM (https://github.com/AlibabaResearch/flash-llm): value and place of each weight in tiles
// of 128 x 64, expanded in shared memory, tensor cores, 8 tokens and more.
#include <cstdlib>

#define SplitK_Reduction flash_llm_split_reduction
#include "flashllm/csrc/SpMM_API.cu"

#include "peers.h"

namespace rivals {
namespace {

/// Its own code packs 128 rows at a time, so that all threads pack; the slabs are joined.
Form pack(const half* w, int n, int k) {
  constexpr int kSlab = 128;
  const int slabs = n / kSlab, tiles = k / 64;
  struct Slab {
    uint32_t* values;
    int* tiles;  // in vectors of 4 values
  };
  std::vector<Slab> packed(slabs);
  on_all_threads(slabs, [&](int i) {
    InitSparseMatrixA_API(const_cast<half*>(w) + size_t(i) * kSlab * k, kSlab, 8, k,
                          &packed[i].values, &packed[i].tiles);
  });
  std::vector<size_t> first(slabs + 1, 0);
  for (int i = 0; i < slabs; ++i) first[i + 1] = first[i] + packed[i].tiles[tiles];
  const size_t count = first[slabs], all = size_t(slabs) * tiles;
  std::vector<uint32_t> values(count * 4 + 64, 0);
  std::vector<int> starts(all + 8, int(count));
  on_all_threads(slabs, [&](int i) {
    const Slab& s = packed[i];
    std::memcpy(values.data() + first[i] * 4, s.values, size_t(s.tiles[tiles]) * 16);
    for (int j = 0; j < tiles; ++j) starts[size_t(i) * tiles + j] = int(first[i]) + s.tiles[j];
    free(s.values);
    free(s.tiles);
  });
  return {{bytes_of(values), bytes_of(starts)}, count * 16 + all * 4};
}

cudaError_t run(cudaStream_t stream, char* const* parts, const half* x, half* y, int n, int k,
                int t, int split, void* workspace) {
  return SpMM_SplitK_API(stream, nullptr, reinterpret_cast<uint4*>(parts[0]),
                         reinterpret_cast<int*>(parts[1]), x, y, n, t, k,
                         static_cast<half*>(workspace), split);
}

}  // namespace
const Peer kFlashLlm = {"flash_llm", pack, run, 8, 64, true};
}  // namespace rivals
