#include "lacuna/io/gguf/llama2c.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/file.h"
#include "lacuna/io/gguf/rotary_rows.h"
#include "lacuna/io/tokenizer/sentencepiece.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kLargestSize = int64_t{1} << 22;
constexpr int64_t kMostLayers = 10'000;
constexpr size_t kHeaderBytes = 7 * sizeof(int32_t);

struct Sizes {
  int64_t dim = 0, hidden = 0, layers = 0, heads = 0, kv_heads = 0, vocab = 0, context = 0;
  bool tied = true;

  int64_t head() const { return dim / heads; }
  int64_t kv_dim() const { return kv_heads * head(); }
};

/// One kind of weight; it lies there for all layers before the next kind begins.
struct Section {
  const char* name;  ///< nullptr: skipped; with {} for the layer where there is one a layer
  int64_t copies;
  Shape shape;
  bool rotary = false;
};

/// The whole file behind its header, in order.
std::vector<Section> sections_of(const Sizes& s) {
  std::vector<Section> sections = {
      {"model.embed_tokens.weight", 1, {s.vocab, s.dim}},
      {"model.layers.{}.input_layernorm.weight", s.layers, {s.dim}},
      {"model.layers.{}.self_attn.q_proj.weight", s.layers, {s.dim, s.dim}, true},
      {"model.layers.{}.self_attn.k_proj.weight", s.layers, {s.kv_dim(), s.dim}, true},
      {"model.layers.{}.self_attn.v_proj.weight", s.layers, {s.kv_dim(), s.dim}},
      {"model.layers.{}.self_attn.o_proj.weight", s.layers, {s.dim, s.dim}},
      {"model.layers.{}.post_attention_layernorm.weight", s.layers, {s.dim}},
      {"model.layers.{}.mlp.gate_proj.weight", s.layers, {s.hidden, s.dim}},
      {"model.layers.{}.mlp.down_proj.weight", s.layers, {s.dim, s.hidden}},
      {"model.layers.{}.mlp.up_proj.weight", s.layers, {s.hidden, s.dim}},
      {"model.norm.weight", 1, {s.dim}},
      {nullptr, 2, {s.context, s.head() / 2}}};  // tables of rotary cosines and sines
  if (!s.tied) sections.push_back({"lm_head.weight", 1, {s.vocab, s.dim}});
  return sections;
}

Result<Sizes> read_sizes(const Bytes& bytes, const std::string& file) {
  if (bytes.size() < kHeaderBytes)
    return bad_input("{}: not a llama2.c model (got {} bytes; need at least {}).", file,
                     bytes.size(), kHeaderBytes);
  int64_t numbers[7];
  for (size_t i = 0; i < 7; ++i)
    numbers[i] = read_unaligned<int32_t>(bytes.data() + i * sizeof(int32_t));
  Sizes s{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
  // A negative vocabulary says that the output matrix is stored apart.
  s.tied = s.vocab > 0;
  s.vocab = std::abs(s.vocab);
  for (const auto& [name, value] :
       {std::pair{"dim", s.dim}, std::pair{"hidden_dim", s.hidden}, std::pair{"n_layers", s.layers},
        std::pair{"n_heads", s.heads}, std::pair{"n_kv_heads", s.kv_heads},
        std::pair{"vocab_size", s.vocab}, std::pair{"seq_len", s.context}})
    if (value <= 0 || value > (std::string_view(name) == "n_layers" ? kMostLayers : kLargestSize))
      return bad_input("{}: not a llama2.c model (got {} {} in its header).", file, name, value);
  if (s.dim % s.heads != 0 || s.head() % 2 != 0 || s.heads % s.kv_heads != 0)
    return bad_input(
        "{}: impossible heads (got dim {}, n_heads {}, n_kv_heads {}; need heads of even size, "
        "n_heads a multiple of n_kv_heads).",
        file, s.dim, s.heads, s.kv_heads);
  return s;
}

/// The bytes of all sections. Sizes are at most 2^22 and layers below 2^14: nothing overflows.
uint64_t bytes_of(const std::vector<Section>& sections) {
  uint64_t floats = 0;
  for (const Section& section : sections)
    floats += static_cast<uint64_t>(section.copies * element_count(section.shape).value_or(0));
  return floats * sizeof(float);
}

/// The rows of q or k in Hugging Face's order.
Tensor reordered(const Tensor& tensor, int64_t head_rows) {
  const int64_t rows = tensor.shape[0];
  const size_t row_bytes = static_cast<size_t>(tensor.shape[1]) * sizeof(float);
  std::vector<std::byte> bytes(tensor.bytes.size());
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(
        bytes.data() + static_cast<size_t>(row) * row_bytes,
        tensor.bytes.data() + static_cast<size_t>(neighbour_row(row, head_rows)) * row_bytes,
        row_bytes);
  return {tensor.dtype, tensor.shape, Bytes::take(std::move(bytes))};
}

/// The one *.model file beside `bin`, or an empty path.
Result<fs::path> find_tokenizer(const fs::path& bin) {
  const fs::path folder = bin.has_parent_path() ? bin.parent_path() : fs::path(".");
  std::vector<fs::path> found;
  std::error_code failure;
  for (fs::directory_iterator entry(folder, failure), end; !failure && entry != end;
       entry.increment(failure))
    if (entry->path().extension() == ".model") found.push_back(entry->path());
  if (failure) return bad_input("{}: cannot be listed ({}).", folder.string(), failure.message());
  std::sort(found.begin(), found.end());
  if (found.size() > 1)
    return bad_input(
        "{}: {} tokenizers lie beside it ({}, {}, ...; need one). Copy the file and its tokenizer "
        "to "
        "a folder of their own.",
        bin.string(), found.size(), found[0].filename().string(), found[1].filename().string());
  return found.empty() ? fs::path() : found[0];
}

}  // namespace

