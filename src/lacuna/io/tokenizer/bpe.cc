#include "lacuna/io/tokenizer/bpe.h"

#include <algorithm>
#include <bit>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

constexpr uint64_t kNoPair = ~uint64_t{0};  // ids are below 2^21

/// Symbols are linked by 32-bit indices; longer pieces (only possible where nothing splits the
/// text) are cut.
constexpr size_t kMaxPieceBytes = size_t{1} << 30;

std::string byte_token(unsigned byte) { return fmt::format("<0x{:02X}>", byte); }

}  // namespace

std::optional<MergeRule> parse_merge(std::string_view line, uint32_t rank) {
  const size_t space = line.find(' ');
  if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos)
    return std::nullopt;
  return MergeRule{std::string(line.substr(0, space)), std::string(line.substr(space + 1)), rank};
}

MergeTable::MergeTable(size_t merges) : slots_(std::bit_ceil(2 * merges + 2), Slot{kNoPair, {}}) {}

size_t MergeTable::slot_of(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  uint64_t hash = pair * 0x9E3779B97F4A7C15u;
  hash ^= hash >> 32;
  size_t slot = hash & mask;
  while (slots_[slot].pair != pair && slots_[slot].pair != kNoPair) slot = (slot + 1) & mask;
  return slot;
}

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
  const uint64_t pair = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
  slots_[slot_of(pair)] = {pair, merge};
}

MergeTable::Merge MergeTable::find(int32_t left, int32_t right) const {
  const uint64_t pair = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
  return slots_[slot_of(pair)].merge;
}

Result<std::shared_ptr<const Bpe>> Bpe::create(Vocabulary vocabulary,
                                               const std::vector<MergeRule>& merges,
                                               BpeOptions options, const std::string& file) {
  auto bpe = std::make_shared<Bpe>();
  bpe->vocabulary_ = std::move(vocabulary);
  bpe->options_ = options;
  bpe->merges_ = MergeTable(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto& [left, right, rank] = merges[i];
    const auto left_id = bpe->vocabulary_.id(left), right_id = bpe->vocabulary_.id(right);
    const auto whole = bpe->vocabulary_.id(left + right);
    if (!left_id || !right_id || !whole)
      return bad_input(
          "{}: merge {} (\"{}\" \"{}\") must join tokens of the vocabulary (\"{}\" is not in it).",
          file, i, left, right,
          !left_id    ? left
          : !right_id ? right
                      : left + right);
    bpe->merges_.insert(*left_id, *right_id, {rank, *whole});
  }
  if (options.byte_fallback) {
    std::array<int32_t, 256> tokens{};
    bool complete = true;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const auto id = bpe->vocabulary_.id(byte_token(byte));
      complete = complete && id;
      tokens[byte] = id.value_or(-1);
    }
    bpe->byte_tokens_ = tokens;
  }
  return std::shared_ptr<const Bpe>(std::move(bpe));
}

struct Bpe::Workspace {
  struct Symbol {
    int32_t id;           // -1: swallowed by the symbol before it
    int32_t merged;       // what it and the next symbol merge to, or -1
    uint32_t prev, next;  // kEnd at the ends
  };
  struct Candidate {
    uint32_t rank, symbol;
    int32_t merged;
    bool operator<(const Candidate& other) const {  // std heaps keep the greatest on top
      return rank != other.rank ? rank > other.rank : symbol > other.symbol;
    }
  };
  static constexpr uint32_t kEnd = ~uint32_t{0};
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;

  void add(int32_t id) {
    const auto at = static_cast<uint32_t>(symbols.size());
    if (at > 0) symbols.back().next = at;
    symbols.push_back({id, -1, at > 0 ? at - 1 : kEnd, kEnd});
  }
};

void Bpe::add_characters(std::string_view piece, Workspace& work) const {
  work.symbols.clear();
  bool unknown_pending = false;  // a run of unknown characters not yet added
  const auto flush = [&] {
    if (unknown_pending) work.add(*options_.unknown);
    unknown_pending = false;
  };
  for (size_t at = 0, size = 0; at < piece.size(); at += size) {
    size = utf8_length(piece[at]);
    const std::string_view character = piece.substr(at, size);
    if (const auto id = vocabulary_.id(character)) {
      flush();
      work.add(*id);
    } else if (byte_tokens_ && std::all_of(character.begin(), character.end(), [&](char c) {
                 return (*byte_tokens_)[static_cast<unsigned char>(c)] >= 0;
               })) {
      // A pending run of unknown characters stays pending: Hugging Face's order, which only a
      // vocabulary with some of the byte tokens can show.
      for (const char c : character) work.add((*byte_tokens_)[static_cast<unsigned char>(c)]);
    } else if (options_.unknown) {
      if (!options_.fuse_unknown) flush();
      unknown_pending = true;
    }
  }
  flush();
}

void Bpe::merge(Workspace& work) const {
  auto& symbols = work.symbols;
  auto& heap = work.heap;
  heap.clear();
  const auto look_up = [&](uint32_t at) {  // the pair that begins at symbol `at`
    const uint32_t next = symbols[at].next;
    const MergeTable::Merge merge = next == Workspace::kEnd
                                        ? MergeTable::Merge{}
                                        : merges_.find(symbols[at].id, symbols[next].id);
    symbols[at].merged = merge.id;
    return Workspace::Candidate{merge.rank, at, merge.id};
  };
  for (uint32_t at = 0; at < symbols.size(); ++at)
    if (const auto candidate = look_up(at); candidate.merged >= 0) heap.push_back(candidate);
  std::make_heap(heap.begin(), heap.end());
  const auto push = [&](uint32_t at) {
    if (const auto candidate = look_up(at); candidate.merged >= 0) {
      heap.push_back(candidate);
      std::push_heap(heap.begin(), heap.end());
    }
  };
  while (!heap.empty()) {
    const Workspace::Candidate top = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    auto& symbol = symbols[top.symbol];
    if (symbol.id < 0 || symbol.merged != top.merged) continue;  // a neighbour was merged since
    auto& swallowed = symbols[symbol.next];
    symbol.id = top.merged;
    symbol.next = swallowed.next;
    swallowed.id = -1;
    if (symbol.next != Workspace::kEnd) symbols[symbol.next].prev = top.symbol;
    push(top.symbol);
    if (symbol.prev != Workspace::kEnd) push(symbol.prev);
  }
}

void Bpe::encode(const Pieces& pieces, std::vector<int32_t>& ids) const {
  Workspace work;
  for (size_t i = 0; i < pieces.spans.size(); ++i) {
    std::string_view left = pieces.piece(i);
    if (options_.ignore_merges) {
      if (const auto whole = vocabulary_.id(left)) {
        ids.push_back(*whole);
        continue;
      }
    }
    while (!left.empty()) {
      size_t size = std::min(left.size(), kMaxPieceBytes);
      while (size < left.size() && (left[size] & 0xC0) == 0x80) --size;  // not inside a character
      add_characters(left.substr(0, size), work);
      merge(work);
      for (const auto& symbol : work.symbols)
        if (symbol.id >= 0) ids.push_back(symbol.id);
      left.remove_prefix(size);
    }
  }
}

}  // namespace lacuna::io::tokenizer
