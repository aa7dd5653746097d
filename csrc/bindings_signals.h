// Long calls heed signals: Ctrl-C, and whatever else has a handler in Python.
#pragma once

#include <exception>
#include <optional>
#include <thread>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include "bindings_records.h"
#include "cpu/interrupt.h"

namespace jlebm {

// What a signal's handler raised amid a kernel, or torch when it made a tensor; it is the caller's to see, whatever
// else may be caught on the way.
struct RaisedForCaller {
    std::exception_ptr error;
};

// Where Python runs handlers. Others never ask: the interpreter's lock, at its end, ends the thread that wants it.
inline bool is_main_thread() {
#if defined(__linux__)
    static thread_local const bool is = syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
    static thread_local const bool is = pthread_main_np() != 0;
#else
    static const std::thread::id first = std::this_thread::get_id(); // that ran a chain: commonly it
    const bool is = std::this_thread::get_id() == first;
#endif
    return is;
}

// While one of these lives, the kernel that the main thread runs without the interpreter's lock is given up if a
// handler raises; nothing comes of it in other threads.
class HeedsSignals {
public:
    HeedsSignals() {
        if (is_main_thread()) kernel_.emplace([this] { return asks(); });
    }

    // to be called with the lock held, once the kernel has returned
    void raise() const {
        if (raised_) throw RaisedForCaller{raised_};
    }

private:
    bool asks() {
        const py::gil_scoped_acquire locked;
        if (PyErr_CheckSignals() == 0) return false;
        raised_ = std::make_exception_ptr(py::error_already_set());
        return true;
    }

    std::exception_ptr raised_;
    std::optional<Interruptible> kernel_;
};

// run() without the interpreter's lock, given up if a signal's handler raises
template <class Run>
void run_heeding_signals(const Run& run) {
    const HeedsSignals signals;
    {
        const py::gil_scoped_release unlocked;
        run();
    }
    signals.raise();
}

} // namespace jlebm
