// Giving up a long call, as for Ctrl-C.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>

namespace jlebm {

// While one of these lives, the thread that made it asks gives_up() a few times a second, amid its own share of the
// work that it begins. Once the answer is yes, all workers leave their remaining steps undone, and what they have
// written is not to be used.
class Interruptible {
public:
    explicit Interruptible(std::function<bool()> gives_up);
    ~Interruptible();
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

    // what a worker asks now and then before a step: whether to leave it and all others undone
    static bool stops();

    // The thread that began the work and has done its own share: waits for what the others have left, and goes on
    // asking. It returns at once where the work has been short: then the others will be done soon.
    static void wait_for(const std::atomic<int>& left);

    // of the work that this thread does at the moment; null: it ends when it is done
    static Interruptible* current();

    // A thread that takes part in another one's work, for as long as one of these lives.
    class Serving {
    public:
        explicit Serving(Interruptible* work);
        ~Serving();
        Serving(const Serving&) = delete;
        Serving& operator=(const Serving&) = delete;

    private:
        Interruptible* const before_;
        const bool began_before_;
    };

private:
    void ask();

    const std::function<bool()> gives_up_;
    std::atomic<bool> stopped_{false};
    const std::chrono::steady_clock::time_point begun_;
    std::chrono::steady_clock::time_point next_; // question
    Interruptible* const before_;
    const bool began_before_;
};

} // namespace jlebm
