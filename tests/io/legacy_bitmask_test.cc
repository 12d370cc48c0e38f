// The stores of compressed-tensors, against files that it wrote
// (tools/golden/compressed_tensors.py).
#include "lacuna/io/legacy_bitmask.h"

#include <bit>
#include <cstring>
#include <map>

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using format::CompactMatrix;
using format::Pattern;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

fs::path golden(const std::string& name) {
  return lacuna::testing::source_folder() / "tests/golden/compressed_tensors" / name;
}

/// -0.0 is a zero: it comes back as +0.0.
Tensor without_negative_zeros(const Tensor& tensor) {
  if (tensor.shape.size() != 2) return tensor;
  return format::expand(format::compress(tensor, Pattern::unstructured()).value());
}

void expect_golden(const std::string& folder, const std::string& dense, Store store,
                   const Pattern& pattern) {
  const auto checkpoint = Checkpoint::open(golden(folder));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  const auto want = SafetensorsFile::open(golden(dense)).value();
  EXPECT_EQ(checkpoint->weights().size(), want.entries().size());
  int matrices = 0;
  for (const auto& entry : want.entries()) {
    ASSERT_TRUE(checkpoint->contains(entry.name)) << entry.name;
    const WeightInfo& info = checkpoint->weights().at(entry.name);
    EXPECT_EQ(info.shape, entry.shape) << entry.name;
    EXPECT_EQ(info.dtype, entry.dtype) << entry.name;
    const auto read = checkpoint->dense(entry.name);
    ASSERT_TRUE(read.ok()) << read.error().message;
    const Tensor expected = without_negative_zeros(want.tensor(entry.name).value());
    EXPECT_TRUE(equal(*read, expected)) << entry.name;
    if (entry.shape.size() != 2) continue;
    ++matrices;
    EXPECT_EQ(info.store, store);
    EXPECT_EQ(info.pattern, pattern);
    const auto matrix = std::get<CompactMatrix>(checkpoint->weight(entry.name).value());
    EXPECT_EQ(matrix.pattern, pattern);
    EXPECT_TRUE(format::validate(matrix).empty());
    EXPECT_TRUE(equal(format::expand(matrix), expected)) << entry.name;
  }
  EXPECT_EQ(matrices, 3);
}

TEST(LegacyBitmask, ReadsWhatCompressedTensorsWrote) {
  expect_golden("sparse-bitmask", "dense-sparse-bitmask.safetensors", Store::kSparseBitmask,
                Pattern::unstructured());
  expect_golden("sparse-24-bitmask", "dense-sparse-24-bitmask.safetensors", Store::kSparse24Bitmask,
                Pattern::keep_of(2, 4));
}

TEST(LegacyBitmask, ReadsTheOlderNamesAndCompressedVectors) {
  expect_golden("sparse-bitmask-0.4.0", "dense-sparse-bitmask.safetensors", Store::kSparseBitmask,
                Pattern::unstructured());
  const auto checkpoint = Checkpoint::open(golden("sparse-bitmask-0.4.0")).value();
  EXPECT_THAT(checkpoint.weights().at("model.layers.0.mlp.up_proj.bias").parts,
              ElementsAre("model.layers.0.mlp.up_proj.bias.bitmask",
                          "model.layers.0.mlp.up_proj.bias.compressed",
                          "model.layers.0.mlp.up_proj.bias.shape",
                          "model.layers.0.mlp.up_proj.bias.row_offsets"));
}

/// Four bits of a mask [rows, stride]: those of one group of a 2:4 matrix.
int group_bits(const Bytes& mask, int64_t stride, int64_t row, int64_t group) {
  return mask.as<uint8_t>()[row * stride + group / 2] >> group % 2 * 4 & 15;
}

/// The bits and values of two 2:4 stores of one weight. A group with less than two non-zeros stores
/// zeros of the writer's choice, so only its number of bits is given. Returns the groups that leave
/// no choice.
int expect_same_groups(const Tensor& dense, const Tensor& our_mask, const Tensor& their_mask,
                       const Tensor& our_values, const Tensor& their_values) {
  const auto kept = format::compress(dense, Pattern::unstructured()).value();
  const int64_t stride = kept.bitmap_stride_bytes(), groups = dense.shape[1] / 4;
  const size_t pair = 2 * size_bytes(dense.dtype);
  int full = 0;
  for (int64_t row = 0; row < dense.shape[0]; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int non_zeros = group_bits(kept.bitmap, stride, row, group);
      const int ours = group_bits(our_mask.bytes, stride, row, group);
      EXPECT_EQ(std::popcount(static_cast<unsigned>(ours)), 2);
      EXPECT_EQ(ours & non_zeros, non_zeros) << "row " << row << " group " << group;
      if (std::popcount(static_cast<unsigned>(non_zeros)) < 2) continue;
      ++full;
      EXPECT_EQ(ours, group_bits(their_mask.bytes, stride, row, group));
      const size_t at = static_cast<size_t>(row * groups + group) * pair;
      EXPECT_EQ(std::memcmp(our_values.bytes.data() + at, their_values.bytes.data() + at, pair), 0)
          << "row " << row << " group " << group;
    }
  }
  return full;
}

