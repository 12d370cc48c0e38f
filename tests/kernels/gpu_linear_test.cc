// What is said of the kernels on a GPU, which needs none.
#include "lacuna/kernels/gpu_linear.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "lacuna/kernels/decode/decode.h"
#include "lacuna/kernels/linear.h"
#include "support/data.h"

namespace lacuna::kernels {
namespace {
using ::testing::AnyOf;
using ::testing::HasSubstr;

Device with_gpu(int major, int minor) {
  return {.gpu = GpuFacts{.name = "a test", .major = major, .minor = minor}};
}

std::string refusal(const char* problem_text, const char* candidate, const Device& device) {
  const Problem problem = *Problem::parse(problem_text);
  const auto& list = (*find_linear_operation(problem.operation))->gpu_candidates();
  return list.find(candidate)->supports(problem, device).refusal();
}

TEST(GpuLibrary, that_is_missing_or_another_says_so) {
  const auto folder = testing::scratch_folder("gpu_library");
  const auto missing = open_gpu_library(folder / "none.so");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code, Code::kNotPossible);
  EXPECT_THAT(missing.error().message, HasSubstr("./dev cuda"));
  std::ofstream(folder / "text.so") << "no library";
  EXPECT_THAT(open_gpu_library(folder / "text.so").error().message, HasSubstr("can't be loaded"));
}

TEST(GpuLibrary, shows_a_kernel_for_every_candidate_and_a_candidate_for_every_kernel) {
  const auto file = std::filesystem::path(LACUNA_BINARY_DIR) / "liblacuna_cuda.so";
  if (!std::filesystem::exists(file)) GTEST_SKIP() << "liblacuna_cuda.so is not built (./dev cuda)";
  const auto library = open_gpu_library(file);
  ASSERT_TRUE(library.ok()) << library.error().message;
  const GpuTable& table = **library;
  EXPECT_NE(table.expand, nullptr);
  EXPECT_NE(table.error_text, nullptr);
  EXPECT_TRUE(table.copy && table.last_error && table.wait && table.record_begin &&
              table.record_end && table.replay && table.forget);
  ASSERT_NE(table.decode, nullptr);
  EXPECT_TRUE(table.decode->gather && table.decode->normalize && table.decode->rotate &&
              table.decode->attend_workspace_bytes && table.decode->attend &&
              table.decode->activate && table.decode->widen);
  for (int32_t i = 0; i < table.linear_count; ++i) {
    const GpuLinearKernel& kernel = *table.linear[i];
    const auto operation = find_linear_operation(kernel.operation);
    ASSERT_TRUE(operation.ok()) << kernel.operation;
    EXPECT_NE((*operation)->gpu_candidates().find(kernel.name), nullptr) << kernel.name;
    EXPECT_TRUE(kernel.scratch_bytes && kernel.measure && kernel.pack && kernel.max_tokens &&
                kernel.many_tokens && kernel.unpack && kernel.plan && kernel.workspace_bytes &&
                kernel.run)
        << kernel.name;
    EXPECT_EQ(kernel.rounded_from == nullptr, kernel.plan_rounded == nullptr) << kernel.name;
  }
  for (const LinearOperation& operation : linear_operations())
    for (const Candidate& candidate : operation.gpu_candidates()) {
      const bool in_library = candidate.name != kExpandCublas && candidate.name != kCublas;
      bool found = false;
      for (int32_t i = 0; i < table.linear_count; ++i)
        found = found || (table.linear[i]->operation == operation.name &&
                          table.linear[i]->name == candidate.name);
      EXPECT_EQ(found, in_library) << candidate.name;
    }
}

TEST(GpuCandidates, say_what_they_need) {
  const char* mma_sp = "cuda_sm90_mma_sp";
  const Device hopper = with_gpu(9, 0);
  EXPECT_THAT(refusal("linear_nm:bf16:4096x4096x64:2:4", mma_sp, hopper),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_THAT(refusal("linear_nm:bf16:1x128x1:2:4", mma_sp, hopper),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_nm:bf16:4096x4096x65:2:4", mma_sp, hopper), "needs 1 to 64 tokens");
  EXPECT_THAT(refusal("linear_nm:bf16:4096x4032x1:2:4", mma_sp, hopper), HasSubstr("128 inputs"));
  EXPECT_EQ(refusal("linear_nm:bf16:4096x4096x1:1:4", mma_sp, hopper), "needs 2:4");
  for (const char* types : {"f16", "bf16/f32", "f32", "int8"})
    EXPECT_EQ(refusal(fmt::format("linear_nm:{}:4096x4096x1:2:4", types).c_str(), mma_sp, hopper),
              "needs bf16 values and bf16 activations");
  EXPECT_EQ(refusal("linear_nm:bf16:4096x4096x1:2:4", mma_sp, with_gpu(8, 0)),
            "needs compute capability 9.0 (this GPU has 8.0)");
  EXPECT_EQ(refusal("linear_nm:bf16:4096x4096x1:2:4", mma_sp, {.gpu = GpuFacts{}}),
            "needs a GPU, but no NVIDIA GPU or driver answers");
  EXPECT_EQ(refusal("linear_nm:bf16:4096x4096x1:2:4", mma_sp, Device{}), "needs weights on a GPU");
  // Every card from 8.0 on; and float16, which is a candidate of its own.
  EXPECT_THAT(refusal("linear_nm:bf16:64x128x64:2:4", "cuda_sm80_mma_sp", with_gpu(8, 0)),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_nm:bf16:64x128x1:2:4", "cuda_sm80_mma_sp", with_gpu(7, 5)),
            "needs compute capability 8.0 or later (this GPU has 7.5)");
  const char* lt = "cuda_sm80_cusparselt";
  EXPECT_THAT(refusal("linear_nm:bf16:64x128x65:2:4", lt, with_gpu(8, 0)),
              AnyOf("", HasSubstr("needs the GPU kernels"), HasSubstr("libcusparseLt")));
  EXPECT_EQ(refusal("linear_nm:bf16:64x128x64:2:4", lt, hopper), "needs 65 to 2^24-1 tokens");
  EXPECT_THAT(refusal("linear_nm:bf16:72x128x65:2:4", lt, hopper), HasSubstr("16 outputs"));
  EXPECT_THAT(refusal("linear_nm:bf16:64x96x65:2:4", lt, hopper), HasSubstr("64 inputs"));
  for (const auto& [problem, name] :
       {std::pair{"linear_nm:{}:64x128x1:2:4", "cuda_sm90_mma_sp_f16"},
        {"linear_nm:{}:64x128x1:2:4", "cuda_sm80_mma_sp_f16"},
        {"linear_bitmap:{}:64x128x1:0.5", "cuda_sm90_scatter_f16"},
        {"linear_bsr:{}:64x128x1:block16x16@0.8", "cuda_sm80_block_f16"},
        {"linear_dense:{}:64x128x1", "cuda_sm90_stream_f16"}}) {
    const auto answer = [&](const char* types) {
      return refusal(fmt::format(fmt::runtime(problem), types).c_str(), name, hopper);
    };
    EXPECT_THAT(answer("f16"), AnyOf("", HasSubstr("needs the GPU kernels"))) << name;
    EXPECT_EQ(answer("bf16"), "needs f16 values and f16 activations") << name;
    EXPECT_EQ(answer("f16/f32"), "needs f16 values and f16 activations") << name;
  }
  const char* gap = "cuda_sm90_gap";
  EXPECT_THAT(refusal("linear_bitmap:bf16:1x1x4:0.5", gap, hopper),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x5:0.5", gap, hopper), "needs 1 to 4 tokens");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x1:0.3", gap, hopper), "needs 40 % zeros or more");
  EXPECT_EQ(refusal("linear_bitmap:f16:64x64x1:0.5", gap, hopper),
            "needs bf16 values and bf16 activations");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x65473x1:0.5", gap, hopper), "needs 1 to 65472 inputs");
  EXPECT_THAT(refusal("linear_bitmap:bf16:64x53001x2:0.5", gap, hopper), HasSubstr("53000"));
  const char* window = "cuda_sm90_window";
  for (const char* taken : {"64x24900x3:0.5", "1x1x4:0.4", "64x10600x8:0.8"})
    EXPECT_THAT(refusal(("linear_bitmap:bf16:" + std::string(taken)).c_str(), window, hopper),
                AnyOf("", HasSubstr("needs the GPU kernels")))
        << taken;
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x2:0.5", window, hopper), "needs 3 tokens or more");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x9:0.8", window, hopper), "needs 1 to 8 tokens");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x4:0.3", window, hopper), "needs 40 % zeros or more");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x5:0.7", window, hopper),
            "needs 72 % zeros or more from 5 tokens on");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x24901x4:0.8", window, hopper),
            "needs 1 to 24900 inputs");
  EXPECT_THAT(refusal("linear_bitmap:bf16:64x10601x5:0.8", window, hopper), HasSubstr("10600"));
  EXPECT_EQ(refusal("linear_bitmap:f16:64x64x4:0.5", window, hopper),
            "needs bf16 values and bf16 activations");
  for (const auto& [name, values] :
       {std::pair{"cuda_sm90_gap_fp8", "fp8"}, {"cuda_sm90_gap_int8", "int8"}}) {
    const auto answer = [&](const std::string& types, const char* rest) {
      return refusal(("linear_bitmap:" + types + ":" + rest).c_str(), name, hopper);
    };
    EXPECT_THAT(answer(values, "1x1x2:0.5"), AnyOf("", HasSubstr("needs the GPU kernels")));
    EXPECT_EQ(answer(values, "64x128x3:0.5"), "needs 1 to 2 tokens");
    EXPECT_EQ(answer(values, "64x128x1:0.4"), "needs 45 % zeros or more");
    EXPECT_EQ(answer(values, "64x65473x1:0.5"), "needs 1 to 65472 inputs");
    EXPECT_EQ(answer("bf16", "64x128x1:0.5"),
              fmt::format("needs {} values and bf16 activations", values));
  }
  const char* scatter = "cuda_sm90_scatter";
  EXPECT_THAT(refusal("linear_bitmap:bf16:1x8x64:0.5", scatter, hopper),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x65:0.6", scatter, hopper), "needs 1 to 64 tokens");
  EXPECT_THAT(refusal("linear_bitmap:bf16:64x64x16:0.45", scatter, hopper),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x16:0.4", scatter, hopper),
            "needs 45 % zeros or more");
  EXPECT_THAT(refusal("linear_bitmap:bf16:64x68x8:0.6", scatter, hopper),
              HasSubstr("multiple of 8 inputs"));
  EXPECT_EQ(refusal("linear_bitmap:f32:64x64x8:0.6", scatter, hopper),
            "needs bf16 values and bf16 activations");
  EXPECT_EQ(refusal("linear_bitmap:bf16:64x64x8:0.6", scatter, with_gpu(8, 9)),
            "needs compute capability 9.0 (this GPU has 8.9)");
  const char* csr = "cuda_sm80_cusparse";
  EXPECT_THAT(refusal("linear_csr:bf16:1x1x64:0.9", csr, with_gpu(8, 0)),
              AnyOf("", HasSubstr("needs the GPU kernels"), HasSubstr("libcusparse")));
  EXPECT_EQ(refusal("linear_csr:f16:64x64x1:0.9", csr, hopper),
            "needs bf16 values and bf16 activations");
  EXPECT_EQ(refusal("linear_csr:bf16:65536x32768x1:0.9", csr, hopper),
            "needs a weight of fewer than 2^31 places");
  EXPECT_EQ(refusal("linear_csr:bf16:64x64x1:0.9", csr, with_gpu(7, 5)),
            "needs compute capability 8.0 or later (this GPU has 7.5)");
  const char* stream = "cuda_sm90_stream";
  EXPECT_THAT(refusal("linear_dense:bf16:1x8x1", stream, hopper),
              AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_dense:bf16:64x64x2", stream, hopper), "needs 1 token");
  EXPECT_THAT(refusal("linear_dense:bf16:64x60x1", stream, hopper), HasSubstr("multiple of 8"));
  EXPECT_THAT(refusal("linear_dense:bf16:64x32776x1", stream, hopper), HasSubstr("at most 32768"));
  EXPECT_EQ(refusal("linear_dense:f16:64x64x1", stream, hopper),
            "needs bf16 values and bf16 activations");
  for (const auto& [name, values] : {std::pair{"cuda_sm90_fp8", "fp8"}, {"cuda_sm90_int8", "int8"}})
    for (const std::string operation : {"linear_dense", "linear_nm"}) {
      const std::string pattern = operation == "linear_nm" ? ":2:4" : "";
      const auto answer = [&](const std::string& types, const char* shape) {
        return refusal((operation + ":" + types + ":" + shape + pattern).c_str(), name, hopper);
      };
      EXPECT_THAT(answer(values, "1x128x64"), AnyOf("", HasSubstr("needs the GPU kernels")));
      EXPECT_EQ(answer(values, "64x128x65"), "needs 1 to 64 tokens");
      EXPECT_THAT(answer(values, "64x192x1"), HasSubstr("multiple of 128"));
      for (const std::string& types :
           {std::string("bf16"), std::string("int4g64"), values + std::string("/f32")})
        EXPECT_EQ(answer(types, "64x128x1"),
                  fmt::format("needs {} values and bf16 activations", values));
    }
  EXPECT_EQ(refusal("linear_nm:fp8:64x128x1:1:4", "cuda_sm90_fp8", hopper), "needs 2:4");
  for (const auto& [name, values] :
       {std::pair{"cuda_sm90_fp8", "fp8"}, {"cuda_sm90_int8", "int8"}}) {
    const auto answer = [&](const std::string& types, const char* shape) {
      return refusal(("linear_bitmap:" + types + ":" + shape + ":0.5").c_str(), name, hopper);
    };
    EXPECT_THAT(answer(values, "1x1x64"), AnyOf("", HasSubstr("needs the GPU kernels")));
    EXPECT_EQ(answer(values, "64x128x65"), "needs 1 to 64 tokens");
    EXPECT_EQ(answer(values, "64x28673x1"), "needs 1 to 28672 inputs");
    EXPECT_EQ(answer("bf16", "64x128x1"),
              fmt::format("needs {} values and bf16 activations", values));
  }
  const char* block = "cuda_sm80_block";
  for (const Device& device : {hopper, with_gpu(8, 0), with_gpu(12, 0)})
    EXPECT_THAT(refusal("linear_bsr:bf16:1x8x64:block16x32@0.8", block, device),
                AnyOf("", HasSubstr("needs the GPU kernels")));
  EXPECT_EQ(refusal("linear_bsr:bf16:64x64x8:block8x32@0.8", block, hopper),
            "needs blocks of a multiple of 16 rows and columns");
  EXPECT_EQ(refusal("linear_bsr:f16:64x64x8:block64x64@0.8", block, hopper),
            "needs bf16 values and bf16 activations");
  EXPECT_EQ(refusal("linear_bsr:bf16:64x64x8:block64x64@0.4", block, hopper),
            "needs 50 % zeros or more");
  EXPECT_THAT(refusal("linear_bsr:bf16:64x68x8:block64x64@0.8", block, hopper),
              HasSubstr("multiple of 8 inputs"));
  EXPECT_EQ(refusal("linear_bsr:bf16:64x64x8:block64x64@0.8", block, with_gpu(7, 5)),
            "needs compute capability 8.0 or later (this GPU has 7.5)");
  for (const char* problem : {"linear_nm:f32:7x9x500:3:5", "linear_bitmap:int8:7x9x500:0.5"}) {
    EXPECT_EQ(refusal(problem, kExpandCublas, hopper), "");
    EXPECT_EQ(refusal(problem, kExpandCublas, Device{}), "needs weights on a GPU");
  }
  EXPECT_EQ(refusal("linear_dense:f16:7x9x500", kCublas, hopper), "");
}

TEST(GpuCandidates, are_forced_on_a_gpu_alone_and_the_others_in_host_memory_alone) {
  const Device hopper = with_gpu(9, 0);
  const Problem problem = *Problem::parse("linear_nm:bf16:64x100x1:2:4");
  const LinearOperation& operation = **find_linear_operation("linear_nm");
  setenv("LACUNA_FORCE", "linear_nm:cpu_portable,linear_nm:cuda_sm90_mma_sp", 1);
  EXPECT_EQ(operation.plan(problem, Device{})->candidate->name, "cpu_portable");
  const auto refused = choose_gpu_kernel(operation, problem, hopper);
  unsetenv("LACUNA_FORCE");
  ASSERT_FALSE(refused.ok()) << "100 inputs";
  EXPECT_THAT(refused.error().message, HasSubstr("LACUNA_FORCE asks for cuda_sm90_mma_sp"));
  const auto expanded = choose_gpu_kernel(operation, problem, hopper);
  ASSERT_TRUE(expanded.ok()) << expanded.error().message;
  EXPECT_EQ(*expanded, nullptr) << "the dense product takes it";
}

TEST(GpuCandidates, CsrOnAGpuOnlyWhereItIsForced) {
  const Device gpu = with_gpu(9, 0);
  const Problem problem = *Problem::parse("linear_bitmap:bf16:64x64x1:0.95");
  EXPECT_EQ(linear_operation_on_gpu(problem, gpu)->name, "linear_bitmap");
  setenv("LACUNA_FORCE", "linear_csr:cuda_sm80_cusparse", 1);
  EXPECT_EQ(linear_operation_on_gpu(problem, gpu)->name, "linear_csr");
  EXPECT_EQ(linear_operation_on_gpu(*Problem::parse("linear_nm:bf16:64x64x1:2:4"), gpu)->name,
            "linear_nm");
  unsetenv("LACUNA_FORCE");
}

}  // namespace
}  // namespace lacuna::kernels
