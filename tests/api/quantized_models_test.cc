// Whole models of codes against their dense export.
#include <gtest/gtest.h>

#include "lacuna/api/jobs.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::api {
namespace {
using format::Quantization;
using model::Decoder;
using testing::must;

std::filesystem::path quantized(const std::filesystem::path& model, const char* code,
                                bool keep_head) {
  const auto folder = testing::scratch_folder("quantized") / "model";
  must(convert(model, folder,
               {.quantization = must(Quantization::parse(code)), .keep_head = keep_head}));
  return folder;
}

TEST(QuantizedModel, IsTheModelOfItsDenseExport) {
  // Tied (the demo model) and untied ends.
  for (const auto& model : {testing::demo_model_folder(),
                            testing::source_folder() / "tests/golden/tiny_models/qwen3"}) {
    ASSERT_TRUE(std::filesystem::exists(model)) << model;
    for (const bool keep_head : {false, true}) {
      const auto folder = quantized(model, "int8", keep_head);
      const auto dense = testing::scratch_folder("dense") / "model";
      must(convert(folder, dense, {.store = io::Store::kDense}));
      const auto checkpoint = must(io::Checkpoint::open(folder));
      const auto load = [&](bool int8_activations) {
        return must(Decoder::load(checkpoint, {at::kCPU, at::kFloat, int8_activations}));
      };
      const Decoder codes = load(false), rounded = load(true),
                    values = testing::open_decoder(dense);
      EXPECT_LT(codes.weight_bytes(),
                (keep_head ? 0.8 : 0.6) * static_cast<double>(values.weight_bytes()));
      const at::Tensor ids = testing::ids_tensor({1, 5, 9, 2, 7, 3, 11, 4, 8, 6});
      // Codes are rounded to float32 here, the export to the values' own type.
      EXPECT_LE(testing::relative_difference(codes.forward(ids), values.forward(ids)), 2e-2)
          << model << " " << keep_head;
      // Activations rounded to 127 steps cost about as much again.
      const double off = testing::relative_difference(rounded.forward(ids), values.forward(ids));
      EXPECT_LE(off, 6e-2) << model << " " << keep_head;
      EXPECT_GT(off, 1e-5) << model << ": activations were not rounded";
    }
  }
}

}  // namespace
}  // namespace lacuna::api
