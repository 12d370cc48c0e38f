#include "lacuna/io/gguf/llama2c.h"

#include "io/sample_model.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/io/tokenizer/tokenizer.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::vector<float> values(const Checkpoint& checkpoint, const std::string& name) {
  const Tensor tensor = checkpoint.dense(name).value();
  EXPECT_EQ(tensor.dtype, DType::kF32) << name;
  std::vector<float> out(static_cast<size_t>(tensor.elements()));
  std::memcpy(out.data(), tensor.bytes.data(), tensor.bytes.size());
  return out;
}

/// Walks through a .bin file; the order of its parts is written down here a second time.
struct BinFile {
  std::string bytes;
  int32_t sizes[7];
  size_t position = 28;

  explicit BinFile(const fs::path& path) : bytes(file_text(path)) {
    std::memcpy(sizes, bytes.data(), sizeof(sizes));
  }
  std::vector<float> next(int64_t count) {
    std::vector<float> out(static_cast<size_t>(count));
    std::memcpy(out.data(), bytes.data() + position, out.size() * sizeof(float));
    position += out.size() * sizeof(float);
    return out;
  }
};

void expect_same_weights(const fs::path& bin, const fs::path& folder) {
  BinFile file(bin);
  const int64_t dim = file.sizes[0], hidden = file.sizes[1], layers = file.sizes[2],
                heads = file.sizes[3], kv_heads = file.sizes[4], vocab = file.sizes[5];
  const int64_t head = dim / heads, kv = kv_heads * head;
  const auto checkpoint = Checkpoint::open(folder).value();
  const auto expect = [&](const std::string& name, int64_t count) {
    EXPECT_EQ(values(checkpoint, name), file.next(count)) << name;
  };
  const auto expect_all = [&](const char* name, int64_t count) {
    for (int64_t layer = 0; layer < layers; ++layer)
      expect(fmt::format("model.layers.{}.{}.weight", layer, name), count);
  };
  // Row i of the first half of a head is row 2i there, row i of the second half row 2i + 1.
  const auto expect_rotary = [&](const char* name, int64_t rows) {
    for (int64_t layer = 0; layer < layers; ++layer) {
      const auto theirs = file.next(rows * dim);
      const auto ours =
          values(checkpoint, fmt::format("model.layers.{}.self_attn.{}.weight", layer, name));
      ASSERT_EQ(ours.size(), theirs.size());
      for (int64_t h = 0; h < rows / head; ++h)
        for (int64_t i = 0; i < head / 2; ++i)
          for (int64_t parity = 0; parity < 2; ++parity)
            for (int64_t column = 0; column < dim; ++column)
              ASSERT_EQ(
                  ours[static_cast<size_t>((h * head + parity * head / 2 + i) * dim + column)],
                  theirs[static_cast<size_t>((h * head + 2 * i + parity) * dim + column)]);
    }
  };
  expect("model.embed_tokens.weight", vocab * dim);
  expect_all("input_layernorm", dim);
  expect_rotary("q_proj", dim);
  expect_rotary("k_proj", kv);
  expect_all("self_attn.v_proj", kv * dim);
  expect_all("self_attn.o_proj", dim * dim);
  expect_all("post_attention_layernorm", dim);
  expect_all("mlp.gate_proj", hidden * dim);
  expect_all("mlp.down_proj", dim * hidden);
  expect_all("mlp.up_proj", hidden * dim);
  expect("model.norm.weight", dim);
  const auto spec = decoder_spec(checkpoint.config(), nullptr, "config").value();
  EXPECT_EQ(checkpoint.weights().size(), spec.tensors().size());
  EXPECT_EQ(spec.dtype, DType::kF32);
  EXPECT_EQ(spec.bos_token, 1);
}

TEST(Llama2c, RealModelsArriveWhole) {
  LACUNA_NEEDS_DATA(stories, "models/stories260K/stories260K.bin");
  LACUNA_NEEDS_DATA(baby, "models/babyllama-tok105/model5000.bin");
  for (const auto& [bin, parameters] : {std::pair{stories, 260'032}, std::pair{baby, 936'448}}) {
    const fs::path out = lacuna::testing::scratch_folder("llama2c") / "out";
    const auto done = llama2c_to_folder(bin, out);
    ASSERT_TRUE(done.ok()) << done.error().message;
    EXPECT_EQ(done->bytes_in, fs::file_size(bin));
    EXPECT_EQ(done->bytes_out, 4u * static_cast<uint64_t>(parameters));
    expect_same_weights(bin, out);
    const auto tokenizer = Tokenizer::open(out);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.error().message;
    const json reference = json::parse(file_text(bin.parent_path() / "reference.json"));
    const std::vector<int32_t> prompt = reference["prompt16"];
    const std::string text = (*tokenizer)->decode(prompt, true);
    auto again = (*tokenizer)->encode(text, true);
    EXPECT_EQ(again, prompt) << text;
    std::string story = (*tokenizer)->decode(reference["greedy_from_bos_200"], true);
    EXPECT_THAT(story, HasSubstr("Once upon a time, there was a little girl named Lily."));
  }
}

