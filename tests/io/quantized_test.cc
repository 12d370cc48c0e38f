// Quantised weights on disk: names, types, declarations, and what is refused.
#include <fmt/ranges.h>

#include "io/sample_model.h"
#include "lacuna/format/quantize.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using format::CompactMatrix;
using format::Pattern;
using format::Quantization;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

CompactMatrix coded(int64_t rows, int64_t columns, DType dtype, const Pattern& pattern,
                    const char* code) {
  const auto quantization = Quantization::parse(code).value();
  if (pattern.kind == format::PatternKind::kDense)
    return format::quantize(random_matrix(rows, columns, dtype, {}), quantization).value();
  return format::quantize(random_compact(rows, columns, dtype, pattern), quantization).value();
}

const std::string kMask = "a.mask.weight", kGroups = "b.groups.weight", kBlocks = "c.blocks.weight",
                  kDense = "d.dense.weight";

std::vector<std::pair<std::string, Weight>> quantized_weights() {
  return {{kMask, coded(130, 71, DType::kBF16, Pattern::unstructured(), "int4g32z")},
          {kGroups, coded(9, 66, DType::kF16, Pattern::keep_of(2, 4), "int8")},
          {kBlocks, coded(33, 70, DType::kF32, Pattern::block(16, 9), "fp8g64")},
          {kDense, coded(5, 33, DType::kBF16, {}, "int4")},
          {"e.sparse.weight", random_compact(8, 8, DType::kBF16, Pattern::unstructured())},
          {"norm.weight", Tensor{DType::kF32, {2}, Bytes::take<float>({1, 2})}}};
}

TEST(QuantizedStore, EveryPatternAndCodeComesBackBitByBit) {
  for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::keep_of(2, 4),
                                 Pattern::keep_of(3, 5), Pattern::block(16, 9)})
    for (const char* code : {"int8", "int8g64", "int4", "int4g32z", "fp8"})
      for (const auto& [rows, columns] :
           {std::pair<int64_t, int64_t>{0, 7}, {1, 1}, {66, 33}, {130, 200}}) {
        const CompactMatrix matrix = coded(rows, columns, DType::kBF16, pattern, code);
        const auto model = write_model({{"w", matrix}}, Store::kCompact);
        const auto checkpoint = Checkpoint::open(model).value();
        const WeightInfo& info = checkpoint.weights().at("w");
        EXPECT_EQ(info.quantization.text(), matrix.quantization.text());
        EXPECT_EQ(info.pattern, pattern);
        EXPECT_EQ(info.store, Store::kCompact);
        EXPECT_EQ(info.dtype, DType::kBF16);
        EXPECT_EQ(info.bytes, matrix.size_bytes());
        EXPECT_TRUE(equal(std::get<CompactMatrix>(checkpoint.weight("w").value()), matrix))
            << pattern.text() << " " << code << " " << rows << "x" << columns;
        EXPECT_TRUE(equal(checkpoint.dense("w").value(), format::expand(matrix)));
        EXPECT_THAT(checkpoint.verify_checksums("w").value(), IsEmpty());
      }
}

TEST(QuantizedStore, NamesTypesAndShapesAreThoseOfTheFormat) {
  const auto model = write_model(quantized_weights(), Store::kCompact);
  const auto file = SafetensorsFile::open(model / "model.safetensors").value();
  const auto type_of = [&](const std::string& name) {
    const auto tensor = file.tensor(name);
    EXPECT_TRUE(tensor.ok()) << name;
    return tensor.ok()
               ? fmt::format("{} {}", safetensors_name(tensor->dtype), shape_text(tensor->shape))
               : "";
  };
  EXPECT_EQ(type_of(kMask + ".bitmap"), "U8 [130, 9]");
  EXPECT_THAT(type_of(kMask + ".values"), HasSubstr("U8 ["));
  EXPECT_EQ(type_of(kMask + ".offsets"), "I64 [4]");
  EXPECT_EQ(type_of(kMask + ".scales"), "BF16 [130, 3]");
  EXPECT_EQ(type_of(kMask + ".zeros"), "I8 [130, 3]");
  EXPECT_EQ(type_of(kGroups + ".values"), "I8 [9, 34]");
  EXPECT_EQ(type_of(kGroups + ".scales"), "BF16 [9, 1]");
  EXPECT_FALSE(file.contains(kGroups + ".zeros"));
  EXPECT_THAT(type_of(kBlocks + ".values"), AllOf(HasSubstr("F8_E4M3 ["), HasSubstr(", 16, 9]")));
  EXPECT_EQ(type_of(kBlocks + ".scales"), "BF16 [33, 2]");
  EXPECT_EQ(type_of(kDense + ".values"), "U8 [5, 17]");
  const json ours = json::parse(file_text(model / "config.json"))["lacuna"];
  EXPECT_EQ(ours["format_version"], 2);
  EXPECT_EQ(ours["weights"][kDense], json({{"pattern", "dense"},
                                           {"shape", {5, 33}},
                                           {"values", "BF16"},
                                           {"quantization", "int4g64"}}));
  EXPECT_FALSE(ours["weights"]["e.sparse.weight"].contains("quantization"));
}

