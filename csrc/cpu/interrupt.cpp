#include "cpu/interrupt.h"

#include <thread>
#include <utility>

namespace jlebm {
namespace {

using Clock = std::chrono::steady_clock;

// short for a person who waits, long beside the wait for the interpreter's lock that a question may cost
constexpr auto kBetweenQuestions = std::chrono::milliseconds(200);
constexpr auto kBetweenGlances = std::chrono::microseconds(200); // at whether the others are done

struct Here {
    Interruptible* work = nullptr;
    bool began = false; // by this thread
};
thread_local Here here;

} // namespace

Interruptible::Interruptible(std::function<bool()> gives_up)
    : gives_up_(std::move(gives_up)), begun_(Clock::now()), next_(begun_ + kBetweenQuestions), before_(here.work),
      began_before_(here.began) {
    here = {this, true};
}

Interruptible::~Interruptible() { here = {before_, began_before_}; }

Interruptible* Interruptible::current() { return here.work; }

bool Interruptible::stops() {
    Interruptible* const work = here.work;
    if (work == nullptr) return false;
    if (here.began) work->ask();
    return work->stopped_.load(std::memory_order_relaxed);
}

void Interruptible::wait_for(const std::atomic<int>& left) {
    Interruptible* const work = here.work;
    if (work == nullptr || !here.began || Clock::now() < work->begun_ + kBetweenQuestions) return;
    while (left.load(std::memory_order_acquire) > 0) {
        work->ask();
        std::this_thread::sleep_for(kBetweenGlances);
    }
}

void Interruptible::ask() {
    if (stopped_.load(std::memory_order_relaxed) || Clock::now() < next_) return;
    if (gives_up_()) stopped_.store(true, std::memory_order_relaxed);
    next_ = Clock::now() + kBetweenQuestions;
}

Interruptible::Serving::Serving(Interruptible* work) : before_(here.work), began_before_(here.began) {
    if (work != here.work) here = {work, false};
}

Interruptible::Serving::~Serving() { here = {before_, began_before_}; }

} // namespace jlebm
