// Long calls heed signals: Ctrl-C, and whatever else has a handler in Python.
#pragma once

#include <exception>

#include "bindings_records.h"
#include "cpu/interrupt.h"

namespace jlebm {

// What a signal's handler raised amid a kernel; it is the caller's to see, whatever else may be caught on the way.
struct RaisedBySignal {
    std::exception_ptr error;
};

// While one of these lives, the kernel that this thread runs without the interpreter's lock is given up if a handler
// raises. Handlers run in the main thread alone, as always in Python; in others nothing comes of it.
class HeedsSignals {
public:
    // to be called with the lock held, once the kernel has returned
    void raise() const {
        if (raised_) throw RaisedBySignal{raised_};
    }

private:
    std::exception_ptr raised_;
    Interruptible kernel_{[this] {
        const py::gil_scoped_acquire locked;
        if (PyErr_CheckSignals() == 0) return false;
        raised_ = std::make_exception_ptr(py::error_already_set());
        return true;
    }};
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