TEST(QuantizedStore, ModelsWithoutCodesStayVersionOne) {
  const auto model = write_model(sample_weights(), Store::kCompact);
  EXPECT_EQ(json::parse(file_text(model / "config.json"))["lacuna"]["format_version"], 1);
  edit_config(model, [](json& c) { c["lacuna"]["format_version"] = 2; });
  EXPECT_TRUE(Checkpoint::open(model).ok());
}

TEST(QuantizedStore, TheDenseStoreHoldsWhatTheCodesStandFor) {
  const auto weights = quantized_weights();
  const auto compact = write_model(weights, Store::kCompact);
  // With the config of the quantised model, as convert has it.
  const auto model =
      write_model(weights, Store::kDense, json::parse(file_text(compact / "config.json")));
  const json ours = json::parse(file_text(model / "config.json"))["lacuna"];
  EXPECT_EQ(ours["format_version"], 1);
  EXPECT_EQ(ours["weights"][kMask]["pattern"], "unstructured");
  EXPECT_FALSE(ours["weights"].contains(kDense)) << "a dense tensor like others";
  for (const auto& [name, entry] : ours["weights"].items())
    EXPECT_FALSE(entry.contains("quantization")) << name;
  const auto checkpoint = Checkpoint::open(model).value();
  for (const std::string& name : {kMask, kGroups, kBlocks, kDense}) {
    const auto& info = checkpoint.weights().at(name);
    EXPECT_EQ(info.store, Store::kDense);
    EXPECT_TRUE(info.quantization.none());
    EXPECT_TRUE(equal(checkpoint.dense(name).value(),
                      Checkpoint::open(compact).value().dense(name).value()))
        << name;
  }
}

TEST(QuantizedStore, TheLegacyStoreRefusesCodesAndSaysWhatToDo) {
  auto writer = CheckpointWriter::create(lacuna::testing::scratch_folder("legacy") / "out",
                                         {.store = Store::kSparseBitmask})
                    .value();
  const Status refused =
      writer.add(kMask, coded(4, 8, DType::kBF16, Pattern::unstructured(), "int8"));
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.error().message,
              AllOf(HasSubstr(kMask), HasSubstr("got int8"), HasSubstr("--store dense")));
}

