#include <cmath>

#include "io/gguf/gguf_builder.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/io/gguf/gguf_model.h"
#include "lacuna/io/text_source.h"
#include "lacuna/io/tokenizer/chat_template.h"
#include "lacuna/io/tokenizer/tokenizer.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

/// Converts a file made in memory; the folder is in a place of its own.
Result<fs::path> convert(const GgufBuilder& builder) {
  const fs::path folder = lacuna::testing::scratch_folder("gguf");
  put_text(folder / "small.gguf", builder.bytes());
  ThreadPool pool(2);
  LACUNA_TRY(const auto done,
             gguf_to_folder(folder / "small.gguf", folder / "out", pool.executor()));
  EXPECT_EQ(done.bytes_in, fs::file_size(folder / "small.gguf"));
  EXPECT_EQ(done.bytes_out, Checkpoint::open(folder / "out")->total_bytes());
  return folder / "out";
}

/// What a broken file is refused with; nothing may be left behind.
std::string refusal(const GgufBuilder& builder) {
  const fs::path folder = lacuna::testing::scratch_folder("gguf");
  put_text(folder / "small.gguf", builder.bytes());
  const auto done = gguf_to_folder(folder / "small.gguf", folder / "out", Executor::serial());
  EXPECT_FALSE(fs::exists(folder / "out"));
  EXPECT_FALSE(fs::exists(folder / "out.partial"));
  const std::string message = message_of(done);
  EXPECT_THAT(message, HasSubstr("small.gguf: "));
  return message;
}

std::vector<float> bf16_values(const Tensor& tensor) {
  EXPECT_EQ(tensor.dtype, DType::kBF16);
  std::vector<float> values;
  for (size_t i = 0; i + 1 < tensor.bytes.size(); i += 2)
    values.push_back(bf16_to_float(read_unaligned<uint16_t>(tensor.bytes.data() + i)));
  return values;
}

std::vector<float> rounded(std::vector<float> values) {
  for (float& value : values) value = bf16_to_float(float_to_bf16(value));
  return values;
}

/// The rows in Hugging Face's order: of each head first the even rows, then the odd ones.
std::vector<float> halves(const std::vector<float>& values, size_t heads, size_t columns) {
  const size_t head_rows = values.size() / columns / heads;
  std::vector<float> out;
  for (size_t head = 0; head < heads; ++head)
    for (size_t parity = 0; parity < 2; ++parity)
      for (size_t row = parity; row < head_rows; row += 2) {
        const auto begin =
            values.begin() + static_cast<std::ptrdiff_t>((head * head_rows + row) * columns);
        out.insert(out.end(), begin, begin + static_cast<std::ptrdiff_t>(columns));
      }
  return out;
}

constexpr SmallModel kModel{.head_dim = 4};

GgufBuilder llama(const SmallModel& sizes = kModel) {
  GgufBuilder file = small_model("llama", sizes);
  file.put("llama.attention.key_length", static_cast<uint32_t>(sizes.head_dim));
  file.put("llama.attention.value_length", static_cast<uint32_t>(sizes.head_dim));
  return file;
}

