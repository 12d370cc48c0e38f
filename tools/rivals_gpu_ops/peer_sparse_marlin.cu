// Sparse-Marlin (https://github.com/IST-DASLab/Sparse-Marlin): 2:4 codes of 4 bits, one scale for
// 128 columns, sparse tensor cores, x in fp16.
#include <cstdint>

#include "smarlin/marlin/marlin_cuda_kernel_nm.cu"

#include "peers.h"

namespace rivals {
namespace {

constexpr int kGroup = 128;  // columns of a scale

cudaError_t run(cudaStream_t stream, char* const* parts, const half* x, half* y, int n, int k,
                int t, int, void*) {
  const int error = marlin::marlin_cuda_2_4(x, parts[0], parts[1], y, parts[2], n, t, k, parts[3],
                                            kGroup / 2, 0, stream, -1, -1, -1, 16);
  return error == 0 ? cudaGetLastError() : cudaErrorUnknown;
}

/// The two kept places of four, in order, at least two whatever the codes are.
void places(const signed char* group, int* first, int* second) {
  int found[2], count = 0;
  for (int j = 0; j < 4 && count < 2; ++j)
    if (group[j] != 0) found[count++] = j;
  if (count == 0) found[0] = 0, found[1] = 1;
  if (count == 1) {
    found[1] = found[0] == 3 ? 3 : found[0] + 1;
    if (found[0] == 3) found[0] = 2;
  }
  *first = found[0];
  *second = found[1];
}

}  // namespace

// Its layout. Kept codes + 8 form [k / 2, n], in tiles of 16 rows by 64 columns, 128 words each. A
// word of a lane is the part of four fragments that this lane multiplies, even nibbles before odd
// ones. Metadata: 16 bits for 16 columns, interleaved as CUTLASS does.
Form pack_sparse_marlin(const signed char* codes, const float* scales, int n, int k) {
  const int half_k = k / 2;
  std::vector<unsigned char> kept(size_t(half_k) * n);
  std::vector<uint16_t> meta(size_t(n) * (k / 16));
  constexpr int kSlab = 32;
  on_all_threads(n / kSlab, [&](int slab) {
    for (int r = slab * kSlab; r < (slab + 1) * kSlab; ++r) {
      for (int c = 0; c < k / 16; ++c) {
        unsigned bits = 0;
        for (int g = 0; g < 4; ++g) {
          const signed char* group = codes + size_t(r) * k + 16 * c + 4 * g;
          int first, second;
          places(group, &first, &second);
          bits |= unsigned(first | second << 2) << (4 * g);
          unsigned char* to = kept.data() + size_t(8 * c + 2 * g) * n + r;
          to[0] = static_cast<unsigned char>(group[first] + 8);
          to[n] = static_cast<unsigned char>(group[second] + 8);
        }
        // Rows of 64 are shuffled, 2 x 2 of rows and columns transposed, columns go by pairs.
        int row = r / 64 * 64 + r % 2 * 2 + r % 8 / 4 + r % 4 / 2 * 32 + r % 64 / 8 * 4, column = c;
        if (row % 2 == 0 && column % 2 == 1)
          ++row, --column;
        else if (row % 2 == 1 && column % 2 == 0)
          --row, ++column;
        meta[(size_t(column / 2) * n + row) * 2 + column % 2] = static_cast<uint16_t>(bits);
      }
    }
  });
  std::vector<uint32_t> words(size_t(half_k / 16) * n * 2);
  on_all_threads(half_k / 16, [&](int tile) {
    for (int block = 0; block < n / 64; ++block)
      for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < 4; ++j) {
          constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
          uint32_t word = 0;
          for (int q = 0; q < 8; ++q) {
            const int v = kOrder[q], pair = v % 4;
            const int row = 2 * (lane % 4) + pair % 2 + 8 * (pair / 2);
            const int column = 16 * (lane / 8) + 8 * (lane / 4 % 2) + 4 * (v / 4) + j;
            word |= uint32_t(kept[(size_t(tile) * 16 + row) * n + block * 64 + column]) << (4 * q);
          }
          words[size_t(tile) * n * 2 + block * 128 + lane * 4 + j] = word;
        }
  });
  std::vector<half> group_scales(size_t(k / kGroup) * n);
  constexpr int kScaleOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (size_t i = 0; i < group_scales.size(); ++i)
    group_scales[i] = __float2half(scales[i / 8 * 8 + kScaleOrder[i % 8]]);
  const std::vector<int> locks(size_t(n) / 128 * 16, 0);
  const size_t bytes = words.size() * 4 + meta.size() * 2 + group_scales.size() * 2;
  return {{bytes_of(words), bytes_of(meta), bytes_of(group_scales), bytes_of(locks)}, bytes};
}

const Peer kSparseMarlin = {"sparse_marlin", nullptr, run, 1, 64, false};
}  // namespace rivals