/// dim 4, hidden 6, 2 layers, 2 heads of 2, 1 KV head, 5 tokens, 8 positions.
std::string small_bin(int32_t vocab, size_t floats) {
  const int32_t sizes[7] = {4, 6, 2, 2, 1, vocab, 8};
  std::string bytes(reinterpret_cast<const char*>(sizes), sizeof(sizes));
  for (size_t i = 0; i < floats; ++i) {
    const auto value = static_cast<float>(i);
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  return bytes;
}

constexpr size_t kSmallFloats =
    5 * 4 + 2 * (4 + 16 + 8 + 8 + 16 + 4 + 24 + 24 + 24) + 4 + 2 * 8 * 1;

TEST(Llama2c, ANegativeVocabularyMeansAnOutputMatrixOfItsOwn) {
  const fs::path folder = lacuna::testing::scratch_folder("llama2c");
  put_text(folder / "m.bin", small_bin(-5, kSmallFloats + 20));
  const auto done = llama2c_to_folder(folder / "m.bin", folder / "out");
  ASSERT_TRUE(done.ok()) << done.error().message;
  EXPECT_EQ(done->tokenizer, "");
  const auto checkpoint = Checkpoint::open(folder / "out").value();
  EXPECT_EQ(checkpoint.config()["tie_word_embeddings"], false);
  EXPECT_EQ(values(checkpoint, "lm_head.weight").front(), static_cast<float>(kSmallFloats));
  put_text(folder / "m.bin", small_bin(5, kSmallFloats));
  ASSERT_TRUE(llama2c_to_folder(folder / "m.bin", folder / "out").ok());
  expect_same_weights(folder / "m.bin", folder / "out");
}

TEST(Llama2c, FilesThatContradictThemselvesAreRefused) {
  const fs::path folder = lacuna::testing::scratch_folder("llama2c");
  const auto refusal = [&](const std::string& bytes) {
    put_text(folder / "m.bin", bytes);
    const std::string message = message_of(llama2c_to_folder(folder / "m.bin", folder / "out"));
    EXPECT_FALSE(fs::exists(folder / "out"));
    EXPECT_THAT(message, HasSubstr("m.bin: "));
    return message;
  };
  const std::string whole = small_bin(5, kSmallFloats);
  for (size_t size = 0; size < whole.size(); size += 4)
    EXPECT_THAT(refusal(whole.substr(0, size)), HasSubstr(size < 28 ? "not a llama2.c" : "length"));
  EXPECT_THAT(refusal(whole + "x"), HasSubstr(fmt::format("got {} bytes; its header asks for {}",
                                                          whole.size() + 1, whole.size())));
  const char* names[] = {"dim",        "hidden_dim", "n_layers", "n_heads",
                         "n_kv_heads", "vocab_size", "seq_len"};
  for (size_t i = 0; i < 7; ++i)
    for (const int32_t bad : {0, 1 << 30, std::numeric_limits<int32_t>::min()}) {
      std::string bytes = whole;
      std::memcpy(bytes.data() + 4 * i, &bad, 4);
      EXPECT_THAT(refusal(bytes), HasSubstr(names[i]));
    }
  for (const auto& [at, value] : {std::pair{3, 3}, std::pair{3, 4}, std::pair{4, 3}}) {
    std::string bytes = whole;
    std::memcpy(bytes.data() + 4 * at, &value, 4);
    EXPECT_THAT(refusal(bytes), HasSubstr("impossible heads"));
  }
}

TEST(Llama2c, TheTokenizerBesideTheFileMustBeOneThatFits) {
  LACUNA_NEEDS_DATA(real, "models/stories260K/tok512.model");
  const fs::path folder = lacuna::testing::scratch_folder("llama2c");
  put_text(folder / "m.bin", small_bin(5, kSmallFloats));
  const auto refusal = [&] {
    return message_of(llama2c_to_folder(folder / "m.bin", folder / "out"));
  };
  put_text(folder / "a.model", "no protobuf");
  EXPECT_THAT(refusal(), HasSubstr("a.model"));
  put_text(folder / "a.model", file_text(real));
  EXPECT_THAT(refusal(), AllOf(HasSubstr("a.model"), HasSubstr("got 512; need at most 5")));
  put_text(folder / "b.model", file_text(real));
  EXPECT_THAT(refusal(), AllOf(HasSubstr("a.model"), HasSubstr("b.model"), HasSubstr("need one")));
  EXPECT_FALSE(fs::exists(folder / "out"));
}

}  // namespace
}  // namespace lacuna::io
