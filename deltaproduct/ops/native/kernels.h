// The table of kernels of one instruction set, in either precision; included once by each kernels_*.cpp.
#pragma once

#include "segments.h"
#include "selective_scan.h"
#include "program.h"

namespace deltaproduct {
namespace DP_ARCH {

void any_forward(const EngineCall& p, int64_t item, const void* states) {
    p.wide ? forward<double>(p, item, states) : forward<float>(p, item, states);
}
void any_backward(const EngineCall& p, int64_t item, const void* states) {
    p.wide ? backward<double>(p, item, states) : backward<float>(p, item, states);
}
void any_summary(const EngineCall& p, int64_t item, bool reverse, void* a, void* b) {
    p.wide ? summary<double>(p, item, reverse, a, b) : summary<float>(p, item, reverse, a, b);
}
void any_compose(const EngineCall& p, const void* a, const void* b, const void* state, void* out) {
    p.wide ? compose<double>(p, a, b, state, out) : compose<float>(p, a, b, state, out);
}

void any_selective_scan(const SelectiveScan& p, int64_t item, bool reverse) {
    if (p.allow_neg_eigval)
        reverse ? scan_backward<true>(p, item) : scan_forward<true>(p, item);
    else
        reverse ? scan_backward<false>(p, item) : scan_forward<false>(p, item);
}

#define DP_TEXT(x) #x
#define DP_NAME(x) DP_TEXT(x)
constexpr Kernels table = {
    DP_NAME(DP_ARCH), any_forward, any_backward, any_summary, any_compose, units_of, run_units, any_selective_scan};

}  // namespace DP_ARCH
}  // namespace deltaproduct
