#include "lacuna/io/tokenizer/tokenizer.h"

namespace lacuna::io {

// What a token turns into depends on its neighbours (the first token's leading space goes, bytes of
// one character come in several tokens), so a window of tokens is decoded: those whose text is not
// certain yet, behind one that is out already.

StreamDecoder::StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

std::string StreamDecoder::push(int32_t id) {
  pending_.push_back(id);
  std::string text = tokenizer_->decode_certain(pending_, skip_special_);
  if (text.size() <= emitted_) return {};
  std::string fresh = text.substr(emitted_);
  emitted_ = text.size();
  if (text == tokenizer_->decode(pending_, skip_special_)) {
    // All is out. The last token alone will do as context, if it has a text of its own.
    std::string last = tokenizer_->decode({id}, skip_special_);
    if (!last.empty() && last == tokenizer_->decode_certain({id}, skip_special_)) {
      pending_ = {id};
      emitted_ = last.size();
    }
  }
  return fresh;
}

std::string StreamDecoder::finish() {
  const std::string text = tokenizer_->decode(pending_, skip_special_);
  std::string rest = text.size() > emitted_ ? text.substr(emitted_) : std::string();
  pending_.clear();
  emitted_ = 0;
  return rest;
}

}  // namespace lacuna::io
