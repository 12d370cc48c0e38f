// Where things lie in a packed unit of 2:4 codes of 8 bits: 16 rows x 128 columns, 1,280 bytes
// (cuda_sm90_coded.cu has the picture).
#pragma once

namespace lacuna::kernels::linear_nm {

inline constexpr int kCodedMetadataBytes = 256;
inline constexpr int kCodedPairBytes = 512;  // of two steps, 64 columns
inline constexpr int kCodedUnitBytes = kCodedMetadataBytes + 2 * kCodedPairBytes;

}  // namespace lacuna::kernels::linear_nm