/// Writes the golden dense matrices as legacy and compares each tensor with theirs.
void compare_parts(const std::string& store_folder, Store store, const Pattern& pattern,
                   size_t other_tensors) {
  const auto dense =
      SafetensorsFile::open(golden("dense-" + store_folder + ".safetensors")).value();
  const auto theirs = SafetensorsFile::open(golden(store_folder) / "model.safetensors").value();
  const bool two_of_four = store == Store::kSparse24Bitmask;
  size_t compared = 0;
  for (const auto& entry : dense.entries()) {
    if (entry.shape.size() != 2) continue;
    const Tensor weight = dense.tensor(entry.name).value();
    const auto ours =
        legacy_parts(entry.name, format::compress(weight, pattern).value(), store).value();
    std::map<std::string, std::pair<Tensor, Tensor>> parts;  // by the end of the name
    for (const auto& [name, tensor] : ours) {
      const auto want = theirs.tensor(name);
      ASSERT_TRUE(want.ok()) << name;
      EXPECT_EQ(tensor.dtype, want->dtype) << name;
      EXPECT_EQ(tensor.shape, want->shape) << name;
      const std::string part = name.substr(name.rfind('.') + 1);
      if (!two_of_four || part == "shape") {
        EXPECT_TRUE(equal(tensor, *want)) << name;
      }
      parts[part] = {tensor, *want};
      ++compared;
    }
    if (!two_of_four) continue;
    const auto& [our_mask, their_mask] = parts.at("bitmask");
    const auto& [our_values, their_values] = parts.at("compressed");
    ASSERT_EQ(our_mask.bytes.size(), their_mask.bytes.size());
    ASSERT_EQ(our_values.bytes.size(), their_values.bytes.size());
    EXPECT_GT(expect_same_groups(weight, our_mask, their_mask, our_values, their_values), 10)
        << entry.name;
  }
  EXPECT_EQ(compared, two_of_four ? 9 : 12);
  EXPECT_EQ(theirs.entries().size(), compared + other_tensors);
}

TEST(LegacyBitmask, WritesTheTensorsThatCompressedTensorsWrites) {
  // Theirs have the bias besides, and of a vector of weights its four parts.
  compare_parts("sparse-bitmask", Store::kSparseBitmask, Pattern::unstructured(), 5);
  compare_parts("sparse-24-bitmask", Store::kSparse24Bitmask, Pattern::keep_of(2, 4), 1);
}

const std::string kWeight = "a.b.weight";

/// A folder with one legacy weight, changed.
Result<Weight> read_changed(const Pattern& pattern,
                            const std::function<void(std::vector<NamedTensor>&)>& change) {
  const auto matrix = random_compact(6, 12, DType::kF32, pattern);
  const Store store = fits_sparse24(matrix) ? Store::kSparse24Bitmask : Store::kSparseBitmask;
  auto parts = legacy_parts(kWeight, matrix, store).value();
  change(parts);
  const fs::path file = lacuna::testing::scratch_folder("legacy") / "m.safetensors";
  LACUNA_CHECK(write_safetensors(file, parts));
  LACUNA_TRY(auto opened, SafetensorsFile::open(file));
  LACUNA_TRY(const auto checkpoint, Checkpoint::from_files(json::object(), {opened}, "C"));
  return checkpoint.weight(kWeight);
}

void flip(NamedTensor& part, size_t byte, int bit) {
  std::vector<std::byte> bytes(part.tensor.bytes.data(),
                               part.tensor.bytes.data() + part.tensor.bytes.size());
  bytes.at(byte) ^= static_cast<std::byte>(1 << bit);
  part.tensor.bytes = Bytes::take(std::move(bytes));
}

enum Part { kBitmask, kCompressed, kRowOffsets, kShape };

TEST(LegacyBitmask, ContentThatBreaksItsRulesIsRefusedWithTheRow) {
  const Pattern any = Pattern::unstructured(), two = Pattern::keep_of(2, 4);
  ASSERT_TRUE(read_changed(any, [](auto&) {}).ok());
  ASSERT_TRUE(read_changed(two, [](auto&) {}).ok());
  EXPECT_THAT(message_of(read_changed(any, [](auto& p) { flip(p[kBitmask], 4, 1); })),
              AllOf(HasSubstr("m.safetensors"), HasSubstr(kWeight)));
  EXPECT_THAT(message_of(read_changed(any, [](auto& p) { flip(p[kBitmask], 5, 7); })),
              HasSubstr("row 2"));  // past column 12
  EXPECT_THAT(message_of(read_changed(any, [](auto& p) { flip(p[kRowOffsets], 24, 0); })),
              AllOf(HasSubstr("row 3"), HasSubstr("a.b.row_offsets")));
  // Row 1 keeps the columns 0 and 3 of every four.
  EXPECT_THAT(message_of(read_changed(two, [](auto& p) { flip(p[kBitmask], 2, 5); })),
              AllOf(HasSubstr("row 1"), HasSubstr("column 4")));
}

