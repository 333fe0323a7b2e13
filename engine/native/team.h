// Threads that compute one job together, and meet at barriers in it.
//
// A layer has nine barriers, a step of a small model hundreds: sleeping at each would cost more than the work between
// them, and spinning at each would keep away, on a machine where others run too, the very thread that is waited for. So
// a member that waits within a job spins for some microseconds and then yields its core, again and again; between jobs
// it spins for about as long as the caller needs from one layer to the next, and then sleeps.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <thread>
#include <vector>

namespace baton {

constexpr int SPINS_IN_JOB = 1000;       // pauses of some ten nanoseconds
constexpr int SPINS_BETWEEN_JOBS = 8000;

class Team {
   public:
    // The caller is member 0 of each job; the others are threads of our own, member i on cores[i] if there are cores.
    Team(int threads, const int* cores) : size_(threads) {
        for (int member = 1; member < threads; ++member) {
            threads_.emplace_back([this, member] { serve(member); });
            if (cores) {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(cores[member], &set);
                pthread_setaffinity_np(threads_.back().native_handle(), sizeof set, &set);
            }
        }
    }

    ~Team() {
        stopping_.store(true, std::memory_order_relaxed);
        post();
        for (auto& thread : threads_) thread.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls work(member) on all members at once, and returns when all have ended.
    template <class Work>
    void run(const Work& work) {
        call_ = [](const void* work, int member) { (*static_cast<const Work*>(work))(member); };
        work_ = &work;
        next_.store(0, std::memory_order_relaxed);
        if (size_ > 1) post();
        work(0);
        barrier();
    }

    // Returns when all members have called it; what they wrote before is seen by all.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
            if (spins < SPINS_IN_JOB)
                _mm_pause();
            else
                sched_yield();
    }

    // The next of the tasks 0, 1, 2, ... that are shared out since the last barrier.
    int next_task() { return next_.fetch_add(1, std::memory_order_relaxed); }

   private:
    void post() {
        // In this order, and read in the other: either a member sees the job before it sleeps, or we see it asleep.
        job_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
    }

    void serve(int member) {
        for (uint32_t done = 0;; ++done) {
            await(done);
            if (stopping_.load(std::memory_order_relaxed)) return;
            call_(work_, member);
            barrier();
        }
    }

    void await(uint32_t done) {
        for (int spins = 0; spins < SPINS_BETWEEN_JOBS; ++spins) {
            if (job_.load(std::memory_order_acquire) != done) return;
            _mm_pause();
        }
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        while (job_.load(std::memory_order_seq_cst) == done) futex(FUTEX_WAIT_PRIVATE, done);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }

    void futex(int operation, uint32_t value) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&job_), operation, value, nullptr, nullptr, 0);
    }

    const int size_;
    std::vector<std::thread> threads_;
    void (*call_)(const void*, int) = nullptr;
    const void* work_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint32_t> job_{0};
    std::atomic<int> asleep_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> next_{0};
};

}  // namespace baton
