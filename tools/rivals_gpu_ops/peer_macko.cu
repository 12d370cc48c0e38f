// MACKO (https://github.com/vlejd/macko_spmv): values and 4-bit gaps of each row, one token.
// -DMACKO_ROWS=R: the same kernel with R rows a block instead of its 32 (build.sh copies it).
#include <cstdlib>

#include "peers.h"

#ifdef MACKO_ROWS
#include <cublas_v2.h>
namespace rows {
#include MACKO_KERNELS
}  // namespace rows
using rows::macko_spmv;
#else
#include "macko/src/macko_spmv/cuda/cpu_compressor.cuh"
#include "macko/src/macko_spmv/cuda/kernels.cuh"
#define MACKO_ROWS 32
#endif

namespace rivals {

namespace {
cudaError_t run(cudaStream_t stream, char* const* parts, const half* x, half* y, int n, int k, int,
                int, void*) {
  macko_spmv<false><<<dim3((n + MACKO_ROWS - 1) / MACKO_ROWS), dim3(32, MACKO_ROWS), 0, stream>>>(
      reinterpret_cast<half*>(parts[0]), reinterpret_cast<unsigned char*>(parts[1]),
      reinterpret_cast<int*>(parts[2]), x, n, k, 1.f, 0.f, y);
  return cudaGetLastError();
}
}  // namespace

#if MACKO_ROWS == 32
namespace {
/// Its own code packs 64 rows at a time, so that all threads pack; the slabs are joined.
Form pack(const half* w, int n, int k) {
  constexpr int kSlab = 64;
  const int slabs = n / kSlab;
  struct Slab {
    int* rows;
    unsigned char* gaps;
    half* values;
    int count, padded;
  };
  std::vector<Slab> packed(slabs);
  on_all_threads(slabs, [&](int i) {
    Slab& s = packed[i];
    compress_rows_cpu(w + size_t(i) * kSlab * k, kSlab, k, &s.rows, &s.gaps, &s.values, &s.count,
                      &s.padded);
  });
  std::vector<size_t> first(slabs + 1, 0);
  for (int i = 0; i < slabs; ++i) first[i + 1] = first[i] + packed[i].count;
  const size_t padded = (first[slabs] + 15) / 8 * 8;
  std::vector<half> values(padded, __float2half(0.f));
  std::vector<unsigned char> nibbles(padded, 0), gaps(padded / 2);
  std::vector<int> rows(n + 1, 0);
  on_all_threads(slabs, [&](int i) {
    const Slab& s = packed[i];
    for (int r = 1; r <= kSlab; ++r) rows[i * kSlab + r] = int(first[i]) + s.rows[r];
    std::memcpy(values.data() + first[i], s.values, size_t(s.count) * 2);
    for (int j = 0; j < s.count; ++j) nibbles[first[i] + j] = (s.gaps[j / 2] >> (4 * (j & 1))) & 15;
    free(s.rows);
    free(s.gaps);
    free(s.values);
  });
  for (size_t j = 0; j < gaps.size(); ++j) gaps[j] = nibbles[2 * j] | nibbles[2 * j + 1] << 4;
  const size_t bytes = first[slabs] * 2 + first[slabs] / 2 + rows.size() * 4;
  return {{bytes_of(values), bytes_of(gaps), bytes_of(rows)}, bytes};
}
}  // namespace
const Peer kMacko = {"macko", pack, run, 1, 1, false};
#elif MACKO_ROWS == 16
const Peer kMackoRows16 = {"macko_rows16", nullptr, run, 1, 1, false};
#elif MACKO_ROWS == 8
const Peer kMackoRows8 = {"macko_rows8", nullptr, run, 1, 1, false};
#elif MACKO_ROWS == 4
const Peer kMackoRows4 = {"macko_rows4", nullptr, run, 1, 1, false};
#endif

}  // namespace rivals
