#!/bin/bash
# Builds bench, which holds our GPU kernels beside the libraries and the public kernels.
#   git clone https://github.com/vlejd/macko_spmv macko               # afa70330a4c1
#   git clone https://github.com/HPMLL/SpInfer_EuroSys25 spinfer      # 2410ef77998c
#   git clone https://github.com/AlibabaResearch/flash-llm flashllm   # 1d2828ac63fa
#   git clone https://github.com/IST-DASLab/Sparse-Marlin smarlin     # c2ffa2395a3a
#   pip download --no-deps nvidia-cusparselt-cu13==0.8.0 && unzip nvidia_cusparselt_cu13-*.whl
#   PEERS=folder of these CUSPARSELT=.../nvidia/cusparselt OUT=build/gpu tools/rivals_gpu_ops/build.sh
#   tools/rivals_gpu_ops/real_masks.py --out masks ...   # how to, there
#   build/gpu/rivals_gpu_ops build/release/liblacuna_cuda.so rivals.csv 012345 1,2,4,8,16,32,64 \
#     dense,ours,cusparselt,cusparse,macko,spinfer,flash_llm,sparse_marlin,real masks
# Their code stays outside this repository and is compiled as it is, with their flags, for sm_90; of
# a copy of Sparse-Marlin's the cache hint goes, of which ptxas 13 makes an illegal instruction.
set -e
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
out=${OUT:?where to build}
mkdir -p "$out"
peer="nvcc -O3 -std=c++17 -gencode arch=compute_90,code=sm_90 -I${PEERS:?their sources} -I$here"
if [ -z "$ONLY_BENCH" ]; then
  $peer -c "$here/peer_macko.cu" -o "$out/peer_macko.o"
  for rows in 4 8 16; do
    sed "s/^#define BLOCK_SIZE 32/#define BLOCK_SIZE $rows/; /#include/d" \
      "$PEERS/macko/src/macko_spmv/cuda/kernels.cuh" > "$out/macko_$rows.cuh"
    $peer -DMACKO_ROWS=$rows "-DMACKO_KERNELS=\"$(cd "$out" && pwd)/macko_$rows.cuh\"" \
      -c "$here/peer_macko.cu" -o "$out/peer_macko_$rows.o"
  done
  for name in spinfer flash_llm; do
    $peer -maxrregcount=255 --use_fast_math -c "$here/peer_$name.cu" -o "$out/peer_$name.o"
  done
  rm -rf "$out/smarlin" && cp -r "$PEERS/smarlin" "$out/smarlin"
  sed -i '/createpolicy/d; s/\.L2::cache_hint \[%0\], \[%1\], %2, p;/ [%0], [%1], %2;/' \
    "$out/smarlin/marlin/common/mem.h"
  $peer -I"$out" --expt-relaxed-constexpr -c "$here/peer_sparse_marlin.cu" \
    -o "$out/peer_sparse_marlin.o"
fi
nvcc -O3 -std=c++20 -gencode arch=compute_90a,code=sm_90a -cudart static -I"$root/src" \
  -I"$root/bench/lab" -I"${CUSPARSELT:?its folder}/include" "$here/bench.cu" "$out"/peer_*.o \
  -lcublas -lcublasLt -lcusparse -L"$CUSPARSELT/lib" -l:libcusparseLt.so.0 -o "$out/rivals_gpu_ops"
