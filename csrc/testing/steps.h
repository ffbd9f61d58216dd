// Counts instructions, which say more than a time where many share a processor.
#pragma once

#include <cstdint>
#include <functional>

namespace lomo {

// Instructions that this thread runs in `call`, those around it included: compare two calls. Every instruction raises a
// signal, so a million take seconds. Throws std::runtime_error on anything but Linux on x86-64.
int64_t count_instructions(const std::function<void()>& call);

}  // namespace lomo
