// The engine's C interface: which kernels this processor can run, and how work is spread over threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "interface.h"

namespace deltaproduct {
namespace {

// Best first.
const Kernels* const all_kernels[] = {
#ifdef DELTAPRODUCT_X86
    &avx512_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

bool runs_here(const Kernels& kernels) {
#ifdef DELTAPRODUCT_X86
    if (&kernels == &avx512_kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("fma");
    if (&kernels == &avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return true;
}

const Kernels* best_kernels() {
    for (const Kernels* kernels : all_kernels)
        if (runs_here(*kernels)) return kernels;
    return nullptr;
}

std::atomic<const Kernels*> chosen{best_kernels()};

// GOMP_parallel of the OpenMP runtime that the process already has, which PyTorch computes with: its threads are
// there, and while they wait they spin, so that threads of our own would have to fight them for the cores.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<GompParallel> gomp_parallel{nullptr};

// work(data) on up to so many threads at once
void on_threads(int64_t threads, void (*work)(void*), void* data) {
    if (threads <= 1) {
        work(data);
    } else if (GompParallel gomp = gomp_parallel.load()) {
        gomp(work, data, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, data);
        } catch (const std::system_error&) {  // no more threads to be had: those that there are do the work
        }
        work(data);
        for (std::thread& other : others) other.join();
    }
}

template <class F>
struct Loop {
    const F& work;
    const int64_t count, grain;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};

    void run() {
        try {
            for (int64_t i; (i = next.fetch_add(grain)) < count;)
                for (int64_t j = i; j < i + grain && j < count; ++j) work(j);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    }
    static void run_one(void* loop) { static_cast<Loop*>(loop)->run(); }
};

// work(0), …, work(count − 1) on up to so many threads, each taking the next `grain` of them when it is done; one by
// one where there would be too few grains to keep all threads busy to the end.
template <class F>
void parallel_for(int64_t count, int64_t threads, const F& work, int64_t grain = 1) {
    if (grain * threads * 4 > count) grain = 1;
    Loop<F> loop{work, count, grain};
    on_threads(threads < count ? threads : count, Loop<F>::run_one, &loop);
    if (loop.out_of_memory) throw std::bad_alloc();
}

struct Scratch {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Scratch() { std::free(memory); }
};
thread_local Scratch own_scratch;

// The states at the starts (backward: gradients at the ends) of all segments, [segments,sequences,HV,K,V].
std::vector<char> segment_states(const EngineCall& p, const Kernels& kernels, bool reverse) {
    const int64_t size = p.wide ? sizeof(double) : sizeof(float), heads = p.sequences * p.value_heads;
    const int64_t state = p.key_dim * p.value_dim * size, items = p.segments * heads * p.value_blocks;
    const int64_t square = p.key_dim * p.key_dim * size;
    std::vector<char> a(items * square), b(p.segments * heads * state), states(p.segments * heads * state);
    const int64_t unused =
        reverse ? 0 : p.segments - 1;  // nothing comes after the last, or in reverse before the first
    parallel_for(items, p.threads, [&](int64_t i) {
        if (i / (heads * p.value_blocks) != unused)
            kernels.summary(p, i, reverse, &a[i * square], &b[i / p.value_blocks * state]);
    });
    const char* given = static_cast<const char*>(reverse ? p.d_final_state : p.initial_state);
    parallel_for(heads, p.threads, [&](int64_t head) {
        for (int64_t n = 0; n < p.segments; ++n) {
            const int64_t to = (reverse ? p.segments - 1 - n : n) * heads + head;
            const int64_t from = reverse ? to + heads : to - heads;
            if (n > 0)
                kernels.compose(
                    p, &a[from * p.value_blocks * square], &b[from * state], &states[from * state],
                    &states[to * state]);
            else if (given)
                std::memcpy(&states[to * state], given + head * state, state);
        }
    });
    return states;
}

int run(const EngineCall& p, bool reverse) {
    const Kernels& kernels = *chosen.load();
    try {
        const int64_t items = p.segments * p.sequences * p.value_heads * p.value_blocks;
        std::vector<char> states;
        if (p.segments > 1) states = segment_states(p, kernels, reverse);
        const void* starts = p.segments > 1 ? states.data() : nullptr;
        // The heads of a sequence lie side by side in memory: what one fetches too much of, the next finds in its
        // cache.
        parallel_for(
            items, p.threads, [&](int64_t i) { (reverse ? kernels.backward : kernels.forward)(p, i, starts); },
            p.value_heads * p.value_blocks);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// A program being run. Every thread goes through all instructions and takes units of each while there are any; one
// that needs earlier results waits until their last unit is done, whoever does it.
struct ProgramRun {
    struct Progress {
        std::atomic<int64_t> next{0}, done{0};
    };
    const Instruction* program;
    const int64_t count;
    const Kernels& kernels;
    std::vector<Progress> progress;
    std::atomic<bool> out_of_memory{false};

    void run() {
        int64_t finished = 0;  // so many from the beginning are known to be
        for (int64_t n = 0; n < count; ++n) {
            const Instruction& instruction = program[n];
            for (; finished < instruction.after; ++finished) wait_for(finished);
            const Units units = kernels.units(instruction);
            for (int64_t from; (from = progress[n].next.fetch_add(units.grain)) < units.count;) {
                const int64_t to = from + units.grain < units.count ? from + units.grain : units.count;
                try {
                    kernels.run_units(instruction, from, to);
                } catch (const std::bad_alloc&) {
                    out_of_memory = true;
                }
                progress[n].done.fetch_add(to - from, std::memory_order_release);
            }
        }
        for (; finished < count; ++finished) wait_for(finished);
    }
    void wait_for(int64_t n) {
        const int64_t all = kernels.units(program[n]).count;
        for (int spins = 0; progress[n].done.load(std::memory_order_acquire) < all;)
            if (++spins > SPINS) std::this_thread::yield();
    }
    static void run_one(void* program_run) { static_cast<ProgramRun*>(program_run)->run(); }
    static constexpr int SPINS = 1 << 12;
};

int run_program(const Instruction* program, int64_t count, int64_t threads) {
    try {
        ProgramRun program_run{program, count, *chosen.load(), std::vector<ProgramRun::Progress>(count)};
        on_threads(threads, ProgramRun::run_one, &program_run);
        return program_run.out_of_memory ? 1 : 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

int selective_scan(const SelectiveScan& p, bool reverse) {
    const Kernels& kernels = *chosen.load();
    try {
        const int64_t blocks = p.blocks();
        parallel_for(
            p.sequences * blocks, p.threads, [&](int64_t i) { kernels.selective_scan(p, i, reverse); }, blocks);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

void* scratch(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;  // or there may be none, aligned to 64
    if (bytes > own_scratch.bytes) {
        std::free(own_scratch.memory);
        own_scratch.bytes = 0;
        own_scratch.memory = std::aligned_alloc(64, bytes);
        if (!own_scratch.memory) throw std::bad_alloc();
        own_scratch.bytes = bytes;
    }
    return own_scratch.memory;
}

}  // namespace deltaproduct

// What Python calls. A function that can fail returns 0 where it did not.
#define API __attribute__((visibility("default")))

extern "C" {

API int64_t deltaproduct_problem_bytes() { return sizeof(deltaproduct::EngineCall); }
API int64_t deltaproduct_instruction_bytes() { return sizeof(deltaproduct::Instruction); }
API int64_t deltaproduct_selective_scan_bytes() { return sizeof(deltaproduct::SelectiveScan); }

API const char* deltaproduct_kernels() { return deltaproduct::chosen.load()->name; }

// The name of the i-th kernels of this build that the processor can run, best first; null beyond the last.
API const char* deltaproduct_kernels_here(int32_t i) {
    for (const deltaproduct::Kernels* kernels : deltaproduct::all_kernels)
        if (deltaproduct::runs_here(*kernels) && i-- == 0) return kernels->name;
    return nullptr;
}

API int deltaproduct_use_kernels(const char* name) {
    for (const deltaproduct::Kernels* kernels : deltaproduct::all_kernels)
        if (deltaproduct::runs_here(*kernels) && !std::strcmp(kernels->name, name)) {
            deltaproduct::chosen = kernels;
            return 0;
        }
    return 1;
}

API void deltaproduct_use_openmp(void* gomp_parallel) {
    deltaproduct::gomp_parallel = reinterpret_cast<deltaproduct::GompParallel>(gomp_parallel);
}

// Asks for large pages for memory that is about to be written for the first time.
API void deltaproduct_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, from = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // only a hint: may fail
#endif
}

API int deltaproduct_forward(const deltaproduct::EngineCall* p) { return deltaproduct::run(*p, false); }
API int deltaproduct_backward(const deltaproduct::EngineCall* p) { return deltaproduct::run(*p, true); }
API int deltaproduct_play(const deltaproduct::Instruction* program, int64_t count, int64_t threads) {
    return deltaproduct::run_program(program, count, threads);
}
API int deltaproduct_selective_scan(const deltaproduct::SelectiveScan* p, int32_t reverse) {
    return deltaproduct::selective_scan(*p, reverse != 0);
}
}
