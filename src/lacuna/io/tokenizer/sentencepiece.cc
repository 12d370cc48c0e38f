#include "lacuna/io/tokenizer/sentencepiece.h"

#include <sentencepiece_processor.h>

namespace lacuna::io::tokenizer {
namespace {

constexpr const char* kSpace = "\xE2\x96\x81";  // U+2581, which stands for a space in pieces

class SentencePieceModel final : public Model {
 public:
  static Result<std::shared_ptr<const SentencePieceModel>> create(std::string_view bytes,
                                                                  const std::string& file) {
    auto model = std::make_shared<SentencePieceModel>();
    const auto status = model->processor_.LoadFromSerializedProto({bytes.data(), bytes.size()});
    if (!status.ok())
      return bad_input("{}: must be a SentencePiece model (got \"{}\").", file,
                       status.error_message());
    std::vector<std::pair<std::string, int64_t>> entries;
    for (int id = 0; id < model->processor_.GetPieceSize(); ++id)
      entries.emplace_back(model->processor_.IdToPiece(id), id);
    LACUNA_TRY(model->vocabulary_, Vocabulary::create(std::move(entries), file));
    return std::shared_ptr<const SentencePieceModel>(std::move(model));
  }

  void encode(const Pieces& pieces, std::vector<int32_t>& ids) const override {
    std::vector<int> found;
    for (size_t i = 0; i < pieces.spans.size(); ++i) {
      const std::string_view piece = pieces.piece(i);
      if (processor_.Encode({piece.data(), piece.size()}, &found).ok())
        ids.insert(ids.end(), found.begin(), found.end());
    }
  }
  const Vocabulary& vocabulary() const override { return vocabulary_; }

  bool is_special(int id) const { return processor_.IsControl(id) || processor_.IsUnknown(id); }
  bool adds_prefix_space() const {
    std::vector<std::string> pieces;
    return processor_.Encode("a", &pieces).ok() && !pieces.empty() && pieces[0].starts_with(kSpace);
  }
  std::optional<int32_t> bos() const { return optional_id(processor_.bos_id()); }
  std::optional<int32_t> eos() const { return optional_id(processor_.eos_id()); }

 private:
  static std::optional<int32_t> optional_id(int id) {
    return id < 0 ? std::nullopt : std::optional<int32_t>(id);
  }
  ::sentencepiece::SentencePieceProcessor processor_;
  Vocabulary vocabulary_;
};

}  // namespace

Result<std::shared_ptr<const Tokenizer>> parse_sentencepiece(std::string_view bytes,
                                                             const TokenizerConfig& config,
                                                             const std::string& file) {
  LACUNA_TRY(const auto model, SentencePieceModel::create(bytes, file));
  PipelineParts parts;
  parts.model = model;
  std::vector<AddedToken> added;
  for (int32_t id = 0; id < model->vocabulary().size(); ++id)
    if (model->is_special(id))
      added.push_back({std::string(*model->vocabulary().token(id)), id, true});
  merge_added(added, config.added_tokens(model->vocabulary()));
  LACUNA_TRY(parts.added, AddedTokens::create(std::move(added), model->vocabulary(), {}, file));
  parts.decoder = {ReplaceDecoder{kSpace, " "}, ByteFallbackDecoder{}, FuseDecoder{}};
  if (model->adds_prefix_space()) parts.decoder.emplace_back(StripDecoder{" ", 1});
  parts.bos = model->bos();
  parts.eos = model->eos();
  if (parts.bos) parts.prefix = {*parts.bos};
  LACUNA_CHECK(apply_config(config, file, parts));
  return std::make_shared<const Pipeline>(std::move(parts));
}

}  // namespace lacuna::io::tokenizer