TEST(GgufToFolder, LlamaWeightsArriveRoundedAndWithTheirRotaryRowsInOrder) {
  const GgufBuilder builder = llama();
  const auto folder = convert(builder);
  ASSERT_TRUE(folder.ok()) << folder.error().message;
  const auto checkpoint = Checkpoint::open(*folder).value();
  const auto spec = decoder_spec(checkpoint.config(), nullptr, "config").value();
  EXPECT_EQ(spec.architecture, "LlamaForCausalLM");
  EXPECT_EQ(spec.layers, 2);
  EXPECT_EQ(spec.kv_heads, 2);
  EXPECT_EQ(spec.head_dim, 4);
  EXPECT_EQ(spec.max_positions, 64);
  EXPECT_EQ(spec.norm_epsilon, 1e-5);
  EXPECT_EQ(spec.vocab, 264);
  EXPECT_TRUE(spec.tied_embedding);
  EXPECT_EQ(spec.dtype, DType::kBF16);
  EXPECT_EQ(spec.bos_token, 258);
  EXPECT_EQ(checkpoint.config()["lacuna"]["converted_from"], "small.gguf");
  EXPECT_EQ(checkpoint.weights().size(), spec.tensors().size());
  const auto values = [&](const char* name) { return bf16_values(checkpoint.dense(name).value()); };
  EXPECT_EQ(values("model.embed_tokens.weight"), rounded(counted({264, 8}, 1)));
  EXPECT_EQ(values("model.norm.weight"), rounded(counted({8}, 2)));
  EXPECT_EQ(values("model.layers.0.input_layernorm.weight"), rounded(counted({8}, 3)));
  EXPECT_EQ(values("model.layers.0.self_attn.q_proj.weight"),
            rounded(halves(counted({16, 8}, 4), 4, 8)));
  EXPECT_EQ(values("model.layers.0.self_attn.k_proj.weight"),
            rounded(halves(counted({8, 8}, 5), 2, 8)));
  EXPECT_EQ(values("model.layers.0.self_attn.v_proj.weight"), rounded(counted({8, 8}, 6)));
  EXPECT_EQ(values("model.layers.0.self_attn.o_proj.weight"), rounded(counted({8, 16}, 7)));
  EXPECT_EQ(values("model.layers.0.post_attention_layernorm.weight"), rounded(counted({8}, 8)));
  EXPECT_EQ(values("model.layers.0.mlp.gate_proj.weight"), rounded(counted({12, 8}, 9)));
  EXPECT_EQ(values("model.layers.0.mlp.up_proj.weight"), rounded(counted({12, 8}, 10)));
  EXPECT_EQ(values("model.layers.0.mlp.down_proj.weight"), rounded(counted({8, 12}, 11)));
  EXPECT_EQ(values("model.layers.1.self_attn.q_proj.weight"),
            rounded(halves(counted({16, 8}, 13), 4, 8)));
  EXPECT_TRUE(Tokenizer::open(*folder).ok());
  const json generation = json::parse(file_text(*folder / "generation_config.json"));
  EXPECT_EQ(generation, (json{{"bos_token_id", 258}, {"eos_token_id", 259}}));
}

TEST(GgufToFolder, LlamaBiasesAreReorderedWithTheirRows) {
  GgufBuilder builder = llama();
  for (const char* layer : {"0", "1"})
    for (const auto& [name, size] : {std::pair{"attn_q", 16}, std::pair{"attn_k", 8},
                                     std::pair{"attn_v", 8}, std::pair{"attn_output", 8}})
      builder.add(fmt::format("blk.{}.{}.bias", layer, name), {size}, counted({size}, 50));
  const auto folder = convert(builder);
  ASSERT_TRUE(folder.ok()) << folder.error().message;
  const auto checkpoint = Checkpoint::open(*folder).value();
  EXPECT_EQ(checkpoint.config()["attention_bias"], true);
  EXPECT_EQ(bf16_values(checkpoint.dense("model.layers.1.self_attn.q_proj.bias").value()),
            rounded(halves(counted({16}, 50), 4, 1)));
  EXPECT_EQ(bf16_values(checkpoint.dense("model.layers.1.self_attn.v_proj.bias").value()),
            rounded(counted({8}, 50)));
  builder.erase_tensor("blk.1.attn_output.bias");
  EXPECT_THAT(refusal(builder), HasSubstr("has no tensor \"blk.1.attn_output.bias\""));
}

TEST(GgufToFolder, Qwen2KeepsItsRowsAndHasBiasesAndAnOutputMatrix) {
  GgufBuilder builder = small_model("qwen2");
  builder.add("output.weight", {264, 8}, counted({264, 8}, 77));
  const auto folder = convert(builder);
  ASSERT_TRUE(folder.ok()) << folder.error().message;
  const auto checkpoint = Checkpoint::open(*folder).value();
  const auto spec = decoder_spec(checkpoint.config(), nullptr, "config").value();
  EXPECT_EQ(spec.architecture, "Qwen2ForCausalLM");
  EXPECT_FALSE(spec.tied_embedding);
  EXPECT_FALSE(spec.sliding_window);
  EXPECT_EQ(checkpoint.weights().size(), spec.tensors().size());
  const auto values = [&](const char* name) { return bf16_values(checkpoint.dense(name).value()); };
  EXPECT_EQ(values("lm_head.weight"), rounded(counted({264, 8}, 77)));
  EXPECT_EQ(values("model.layers.0.self_attn.q_proj.weight"), rounded(counted({8, 8}, 4)));
  EXPECT_EQ(values("model.layers.0.self_attn.q_proj.bias"), rounded(counted({8}, 12)));
  EXPECT_EQ(values("model.layers.0.self_attn.k_proj.bias"), rounded(counted({4}, 13)));
}

