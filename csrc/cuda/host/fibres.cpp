// See fibres.h.
#include "cuda/host/fibres.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define JLEBM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define JLEBM_ASAN 1
#endif
#endif
#if defined(JLEBM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// jlebm_switch_stack(save, load): callee-saved registers and the stack pointer go to *save, and come from load
#if !defined(JLEBM_UCONTEXT) && defined(__x86_64__)
#define JLEBM_OWN_SWITCH 1
asm(R"(
.text
.globl jlebm_switch_stack
.hidden jlebm_switch_stack
.type jlebm_switch_stack,@function
jlebm_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size jlebm_switch_stack,.-jlebm_switch_stack
)");
#elif !defined(JLEBM_UCONTEXT) && defined(__aarch64__)
#define JLEBM_OWN_SWITCH 1
asm(R"(
.text
.globl jlebm_switch_stack
.hidden jlebm_switch_stack
.type jlebm_switch_stack,%function
jlebm_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size jlebm_switch_stack,.-jlebm_switch_stack
)");
#endif
#if defined(JLEBM_OWN_SWITCH)
extern "C" void jlebm_switch_stack(void** save, void* load);
#endif

namespace jlebm {
namespace cuda {
namespace host {

class Fibre {
public:
    Fibre(FibrePool* pool, int index, size_t stack_bytes) : pool_(pool), index_(index), stack_bytes_(stack_bytes) {
        const size_t guard = 4096; // an overflow faults instead of writing into the neighbour
        mapped_bytes_ = stack_bytes + guard;
        mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(mapped_, guard, PROT_NONE);
        stack_ = static_cast<char*>(mapped_) + guard;
    }
    ~Fibre() {
        clear_marks();
        munmap(mapped_, mapped_bytes_);
    }
    Fibre(const Fibre&) = delete;
    Fibre& operator=(const Fibre&) = delete;

    void start_over() {
        clear_marks();
        done_ = false;
        fake_stack_ = nullptr;
#if defined(JLEBM_OWN_SWITCH)
        auto* top = reinterpret_cast<uintptr_t*>(stack_ + stack_bytes_);
#if defined(__x86_64__)
        *--top = 0; // nobody to return to; a function begins with its stack 8 bytes off 16, as after a call
        *--top = reinterpret_cast<uintptr_t>(&enter); // popped by ret
        for (int i = 0; i < 6; ++i) *--top = 0;
#else
        top -= 20;
        for (int i = 0; i < 20; ++i) top[i] = 0;
        top[11] = reinterpret_cast<uintptr_t>(&enter); // x30
#endif
        saved_ = top;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_;
        context_.uc_stack.ss_size = stack_bytes_;
        context_.uc_link = nullptr;
        makecontext(&context_, &enter, 0);
#endif
    }

    bool run() {
        starting_ = this;
        pool_->current_ = this;
#if defined(JLEBM_ASAN)
        __sanitizer_start_switch_fiber(&pool_->home_.fake_stack, stack_, stack_bytes_);
#endif
#if defined(JLEBM_OWN_SWITCH)
        jlebm_switch_stack(&pool_->home_.stack_pointer, saved_);
#else
        ucontext_t home;
        pool_->home_.context = &home;
        swapcontext(&home, &context_);
#endif
#if defined(JLEBM_ASAN)
        __sanitizer_finish_switch_fiber(pool_->home_.fake_stack, nullptr, nullptr);
#endif
        return done_;
    }

    void leave(bool for_good) {
        (void)for_good;
#if defined(JLEBM_ASAN)
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, pool_->home_.stack, pool_->home_.stack_bytes);
#endif
#if defined(JLEBM_OWN_SWITCH)
        jlebm_switch_stack(&saved_, pool_->home_.stack_pointer);
#else
        swapcontext(&context_, static_cast<ucontext_t*>(pool_->home_.context));
#endif
#if defined(JLEBM_ASAN)
        __sanitizer_finish_switch_fiber(fake_stack_, &pool_->home_.stack, &pool_->home_.stack_bytes);
#endif
    }

private:
    static void enter() {
        Fibre* self = starting_;
#if defined(JLEBM_ASAN)
        __sanitizer_finish_switch_fiber(nullptr, &self->pool_->home_.stack, &self->pool_->home_.stack_bytes);
#endif
        self->pool_->entry_(self->index_);
        self->done_ = true;
        self->leave(true);
        std::abort(); // nobody runs a fibre that is done
    }

    // frames left behind by a fibre that never ended
    void clear_marks() {
#if defined(JLEBM_ASAN)
        __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
    }

    static thread_local Fibre* starting_;
    FibrePool* pool_;
    int index_;
    size_t stack_bytes_, mapped_bytes_ = 0;
    void* mapped_ = nullptr;
    char* stack_ = nullptr;
    void* fake_stack_ = nullptr;
    bool done_ = false;
#if defined(JLEBM_OWN_SWITCH)
    void* saved_ = nullptr;
#else
    ucontext_t context_;
#endif
};

thread_local Fibre* Fibre::starting_ = nullptr;

FibrePool::FibrePool(size_t stack_bytes) : stack_bytes_(stack_bytes) {}
FibrePool::~FibrePool() = default;

void FibrePool::reset(int count, std::function<void(int)> entry) {
    entry_ = std::move(entry);
    while (int(fibres_.size()) < count)
        fibres_.push_back(std::make_unique<Fibre>(this, int(fibres_.size()), stack_bytes_));
    for (int i = 0; i < count; ++i) fibres_[size_t(i)]->start_over();
}

bool FibrePool::run(int i) { return fibres_[size_t(i)]->run(); }

void FibrePool::pause() { current_->leave(false); }

} // namespace host
} // namespace cuda
} // namespace jlebm
