#include "lacuna/cli/tool.h"

int main(int argc, char** argv) { return lacuna::cli::Tool().run(argc, argv); }