TEST(GgufToFolder, ScaledPositionsAreSaidInTheConfigOrRefused) {
  const auto rope = [](const GgufBuilder& builder) {
    const auto folder = convert(builder);
    EXPECT_TRUE(folder.ok()) << folder.error().message;
    const auto checkpoint = Checkpoint::open(*folder).value();
    return decoder_spec(checkpoint.config(), nullptr, "config").value().rope;
  };
  GgufBuilder builder = llama();
  EXPECT_EQ(rope(builder).type, "default");
  builder.put("llama.rope.scale_linear", 4.0f);
  EXPECT_EQ(rope(builder).type, "linear");
  EXPECT_EQ(rope(builder).factor, 4.0);
  builder.put("llama.rope.scaling.type", "linear");
  builder.put("llama.rope.scaling.factor", 2.5f);
  EXPECT_EQ(rope(builder).factor, 2.5);
  builder.put("llama.rope.scaling.type", "none");
  EXPECT_EQ(rope(builder).type, "default");
  builder.put("llama.rope.scaling.type", "yarn");
  EXPECT_THAT(refusal(builder), AllOf(HasSubstr("llama.rope.scaling.type"), HasSubstr("\"yarn\"")));
  builder.put("llama.rope.scaling.type", "linear");
  builder.put("llama.rope.scaling.factor", -1.0f);
  EXPECT_THAT(refusal(builder), HasSubstr("llama.rope.scaling.factor"));
}

/// Llama-3.1's own numbers: head 128, theta 500000, factor 8. The table is from the published
/// formula in float64; entries 28 to 38 lie on the ramp between the two ends.
std::vector<float> llama31_factors(double factor) {
  std::vector<float> table;
  for (int i = 0; i < 64; ++i) {
    const double wave = 2 * 3.14159265358979323846 * std::pow(500000.0, i / 64.0);
    double divisor = factor;
    if (wave < 8192.0 / 4) {
      divisor = 1;
    } else if (wave <= 8192.0) {
      const double smooth = (8192.0 / wave - 1) / 3;
      divisor = 1 / ((1 - smooth) / factor + smooth);
    }
    table.push_back(static_cast<float>(divisor));
  }
  return table;
}

TEST(GgufToFolder, Llama31FactorsBecomeItsFourNumbers) {
  const SmallModel sizes{.layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 128};
  for (const double factor : {8.0, 32.0}) {
    GgufBuilder builder = llama(sizes);
    builder.put("llama.rope.freq_base", 500000.0f);
    builder.add("rope_freqs.weight", {64}, llama31_factors(factor));
    const auto model = describe_gguf(parse_gguf(builder).value());
    ASSERT_TRUE(model.ok()) << model.error().message;
    EXPECT_EQ(model->config["rope_scaling"], (json{{"rope_type", "llama3"},
                                                   {"factor", factor},
                                                   {"low_freq_factor", 1.0},
                                                   {"high_freq_factor", 4.0},
                                                   {"original_max_position_embeddings", 8192}}));
    const auto spec = decoder_spec(model->config, nullptr, "config");
    ASSERT_TRUE(spec.ok());
    EXPECT_EQ(spec->rope.factor, factor);
  }
  GgufBuilder plain = llama(sizes);
  plain.add("rope_freqs.weight", {64}, std::vector<float>(64, 1.0f));
  const auto model = describe_gguf(parse_gguf(plain).value());
  ASSERT_TRUE(model.ok()) << model.error().message;
  EXPECT_FALSE(model->config.contains("rope_scaling"));
  std::vector<float> other = llama31_factors(8);
  other[33] *= 1.01f;
  GgufBuilder builder = llama(sizes);
  builder.put("llama.rope.freq_base", 500000.0f);
  builder.add("rope_freqs.weight", {64}, other);
  EXPECT_THAT(refusal(builder), HasSubstr("\"rope_freqs.weight\""));
  builder.put("llama.rope.scaling.factor", 2.0f);
  EXPECT_THAT(refusal(builder), HasSubstr("that the keys scale, too"));
  GgufBuilder shape = llama(sizes);
  shape.add("rope_freqs.weight", {32}, std::vector<float>(32, 1.0f));
  EXPECT_THAT(refusal(shape), HasSubstr("got [32]; need [64]"));
}

