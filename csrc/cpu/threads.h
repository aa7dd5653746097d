// Threads for the CPU kernels.
//
// If the process already runs an OpenMP runtime (torch brings one), its threads are used, so that two pools never
// compete for the same cores; otherwise, and in a child process that was forked, threads are started for the call.
#pragma once

#include <functional>

#include "cpu/denormals.h"
#include "cpu/interrupt.h"

namespace jlebm {

// Runs task(context, worker) for worker = n - 1 .. 0, each exactly once, where denormal results are 0. The calling
// thread takes part; fewer threads than n may serve, so a worker must not wait for one that has not begun.
void run_workers(int n, void (*task)(void* context, int worker), void* context);

// "openmp: <library>" or "std::thread"
const char* thread_runtime();

// From now on threads are started for every call. For a child process: only the thread that forked lives on in it, and
// an OpenMP runtime that worked before the fork would wait there for its others for ever.
void leave_openmp();

// What the calling thread does while the workers of its next parallel work begin without it, before it takes part
// itself; what remains undone when this ends is done then. The work may not throw, and no worker may wait for it.
class Meanwhile {
public:
    explicit Meanwhile(std::function<void()> work);
    ~Meanwhile() { begin(); }
    Meanwhile(const Meanwhile&) = delete;
    Meanwhile& operator=(const Meanwhile&) = delete;

    static void begin(); // now, what the calling thread has to do, if anything

private:
    std::function<void()> work_;
};

template <class Task>
void parallel_workers(int n, const Task& task) {
    if (n <= 1) {
        Meanwhile::begin();
        const FlushDenormals flush;
        task(0);
        return;
    }
    run_workers(
        n, [](void* context, int worker) { (*static_cast<const Task*>(context))(worker); }, const_cast<Task*>(&task));
}

} // namespace jlebm
