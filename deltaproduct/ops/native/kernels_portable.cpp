// The kernels for any machine: vectors of 16 bytes, which are SSE2 on x86-64 and NEON on aarch64.
#define DP_ARCH portable
#define DP_VECTOR_BYTES 16
#if defined(__aarch64__)
#define DP_REGISTERS 32
#else
#define DP_REGISTERS 16
#endif
#include "kernels.h"

const deltaproduct::Kernels deltaproduct::portable_kernels = deltaproduct::portable::table;