TEST(LegacyBitmask, PartsThatDoNotFitAreRefusedByName) {
  const Pattern any = Pattern::unstructured(), two = Pattern::keep_of(2, 4);
  const auto fault = [](const Pattern& pattern, auto change) {
    return message_of(read_changed(pattern, change));
  };
  EXPECT_THAT(fault(any, [](auto& p) { p.erase(p.begin() + kCompressed); }),
              HasSubstr("a.b.compressed"));
  EXPECT_THAT(fault(any, [](auto& p) { p.erase(p.begin() + kShape); }), HasSubstr("a.b.shape"));
  EXPECT_THAT(fault(any,
                    [](auto& p) {
                      p[kShape].tensor.bytes = Bytes::take<int64_t>({6, 20});
                    }),
              AllOf(HasSubstr("a.b.bitmask"), HasSubstr("[6, 3]")));
  EXPECT_THAT(fault(any,
                    [](auto& p) {
                      p[kShape].tensor.bytes = Bytes::take<int64_t>({-6, 12});
                    }),
              AllOf(HasSubstr("a.b.shape"), HasSubstr("[-6, 12]")));
  EXPECT_THAT(fault(any,
                    [](auto& p) {
                      p[kShape].tensor = {DType::kI64, {3}, Bytes::take<int64_t>({6, 12, 1})};
                    }),
              HasSubstr("a.b.shape"));
  EXPECT_THAT(fault(any,
                    [](auto& p) {
                      p[kRowOffsets].tensor.shape = {3, 2};
                    }),
              HasSubstr("a.b.row_offsets"));
  EXPECT_THAT(fault(any, [](auto& p) { p[kBitmask].tensor.dtype = DType::kI8; }),
              AllOf(HasSubstr("a.b.bitmask"), HasSubstr("got I8")));
  EXPECT_THAT(fault(any,
                    [](auto& p) {
                      p[kCompressed].tensor.dtype = DType::kU8;
                      p[kCompressed].tensor.shape[0] *= 4;
                    }),
              AllOf(HasSubstr("a.b.compressed"), HasSubstr("got U8")));
  EXPECT_THAT(fault(two,
                    [](auto& p) {
                      p[2].tensor.bytes = Bytes::take<int64_t>({6, 10});
                    }),
              HasSubstr("a.b.shape"));
  EXPECT_THAT(fault(two,
                    [](auto& p) {
                      p.push_back({kWeight, p[kCompressed].tensor});
                    }),
              AllOf(HasSubstr(kWeight), HasSubstr("dense and sparse")));
  EXPECT_THAT(fault(two,
                    [](auto& p) {
                      for (auto part : std::vector(p))
                        p.push_back({part.name.insert(3, ".weight"), part.tensor});
                    }),
              HasSubstr("twice"));
}

TEST(LegacyBitmask, SparseFormatsThatAreUnknownAreRefusedByName) {
  json config;
  config["quantization_config"]["sparsity_config"]["format"] = "marlin-24";
  EXPECT_THAT(message_of(Checkpoint::from_files(config, {}, "C")),
              AllOf(HasSubstr("C: "), HasSubstr("marlin-24"), HasSubstr("sparse-bitmask")));
  config["quantization_config"]["sparsity_config"]["format"] = "dense";
  EXPECT_TRUE(Checkpoint::from_files(config, {}, "C").ok());
}

TEST(LegacyBitmask, ADeclaredPatternThatTheWeightBreaksIsRefused) {
  json config;
  config["lacuna"] = {
      {"format_version", 1},
      {"weights", {{kWeight, {{"pattern", "1:4"}, {"shape", {6, 12}}, {"values", "F32"}}}}}};
  const fs::path file = lacuna::testing::scratch_folder("legacy") / "m.safetensors";
  const auto matrix = random_compact(6, 12, DType::kF32, Pattern::keep_of(2, 4));
  ASSERT_TRUE(
      write_safetensors(file, legacy_parts(kWeight, matrix, Store::kSparse24Bitmask).value()).ok());
  const auto checkpoint =
      Checkpoint::from_files(config, {SafetensorsFile::open(file).value()}, "C").value();
  EXPECT_THAT(message_of(checkpoint.weight(kWeight)),
              AllOf(HasSubstr("m.safetensors"), HasSubstr(kWeight), HasSubstr("row 0")));
}

}  // namespace
}  // namespace lacuna::io
