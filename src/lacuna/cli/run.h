// The tool as a function.
#pragma once

namespace lacuna::cli {

/// Parses and runs a command line. @return the exit code (core/status.h), 0 when all went well
int run(int argc, char** argv);

}  // namespace lacuna::cli
