// What the emulator tells of its launches, and takes from tests.
#pragma once

#include <map>
#include <string>

namespace simt {

// How often this process has launched which kernel.
std::map<std::string, long> launches();

// Whether launched kernels run. They do unless a test times what stands around them.
void run_bodies(bool run);

}  // namespace simt
