// What this machine offers and what Lacuna makes of it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace lacuna::api {

struct DoctorReport {
  std::string cpu;
  int cores = 0;
  std::vector<std::string> features;   ///< instruction sets that kernels here use
  std::vector<std::string> gpus;       ///< name, memory, compute capability
  std::vector<std::string> libraries;  ///< name and version
  std::vector<std::string> missing;    ///< what isn't there, what that costs, how to get it
};

DoctorReport doctor();
nlohmann::json to_json(const DoctorReport& report);

}  // namespace lacuna::api