TEST(QuantizedStore, DeclarationsThatDoNotFitAreRefusedByName) {
  const auto fault = [](const std::function<void(json&)>& change) {
    const fs::path model = write_model(quantized_weights(), Store::kCompact);
    edit_config(model, [&](json& config) { change(config["lacuna"]); });
    return open_fault(model);
  };
  EXPECT_THAT(fault([](json& l) { l["format_version"] = 1; }),
              AllOf(HasSubstr("config.json: weight \"a.mask.weight\""), HasSubstr("version 1")));
  for (const json& wrong : {json("int3"), json("none"), json(8), json("int4g7")})
    EXPECT_THAT(fault([&](json& l) { l["weights"][kMask]["quantization"] = wrong; }),
                AllOf(HasSubstr(kMask), HasSubstr("quantization (got " + wrong.dump())));
  EXPECT_THAT(fault([](json& l) { l["weights"][kDense].erase("quantization"); }),
              AllOf(HasSubstr(kDense), HasSubstr("dense")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kMask].erase("quantization"); }),
              AllOf(HasSubstr(kMask + ".values"), HasSubstr("got U8"), HasSubstr("need BF16")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kMask]["quantization"] = "int8"; }),
              AllOf(HasSubstr(kMask + ".values"), HasSubstr("got U8"), HasSubstr("need I8")));
  EXPECT_THAT(fault([](json& l) { l["weights"][kMask]["quantization"] = "int4g64z"; }),
              AllOf(HasSubstr(kMask + ".scales"), HasSubstr("got BF16 [130, 3]"),
                    HasSubstr("need BF16 [130, 2]")));
  EXPECT_THAT(fault([](json& l) { l["weights"].erase(kDense); }),
              AllOf(HasSubstr(kDense + ".scales"), HasSubstr("doesn't declare")));
  // Declared with codes, stored without.
  const fs::path model = write_model(quantized_weights(), Store::kDense);
  edit_config(model, [](json& c) {
    c["lacuna"]["format_version"] = 2;
    c["lacuna"]["weights"][kMask]["quantization"] = "int8";
  });
  EXPECT_THAT(open_fault(model), AllOf(HasSubstr(kMask), HasSubstr("lies there unquantised")));
}

TEST(QuantizedStore, PartsThatAreMissingOrOfTheWrongTypeAreRefusedByName) {
  const Tensor floats{DType::kF32, {130, 3}, Bytes::take(std::vector<float>(390))};
  const Tensor signed_bytes{DType::kI8, {5, 17}, Bytes::take(std::vector<int8_t>(85))};
  const struct {
    std::string part;
    const Tensor* change;
  } cases[] = {{kMask + ".scales", nullptr},  {kMask + ".scales", &floats},
               {kMask + ".zeros", nullptr},   {kMask + ".zeros", &floats},
               {kMask + ".values", nullptr},  {kGroups + ".scales", nullptr},
               {kDense + ".scales", nullptr}, {kDense + ".values", &signed_bytes}};
  for (const auto& [part, change] : cases) {
    const fs::path model = write_model(quantized_weights(), Store::kCompact);
    edit_tensors(model / "model.safetensors", {{part, change}});
    EXPECT_THAT(open_fault(model), HasSubstr("\"" + part + "\"")) << part;
  }
}

TEST(QuantizedStore, EveryFlippedBitIsFoundByItsChecksum) {
  for (const std::string& part :
       {kMask + ".values", kMask + ".bitmap", kMask + ".scales", kMask + ".zeros",
        kMask + ".offsets", kGroups + ".values", kBlocks + ".scales", kDense + ".values"}) {
    const fs::path model = write_model(quantized_weights(), Store::kCompact);
    const fs::path file = model / "model.safetensors";
    flip_bit(file, data_position(file, part) + 5, 2);
    const auto checkpoint = Checkpoint::open(model).value();
    EXPECT_THAT(checkpoint.verify_checksums(part.substr(0, part.rfind('.'))).value(),
                ::testing::ElementsAre(HasSubstr("\"" + part + "\", chunk 1 of 1")));
  }
}

TEST(QuantizedStore, ContentThatBreaksItsRulesIsRefusedWithRowAndColumn) {
  const auto fault = [](const std::string& part, uint64_t byte, int bit) {
    const fs::path model = write_model(quantized_weights(), Store::kCompact);
    const fs::path file = model / "model.safetensors";
    flip_bit(file, data_position(file, part) + byte, bit);
    const std::string weight = part.substr(0, part.rfind('.'));
    return message_of(Checkpoint::open(model).value().weight(weight));
  };
  EXPECT_THAT(fault(kMask + ".scales", 2 * (3 * 4 + 1) + 1, 7),
              AllOf(HasSubstr(kMask), HasSubstr("row 4, column 32: scale -")));
  EXPECT_THAT(fault(kMask + ".zeros", 3 * 129 + 2, 6),
              AllOf(HasSubstr(kMask), HasSubstr("row 129, column 64: zero point")));
  EXPECT_THAT(fault(kDense + ".values", 2 * 17 - 1, 7),
              AllOf(HasSubstr(kDense), HasSubstr("row 1"), HasSubstr("not 0")));
}

}  // namespace
}  // namespace lacuna::io
