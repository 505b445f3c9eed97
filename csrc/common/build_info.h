// What was built; filled in by CMake.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace fm {

std::map<std::string, std::string> build_info();
std::vector<std::string> cuda_architectures();
int max_threads();
std::string cuda_error_text(int code);

}  // namespace fm