Result<Llama2cConversion> llama2c_to_folder(const fs::path& bin, const fs::path& out) {
  const std::string file = bin.string();
  LACUNA_TRY(const Bytes bytes, map_file(bin));
  LACUNA_TRY(const Sizes sizes, read_sizes(bytes, file));
  const std::vector<Section> sections = sections_of(sizes);
  if (bytes.size() - kHeaderBytes != bytes_of(sections))
    return bad_input(
        "{}: has the wrong length (got {} bytes; its header asks for {}). Get it again.", file,
        bytes.size(), kHeaderBytes + bytes_of(sections));

  json config = {
      {"architectures", {"LlamaForCausalLM"}},
      {"model_type", "llama"},
      {"hidden_size", sizes.dim},
      {"intermediate_size", sizes.hidden},
      {"num_hidden_layers", sizes.layers},
      {"num_attention_heads", sizes.heads},
      {"num_key_value_heads", sizes.kv_heads},
      {"vocab_size", sizes.vocab},
      {"max_position_embeddings", sizes.context},
      {"rms_norm_eps", 1e-5},
      {"rope_theta", 10000.0},
      {"hidden_act", "silu"},
      {"tie_word_embeddings", sizes.tied},
      {"attention_bias", false},
      {"mlp_bias", false},
      {"torch_dtype", "float32"},
      {"lacuna", {{"converted_from", tokenizer::to_valid_utf8(bin.filename().string())}}}};
  json ids = {{"bos_token_id", 1}, {"eos_token_id", 2}};  // llama2.c's own
  LACUNA_TRY(const fs::path model, find_tokenizer(bin));
  std::string tokenizer_bytes;
  if (!model.empty()) {
    LACUNA_TRY(tokenizer_bytes, read_text(model));
    LACUNA_TRY(const auto read,
               tokenizer::parse_sentencepiece(tokenizer_bytes, {}, model.string()));
    if (read->vocab_size() > sizes.vocab)
      return bad_input("{}: has more pieces than {} has tokens (got {}; need at most {}).",
                       model.string(), file, read->vocab_size(), sizes.vocab);
    if (read->bos()) ids["bos_token_id"] = *read->bos();
    if (read->eos()) ids["eos_token_id"] = *read->eos();
  }
  config.update(ids);

  LACUNA_TRY(auto writer, CheckpointWriter::create(out, {.store = Store::kDense}));
  Llama2cConversion done{.bytes_in = bytes.size(), .tokenizer = model.string()};
  size_t position = kHeaderBytes;
  for (const Section& section : sections) {
    const size_t size =
        static_cast<size_t>(element_count(section.shape).value_or(0)) * sizeof(float);
    for (int64_t layer = 0; layer < section.copies; ++layer, position += size) {
      if (section.name == nullptr) continue;
      Tensor tensor{DType::kF32, section.shape, bytes.slice(position, size)};
      if (section.rotary) tensor = reordered(tensor, sizes.head());
      LACUNA_CHECK(writer.add(fmt::format(fmt::runtime(section.name), layer), tensor));
      done.bytes_out += size;
    }
  }
  LACUNA_CHECK(writer.add_text("generation_config.json", ids.dump(2) + "\n"));
  if (!model.empty()) {
    const json tokenizer_config = {{"tokenizer_class", "LlamaTokenizer"},
                                   {"add_bos_token", true},
                                   {"add_eos_token", false},
                                   {"model_max_length", sizes.context},
                                   {"clean_up_tokenization_spaces", false}};
    LACUNA_CHECK(writer.add_text("tokenizer.model", tokenizer_bytes));
    LACUNA_CHECK(writer.add_text("tokenizer_config.json", tokenizer_config.dump(2) + "\n"));
  }
  LACUNA_CHECK(writer.finish(config));
  return done;
}

}  // namespace lacuna::io
