# Writes OUT, the source of bench/commit.h, when the commit of SOURCE isn't the one that stands there. Run as a script at
# every build: a commit that was asked for once, at configuration, would soon be a wrong one.
execute_process(COMMAND git describe --always --dirty --abbrev=12 --exclude=* WORKING_DIRECTORY ${SOURCE}
                OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed OR commit STREQUAL "")
  set(commit unknown)
endif()
file(CONFIGURE OUTPUT ${OUT} @ONLY CONTENT [[
#include "lacuna/bench/commit.h"

namespace lacuna::bench {
const char* built_from() { return "@commit@"; }
}  // namespace lacuna::bench
]])
