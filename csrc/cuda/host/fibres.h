// Fibres: stacks of their own inside one thread of the host, switched by hand; the address sanitizer is told.
//
// x86-64 and AArch64 switch in a dozen instructions, everything else (and JLEBM_UCONTEXT) through ucontext.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace jlebm {
namespace cuda {
namespace host {

class Fibre;

// The fibres of one thread. run() enters a fibre and returns when that calls pause() or its function ends.
class FibrePool {
public:
    // stacks are kept and used again
    explicit FibrePool(size_t stack_bytes);
    ~FibrePool();
    FibrePool(const FibrePool&) = delete;
    FibrePool& operator=(const FibrePool&) = delete;

    // `entry(i)` on `count` fresh fibres; whatever ran on them before is forgotten, not unwound
    void reset(int count, std::function<void(int)> entry);
    // true when fibre i's function has ended
    bool run(int i);
    // from inside a fibre: back to run()
    void pause();

private:
    friend class Fibre;
    size_t stack_bytes_;
    std::vector<std::unique_ptr<Fibre>> fibres_;
    std::function<void(int)> entry_;
    Fibre* current_ = nullptr;
    struct Home { // where run() was called
        void* stack_pointer = nullptr;
        void* context = nullptr;
        void* fake_stack = nullptr;
        const void* stack = nullptr;
        size_t stack_bytes = 0;
    } home_;
};

} // namespace host
} // namespace cuda
} // namespace jlebm