TEST(GgufToFolder, MissingKeysAreNamed) {
  for (const char* key : {"general.architecture", "llama.block_count", "llama.context_length",
                          "llama.embedding_length", "llama.feed_forward_length",
                          "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon",
                          "tokenizer.ggml.model", "tokenizer.ggml.tokens"}) {
    GgufBuilder builder = llama();
    builder.erase(key);
    EXPECT_THAT(refusal(builder), HasSubstr(fmt::format("\"{}\"", key)));
  }
}

TEST(GgufToFolder, KeysThatNoSuchModelHasAreRefusedByName) {
  const auto with = [](const char* key, auto value) {
    GgufBuilder builder = llama();
    builder.put(key, value);
    return refusal(builder);
  };
  EXPECT_THAT(with("general.architecture", "gemma3"), HasSubstr("got \"gemma3\"; need llama or"));
  EXPECT_THAT(with("llama.expert_count", uint32_t{8}),
              AllOf(HasSubstr("llama.expert_count"), HasSubstr("got 8; need 0")));
  EXPECT_THAT(with("llama.attention.sliding_window", uint32_t{4096}),
              HasSubstr("llama.attention.sliding_window"));
  EXPECT_THAT(with("llama.logit_scale", 2.0f), HasSubstr("llama.logit_scale"));
  EXPECT_THAT(with("llama.attention.causal", false), HasSubstr("llama.attention.causal"));
  EXPECT_THAT(with("llama.rope.dimension_count", uint32_t{2}),
              AllOf(HasSubstr("llama.rope.dimension_count"), HasSubstr("got 2; need 4")));
  EXPECT_THAT(with("llama.block_count", uint32_t{0}), HasSubstr("llama.block_count"));
  EXPECT_THAT(with("llama.block_count", 4000000000u), HasSubstr("llama.block_count"));
  EXPECT_THAT(with("llama.block_count", 2000000000u), HasSubstr("2000000000 layers"));
  EXPECT_THAT(with("llama.context_length", -1.0f), HasSubstr("llama.context_length"));
  EXPECT_THAT(with("llama.attention.head_count_kv", std::vector<int32_t>{2, 1}),
              HasSubstr("same size for every layer"));
  EXPECT_THAT(with("llama.attention.layer_norm_rms_epsilon", "small"), HasSubstr("a number"));
  EXPECT_THAT(with("tokenizer.ggml.pre", "tekken"), HasSubstr("tokenizer.ggml.pre"));
  GgufBuilder fine = llama();
  fine.put("llama.attention.head_count_kv", std::vector<int32_t>{2, 2});
  fine.put("llama.expert_count", uint32_t{0});
  EXPECT_TRUE(convert(fine).ok());
}

TEST(GgufToFolder, TensorsThatAreMissingForeignOrOfTheWrongShapeAreNamed) {
  for (const char* name : {"token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight",
                           "blk.1.ffn_down.weight", "blk.1.attn_norm.weight"}) {
    GgufBuilder builder = llama();
    builder.erase_tensor(name);
    EXPECT_THAT(refusal(builder), HasSubstr(fmt::format("has no tensor \"{}\"", name)));
    builder.add(name, {3, 8}, counted({3, 8}, 0));
    EXPECT_THAT(
        refusal(builder),
        AllOf(HasSubstr(std::string(name) == "token_embd.weight" ? "token_embd.weight" : name),
              HasSubstr(std::string(name) == "token_embd.weight" ? "has rows (got 262"
                                                                 : "wrong shape")));
  }
  GgufBuilder builder = llama();
  builder.add("blk.0.attn_q_norm.weight", {4}, {1, 1, 1, 1});
  EXPECT_THAT(refusal(builder),
              AllOf(HasSubstr("\"blk.0.attn_q_norm.weight\""), HasSubstr("has no place")));
  GgufBuilder third = llama();
  third.add("blk.2.attn_q.weight", {16, 8}, counted({16, 8}, 0));
  EXPECT_THAT(refusal(third), HasSubstr("\"blk.2.attn_q.weight\""));
}

