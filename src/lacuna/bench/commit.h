// Which sources this was built from.
#pragma once

namespace lacuna::bench {

/// The git commit as 12 digits, "-dirty" behind it where tracked files differed; "unknown" outside
/// git. Asked anew at every build (cmake/commit.cmake).
const char* built_from();

}  // namespace lacuna::bench
