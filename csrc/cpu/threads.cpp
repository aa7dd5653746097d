#include "cpu/threads.h"

#include <atomic>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace jlebm {
namespace {

// The entry that GCC's compiled code calls for `#pragma omp parallel`; libgomp, libomp and libiomp5 all export it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
    GompParallel parallel = nullptr;
    std::string name = "std::thread";
};

#if defined(__linux__)
int visit_library(dl_phdr_info* info, size_t, void* found) {
    const char* path = info->dlpi_name;
    if (path == nullptr ||
        !(std::strstr(path, "libgomp") || std::strstr(path, "libomp") || std::strstr(path, "libiomp")))
        return 0;
    // RTLD_NOLOAD: only a handle to what is loaded already
    void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return 0;
    void* symbol = dlsym(handle, "GOMP_parallel");
    if (symbol == nullptr) return 0;
    auto* runtime = static_cast<Runtime*>(found);
    std::memcpy(&runtime->parallel, &symbol, sizeof symbol);
    const char* slash = std::strrchr(path, '/');
    runtime->name = std::string("openmp: ") + (slash ? slash + 1 : path);
    return 1;
}
#endif

const Runtime& runtime() {
    static const Runtime found = [] {
        Runtime r;
#if defined(__linux__)
        dl_iterate_phdr(visit_library, &r);
#endif
        return r;
    }();
    return found;
}

std::atomic<bool> uses_openmp{true};

thread_local const std::function<void()>* meanwhile = nullptr;

struct Job {
    void (*task)(void*, int);
    void* context;
    Interruptible* interruptible;
    std::atomic<int> left;   // to be begun
    std::atomic<int> undone; // begun or not
};

void work(void* p) {
    Job* job = static_cast<Job*>(p);
    Meanwhile::begin(); // only the calling thread has something
    const Interruptible::Serving serving(job->interruptible);
    const FlushDenormals flush;
    for (int worker = job->left.fetch_sub(1) - 1; worker >= 0; worker = job->left.fetch_sub(1) - 1) {
        job->task(job->context, worker);
        job->undone.fetch_sub(1, std::memory_order_release);
    }
    Interruptible::wait_for(job->undone);
}

} // namespace

const char* thread_runtime() {
    return uses_openmp ? runtime().name.c_str() : "std::thread (OpenMP's do not survive a fork)";
}

void leave_openmp() { uses_openmp = false; }

Meanwhile::Meanwhile(std::function<void()> work) : work_(std::move(work)) { meanwhile = &work_; }

void Meanwhile::begin() {
    if (const auto* const work = std::exchange(meanwhile, nullptr)) (*work)();
}

void run_workers(int n, void (*task)(void*, int), void* context) {
    Job job{task, context, Interruptible::current(), {n}, {n}};
    if (uses_openmp && runtime().parallel != nullptr) {
        runtime().parallel(work, &job, unsigned(n), 0);
        return;
    }
    std::vector<std::thread> threads;
    threads.reserve(size_t(n) - 1);
    try {
        for (int i = 1; i < n; ++i) threads.emplace_back(work, &job);
    } catch (const std::system_error&) {
        // the system gives no more threads: those that started and this one do all the work
    }
    work(&job);
    for (std::thread& t : threads) t.join();
}

} // namespace jlebm