TEST(GgufToFolder, FoldersOfOthersAreLeftAlone) {
  const fs::path folder = lacuna::testing::scratch_folder("gguf");
  put_text(folder / "small.gguf", llama().bytes());
  put_text(folder / "letter.txt", "dear");
  EXPECT_THAT(message_of(gguf_to_folder(folder / "small.gguf", folder, Executor::serial())),
              HasSubstr(folder.string()));
  EXPECT_EQ(file_text(folder / "letter.txt"), "dear");
}

class SmolLm2 : public ::testing::Test {
 protected:
  /// Converted once for all tests below.
  static const fs::path& folder(const fs::path& gguf) {
    static const fs::path converted = [&] {
      const fs::path out = lacuna::testing::scratch_folder("smollm2") / "out";
      ThreadPool pool;
      const auto done = gguf_to_folder(gguf, out, pool.executor());
      EXPECT_TRUE(done.ok()) << done.error().message;
      EXPECT_EQ(done->bytes_out, 2u * 134'515'008u);
      return out;
    }();
    return converted;
  }
};

constexpr const char* kSmolFile = "models/SmolLM2-135M-Instruct.Q4_1.gguf";

TEST_F(SmolLm2, EveryWeightIsWhatTheReferencePackageGives) {
  LACUNA_NEEDS_CACHE(gguf, kSmolFile);
  const auto got = read_checksums(folder(gguf) / "checksums.json");
  ASSERT_TRUE(got.ok()) << got.error().message;
  const json expected =
      json::parse(file_text(lacuna::testing::source_folder() / "tests/golden/gguf/smollm2.json"));
  EXPECT_EQ(got->size(), expected["chunks"].size());
  for (const auto& [name, chunks] : expected["chunks"].items()) {
    ASSERT_TRUE(got->contains(name)) << name;
    EXPECT_EQ(json(got->at(name)), chunks) << name;
  }
}

TEST_F(SmolLm2, TokenizerAndChatTemplateGiveTheIdsOfTransformers) {
  LACUNA_NEEDS_CACHE(gguf, kSmolFile);
  LACUNA_NEEDS_DATA(file, "models/smollm2-135m/reference.json");
  LACUNA_NEEDS_DATA(text, "text/wikitext-2/wiki.test.raw");
  const json reference = json::parse(file_text(file));
  const auto tokenizer = Tokenizer::open(folder(gguf)).value();
  const auto chat = ChatTemplate::open(folder(gguf)).value();
  size_t chats = 0;
  for (const json& prompt : reference["prompts"]) {
    std::string given = prompt["text"];
    if (prompt.contains("chat_user")) {
      given = chat.render({{"user", prompt["chat_user"]}});
      EXPECT_EQ(given, prompt["text"]);
      ++chats;
    }
    EXPECT_EQ(json(tokenizer->encode(given, false)), prompt["ids"]) << given;
  }
  EXPECT_EQ(chats, 3u);
  const auto ids = tokenizer->encode(read_documents(text).value().front(), false);
  EXPECT_EQ(ids.size(), reference["wikitext2_ids"]["tokens"]);
  EXPECT_EQ(json(std::vector<int32_t>(ids.begin(), ids.begin() + 16)),
            reference["wikitext2_ids"]["first16"]);
}

TEST_F(SmolLm2, ConfigSaysWhatTheModelIs) {
  LACUNA_NEEDS_CACHE(gguf, kSmolFile);
  const auto checkpoint = Checkpoint::open(folder(gguf)).value();
  const auto spec = decoder_spec(checkpoint.config(), nullptr, "config").value();
  EXPECT_EQ(spec.parameters(), 134'515'008);
  EXPECT_EQ(spec.rope.theta, 100'000);
  EXPECT_EQ(spec.norm_epsilon, 1e-5);
  EXPECT_EQ(spec.max_positions, 8192);
  EXPECT_EQ(spec.bos_token, 1);
  EXPECT_THAT(spec.eos_tokens, ::testing::ElementsAre(2));
  EXPECT_TRUE(spec.tied_embedding);
}

}  // namespace
}  // namespace lacuna::io
