// What this process takes of the machine's memory, and how sizes are told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace lacuna {

/// Most memory that this process has held at a time.
size_t peak_memory_bytes();
/// Memory of the machine.
size_t physical_memory_bytes();
/// "98.4 MB": decimal units, three digits.
std::string bytes_text(uint64_t bytes);
/// The next number from here on that bytes_text() tells exactly.
uint64_t rounded_up_for_text(uint64_t bytes);
/// "2.1GB" in bytes: B to TB are decimal, KiB to TiB are not; a number alone counts bytes, and one
/// space may stand before the unit. Nothing where that isn't said, and for less than a byte or more
/// than 2^62.
std::optional<uint64_t> parse_bytes(std::string_view text);

}  // namespace lacuna
