#include "lacuna/io/gguf/gguf.h"

#include <algorithm>
#include <limits>
#include <set>

#include "lacuna/io/file.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kLargestAlignment = uint64_t{1} << 20;
constexpr uint32_t kMostExtents = 4;
constexpr const char* kAlignmentKey = "general.alignment";

// The least bytes that one entry takes: what a count is checked against before anything is
// allocated for it.
constexpr uint64_t kLeastKeyBytes = 8 + 4 + 1;         // empty name, type, one byte
constexpr uint64_t kLeastTensorBytes = 8 + 4 + 4 + 8;  // empty name, no extents, type, offset

/// Types of metadata values by their numbers in the file.
enum class ValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64
};

/// Bytes that one value takes at least; 0 for numbers that are no type.
uint64_t least_bytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    case ValueType::kUint64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
    case ValueType::kString:  // its length
      return 8;
    case ValueType::kArray:
      return 12;
  }
  return 0;
}

/// Names of the types that are known but not read, for the message that refuses them.
std::string unread_type_name(uint32_t type) {
  static constexpr std::pair<uint32_t, std::string_view> kNames[] = {
      {9, "Q8_1"},    {10, "Q2_K"},    {11, "Q3_K"},  {15, "Q8_K"},   {16, "IQ2_XXS"},
      {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"},
      {22, "IQ2_S"},  {23, "IQ4_XS"},  {24, "I8"},    {25, "I16"},    {26, "I32"},
      {27, "I64"},    {28, "F64"},     {29, "IQ1_M"}, {34, "TQ1_0"},  {35, "TQ2_0"},
      {39, "MXFP4"},  {40, "NVFP4"}};
  for (const auto& [number, name] : kNames)
    if (number == type) return std::string(name);
  return fmt::format("number {}", type);
}

constexpr GgufType kTypes[] = {GgufType::kF32,  GgufType::kF16,  GgufType::kBF16, GgufType::kQ8_0,
                               GgufType::kQ4_0, GgufType::kQ4_1, GgufType::kQ5_0, GgufType::kQ5_1,
                               GgufType::kQ4_K, GgufType::kQ5_K, GgufType::kQ6_K};

std::optional<GgufType> known_type(uint32_t number) {
  for (const GgufType type : kTypes)
    if (static_cast<uint32_t>(type) == number) return type;
  return std::nullopt;
}

std::string known_types() {
  std::string names;
  for (const GgufType type : kTypes)
    names += fmt::format("{}{}", names.empty() ? "" : ", ", gguf_block(type).name);
  return names;
}

/// Reads the header from front to back; whatever goes beyond the end is an error that names the
/// place.
class Cursor {
 public:
  Cursor(const Bytes& bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  /// What is being read, for messages: "key \"general.name\"".
  void enter(std::string place) { place_ = std::move(place); }
  uint64_t position() const { return position_; }
  uint64_t left() const { return bytes_.size() - position_; }

  Error truncated() const {
    return bad_input("{}: {} goes beyond the end of the file ({} bytes; truncated?). Get it again.",
                     file_, place_, bytes_.size());
  }
  Error broken(std::string_view rule) const {
    return bad_input("{}: {} {}. The file is damaged: get it again.", file_, place_, rule);
  }

  template <class T>
  Result<T> number() {
    if (left() < sizeof(T)) return truncated();
    const T value = read_unaligned<T>(bytes_.data() + position_);
    position_ += sizeof(T);
    return value;
  }

  /// Text with its length before it; not checked for UTF-8.
  Result<std::string> text() {
    LACUNA_TRY(const uint64_t size, number<uint64_t>());
    if (size > left()) return truncated();
    std::string value(reinterpret_cast<const char*>(bytes_.data()) + position_, size);
    position_ += size;
    return value;
  }

  /// A name of a key or a tensor.
  Result<std::string> name() {
    LACUNA_TRY(std::string value, text());
    if (value.empty() || !tokenizer::is_valid_utf8(value))
      return broken("has an impossible name (need UTF-8 that is not empty)");
    return value;
  }

 private:
  const Bytes& bytes_;
  const std::string& file_;
  std::string place_ = "the header";
  uint64_t position_ = 0;
};

/// Calls `take` with the next number, widened to 64 bits, a double or a truth value.
template <class Take>
Status read_scalar(Cursor& cursor, ValueType type, const Take& take) {
  const auto as = [&](auto sample, auto wide) -> Status {
    LACUNA_TRY(const auto value, cursor.number<decltype(sample)>());
    take(static_cast<decltype(wide)>(value));
    return {};
  };
  switch (type) {
    case ValueType::kUint8:
      return as(uint8_t{}, uint64_t{});
    case ValueType::kInt8:
      return as(int8_t{}, int64_t{});
    case ValueType::kUint16:
      return as(uint16_t{}, uint64_t{});
    case ValueType::kInt16:
      return as(int16_t{}, int64_t{});
    case ValueType::kUint32:
      return as(uint32_t{}, uint64_t{});
    case ValueType::kInt32:
      return as(int32_t{}, int64_t{});
    case ValueType::kUint64:
      return as(uint64_t{}, uint64_t{});
    case ValueType::kInt64:
      return as(int64_t{}, int64_t{});
    case ValueType::kFloat32:
      return as(float{}, double{});
    case ValueType::kFloat64:
      return as(double{}, double{});
    case ValueType::kBool: {
      LACUNA_TRY(const uint8_t value, cursor.number<uint8_t>());
      if (value > 1) return cursor.broken("holds a truth value that is neither 0 nor 1");
      take(value == 1);
      return {};
    }
    case ValueType::kString:
    case ValueType::kArray:
      break;
  }
  return cursor.broken("has a value of an unknown type");
}

/// Appends numbers to the list of their kind.
struct Append {
  GgufArray& array;
  bool* fits;
  void operator()(uint64_t value) const {
    *fits = *fits && value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    array.integers.push_back(static_cast<int64_t>(value));
  }
  void operator()(int64_t value) const { array.integers.push_back(value); }
  void operator()(bool value) const { array.integers.push_back(value ? 1 : 0); }
  void operator()(double value) const { array.numbers.push_back(value); }
};

Result<GgufArray> read_array(Cursor& cursor) {
  LACUNA_TRY(const uint32_t number, cursor.number<uint32_t>());
  const auto type = static_cast<ValueType>(number);
  LACUNA_TRY(const uint64_t count, cursor.number<uint64_t>());
  const uint64_t each = least_bytes(type);
  if (each == 0 || type == ValueType::kArray)
    return cursor.broken("is a list of lists or of an unknown type");
  if (count > cursor.left() / each) return cursor.truncated();
  GgufArray array;
  if (type == ValueType::kString) {
    array.strings.reserve(count);
    for (uint64_t i = 0; i < count; ++i) {
      LACUNA_TRY(std::string text, cursor.text());
      array.strings.push_back(std::move(text));
    }
    return array;
  }
  bool fits = true;
  for (uint64_t i = 0; i < count; ++i)
    LACUNA_CHECK(read_scalar(cursor, type, Append{array, &fits}));
  if (!fits) return cursor.broken("holds a number above 2^63");
  return array;
}

Result<GgufValue> read_value(Cursor& cursor) {
  LACUNA_TRY(const uint32_t number, cursor.number<uint32_t>());
  const auto type = static_cast<ValueType>(number);
  if (type == ValueType::kString) {
    LACUNA_TRY(std::string text, cursor.text());
    return GgufValue(std::move(text));
  }
  if (type == ValueType::kArray) {
    LACUNA_TRY(GgufArray array, read_array(cursor));
    return GgufValue(std::move(array));
  }
  GgufValue value;
  LACUNA_CHECK(read_scalar(cursor, type, [&](auto read) { value = read; }));
  return value;
}

/// What the header says of a tensor; the offset is relative to the data.
struct Described {
  GgufTensor tensor;
  uint64_t begin = 0, end = 0;
};

Result<Described> read_tensor(Cursor& cursor, const std::string& file, uint64_t number) {
  cursor.enter(fmt::format("tensor number {}", number + 1));
  Described described;
  LACUNA_TRY(described.tensor.name, cursor.name());
  const std::string& name = described.tensor.name;
  cursor.enter(fmt::format("tensor \"{}\"", name));
  LACUNA_TRY(const uint32_t extents, cursor.number<uint32_t>());
  if (extents > kMostExtents)
    return bad_input("{}: tensor \"{}\" has too many extents (got {}; need at most {}).", file,
                     name, extents, kMostExtents);
  Shape& shape = described.tensor.shape;
  for (uint32_t i = 0; i < extents; ++i) {
    LACUNA_TRY(const uint64_t extent, cursor.number<uint64_t>());
    if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      return cursor.broken("has an impossible extent");
    shape.insert(shape.begin(), static_cast<int64_t>(extent));
  }
  LACUNA_TRY(const uint32_t type, cursor.number<uint32_t>());
  LACUNA_TRY(described.begin, cursor.number<uint64_t>());
  const auto known = known_type(type);
  if (!known)
    return bad_input(
        "{}: tensor \"{}\" has a type that is not read (got {}; need one of {}). Get the model in "
        "one of these types.",
        file, name, unread_type_name(type), known_types());
  described.tensor.type = *known;
  const GgufBlock block = gguf_block(*known);
  // 2^56 elements of at most 4 bytes still count in 64 bits.
  const auto elements = element_count(shape);
  if (!elements || *elements > int64_t{1} << 56)
    return bad_input(
        "{}: tensor \"{}\" has an impossible shape (got {}; need a product below 2^56).", file,
        name, shape_text(shape));
  if (described.tensor.row_elements() % block.elements != 0)
    return bad_input("{}: tensor \"{}\" has rows of {} elements (need a multiple of {} for {}).",
                     file, name, described.tensor.row_elements(), block.elements, block.name);
  const uint64_t bytes = static_cast<uint64_t>(*elements / block.elements * block.bytes);
  described.end = described.begin + bytes;
  if (described.end < described.begin) return cursor.broken("ends beyond any file");
  return described;
}

/// Every tensor lies inside the data, aligned, and on no other.
Status check_layout(const std::string& file, const std::vector<Described>& tensors,
                    uint64_t alignment, uint64_t data_bytes) {
  for (const auto& [tensor, begin, end] : tensors) {
    if (begin % alignment != 0)
      return bad_input(
          "{}: tensor \"{}\" is not aligned (begins at byte {}; need a multiple of {}).", file,
          tensor.name, begin, alignment);
    if (end > data_bytes)
      return bad_input("{}: tensor \"{}\" ends at byte {} of {} (file truncated?). Get it again.",
                       file, tensor.name, end, data_bytes);
  }
  std::vector<const Described*> order;
  for (const Described& described : tensors) order.push_back(&described);
  std::stable_sort(order.begin(), order.end(), [](const Described* a, const Described* b) {
    return std::pair(a->begin, a->end) < std::pair(b->begin, b->end);
  });
  for (size_t i = 1; i < order.size(); ++i)
    if (order[i]->begin < order[i - 1]->end)
      return bad_input(
          "{}: tensor \"{}\" overlaps \"{}\" (begins at byte {}; need {}). The file is damaged: "
          "get "
          "it again.",
          file, order[i]->tensor.name, order[i - 1]->tensor.name, order[i]->begin,
          order[i - 1]->end);
  return {};
}

Result<uint64_t> alignment_of(const GgufFile::Metadata& metadata, const std::string& file) {
  const auto found = metadata.find(kAlignmentKey);
  if (found == metadata.end()) return kDefaultAlignment;
  const auto* value = std::get_if<uint64_t>(&found->second);
  if (value == nullptr || *value == 0 || *value > kLargestAlignment || (*value & (*value - 1)) != 0)
    return bad_input("{}: key \"{}\" must be a power of two up to {} (got {}).", file,
                     kAlignmentKey, kLargestAlignment,
                     value ? fmt::format("{}", *value) : "another kind of value");
  return *value;
}

}  // namespace

Result<GgufFile> GgufFile::open(const std::filesystem::path& path) {
  LACUNA_TRY(Bytes bytes, map_file(path));
  return parse(std::move(bytes), path.string());
}

Result<GgufFile> GgufFile::parse(Bytes bytes, std::string name) {
  GgufFile file;
  file.path_ = std::move(name);
  file.file_bytes_ = bytes.size();
  const std::string& path = file.path_;
  if (bytes.size() < kMagic.size() ||
      std::string_view(reinterpret_cast<const char*>(bytes.data()), kMagic.size()) != kMagic)
    return bad_input("{}: not a GGUF file (need \"GGUF\" at its beginning).", path);
  Cursor cursor(bytes, path);
  LACUNA_CHECK(cursor.number<uint32_t>());
  LACUNA_TRY(const uint32_t version, cursor.number<uint32_t>());
  if (version != 2 && version != 3)
    return bad_input("{}: a GGUF version that is not read (got {}; need 2 or 3).{}", path, version,
                     (version & 0xffff) == 0 && version != 0 ? " The file is big-endian." : "");
  LACUNA_TRY(const uint64_t tensors, cursor.number<uint64_t>());
  LACUNA_TRY(const uint64_t keys, cursor.number<uint64_t>());
  if (keys > cursor.left() / kLeastKeyBytes || tensors > cursor.left() / kLeastTensorBytes)
    return bad_input(
        "{}: {} keys and {} tensors don't fit into {} bytes (file truncated?). Get it again.", path,
        keys, tensors, bytes.size());

  for (uint64_t i = 0; i < keys; ++i) {
    cursor.enter(fmt::format("key number {}", i + 1));
    LACUNA_TRY(std::string key, cursor.name());
    cursor.enter(fmt::format("key \"{}\"", key));
    LACUNA_TRY(GgufValue value, read_value(cursor));
    if (!file.metadata_.emplace(std::move(key), std::move(value)).second)
      return cursor.broken("is given twice");
  }
  std::vector<Described> described;
  described.reserve(tensors);
  std::set<std::string> names;
  for (uint64_t i = 0; i < tensors; ++i) {
    LACUNA_TRY(Described one, read_tensor(cursor, path, i));
    if (!names.insert(one.tensor.name).second) return cursor.broken("is given twice");
    described.push_back(std::move(one));
  }

  LACUNA_TRY(const uint64_t alignment, alignment_of(file.metadata_, path));
  // A file without tensors may end unpadded.
  const uint64_t data =
      std::min<uint64_t>((cursor.position() + alignment - 1) / alignment * alignment, bytes.size());
  LACUNA_CHECK(check_layout(path, described, alignment, bytes.size() - data));
  for (auto& [tensor, begin, end] : described) {
    tensor.bytes = bytes.slice(data + begin, end - begin);
    file.tensors_.push_back(std::move(tensor));
  }
  return file;
}

}  // namespace lacuna::io
