// One reusable block of float memory per calling thread: kernels take their workspaces from it, nothing else allocates.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace jlebm {
namespace JLEBM_TARGET { // each target its own copy: an inline function must not cross targets

constexpr int64_t kArenaAlign = 16;              // floats: one cache line, one AVX-512 vector
constexpr int64_t kArenaKeep = int64_t(4) << 20; // floats kept between calls; larger ones are returned

class Arena {
public:
    Arena(float* begin, int64_t floats) : next_(begin), end_(begin + floats) {}

    float* take(int64_t floats) {
        float* p = next_;
        next_ += (floats + kArenaAlign - 1) / kArenaAlign * kArenaAlign;
        if (next_ > end_) throw std::bad_alloc(); // a workspace's floats() and take() disagree
        return p;
    }

private:
    float* next_;
    float* end_;
};

class ArenaStorage {
public:
    ~ArenaStorage() { std::free(memory_); }

    // its memory was reserved and not yet given back: by a call of this thread, amid which this one is made
    bool taken() const { return taken_; }

    float* reserve(int64_t floats) {
        if (floats > capacity_) {
            std::free(memory_);
            memory_ = nullptr;
            capacity_ = 0;
            void* p = nullptr;
            if (posix_memalign(&p, 64, size_t(floats) * sizeof(float)) != 0) throw std::bad_alloc();
            memory_ = static_cast<float*>(p);
            capacity_ = floats;
        }
        taken_ = true;
        return memory_;
    }

    void give_back() {
        taken_ = false;
        if (capacity_ > kArenaKeep) {
            std::free(memory_);
            memory_ = nullptr;
            capacity_ = 0;
        }
    }

private:
    float* memory_ = nullptr;
    int64_t capacity_ = 0;
    bool taken_ = false;
};

} // namespace JLEBM_TARGET
} // namespace jlebm
