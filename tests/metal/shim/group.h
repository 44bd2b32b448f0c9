// A threadgroup: its threads, where each of them waits, its memory, and the order they run in.
#pragma once
#include <cstdarg>
#include <vector>

#include "fibers.h"
#include "types.h"

namespace shim {

constexpr uint lanes = 32;
constexpr size_t threadgroup_memory_limit = 32768;  // bytes, of every Apple GPU

enum class State { ready, at_simd, at_barrier, done };

// what the thread attributes of a kernel are filled from
struct Place {
  uint3 grid;                   // threads of the grid
  uint3 group_threads;          // threads asked for per group
  uint3 group_size;             // threads of this group: fewer at the edges of the grid
  uint3 groups;                 // groups of the grid
  uint3 group;                  // position of this group
  uint3 local;                  // position of the thread in this group
  uint index;                   // of the thread in this group
  uint group_count;             // threads of this group
};

struct Thread {
  Fiber fiber;
  Place place;
  State state = State::done;
  const char* operation = "";
  int line = 0;
  uint simd_phase = 0;
  uint barrier_phase = 0;
};

// Two slots per lane in turns: a lane that runs on to its next operation must not overwrite what
// slower lanes have yet to read.
struct alignas(16) Slot { unsigned char bytes[16]; };
struct Simdgroup {
  Slot slots[2][lanes];
};

struct Group {
  Fiber scheduler;
  std::vector<Thread*> threads;  // as many as the largest group has
  std::vector<Simdgroup> simdgroups;
  std::vector<void*> memory;     // threadgroup arrays, by place of declaration
  size_t memory_bytes = 0;
  uint count = 0;                // threads of the current group
  Thread* running = nullptr;
  void (*kernel)(const Place&) = nullptr;
  bool reverse = false;
  char started, phases[2];       // addresses for the race detector
};
inline Group group;

// Ends the run with a message in words.
[[noreturn]] inline void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  uint3 at = group.threads[0]->place.group;
  std::fprintf(stderr, " (in threadgroup %u, %u, %u)\n", at.x, at.y, at.z);
  std::fflush(stderr);
  std::_Exit(3);
}

// Waiting threads of which `other` will never be one.
[[noreturn]] inline void never_meet(const Thread& waiting, const Thread& other) {
  if (other.state == State::done)
    fault("%s in line %d is reached by thread %u, but thread %u has returned", waiting.operation,
          waiting.line, waiting.place.index, other.place.index);
  fault("%s in line %d is reached by thread %u, but thread %u waits at %s in line %d",
        waiting.operation, waiting.line, waiting.place.index, other.place.index, other.operation,
        other.line);
}

// Threads run this for all groups, one after the other.
inline void thread_main() {
  Thread* self;
  {
    Unwatched here;
    self = group.running;
    arrived(self->fiber, &group.scheduler);
  }
  acquire(&group.started);
  for (;;) {
    Place place;
    {
      Unwatched here;
      place = self->place;
    }
    group.kernel(place);
    Unwatched here;
    self->state = State::done;
    change(self->fiber, group.scheduler);
  }
}

// Stops the running thread until the scheduler lets it go on.
inline Thread& wait(State state, const char* operation, int line) {
  Unwatched here;
  Thread& self = *group.running;
  self.state = state;
  self.operation = operation;
  self.line = line;
  change(self.fiber, group.scheduler);
  return self;
}

inline void resume(Thread& thread) {
  group.running = &thread;
  change(group.scheduler, thread.fiber);
}

// Runs the threads of one simdgroup until each is done or at a group barrier.
inline void run_simdgroup(uint first, uint last) {
  for (;;) {
    for (uint i = first; i < last; ++i) {
      Thread& thread = *group.threads[group.reverse ? first + last - 1 - i : i];
      if (thread.state == State::ready) resume(thread);
    }
    Thread* waiting = nullptr;
    for (uint i = first; i < last && !waiting; ++i)
      if (group.threads[i]->state == State::at_simd) waiting = group.threads[i];
    if (!waiting) return;
    for (uint i = first; i < last; ++i) {
      Thread& other = *group.threads[i];
      if (other.state != State::at_simd || other.line != waiting->line ||
          std::strcmp(other.operation, waiting->operation) != 0)
        never_meet(*waiting, other);
    }
    for (uint i = first; i < last; ++i) group.threads[i]->state = State::ready;
  }
}

inline void run_group() {
  uint simdgroups = (group.count + lanes - 1) / lanes;
  for (uint i = 0; i < group.count; ++i) group.threads[i]->state = State::ready;
  for (;;) {
    for (uint i = 0; i < simdgroups; ++i) {
      uint first = lanes * (group.reverse ? simdgroups - 1 - i : i);
      run_simdgroup(first, first + lanes < group.count ? first + lanes : group.count);
    }
    Thread* waiting = nullptr;
    for (uint i = 0; i < group.count && !waiting; ++i)
      if (group.threads[i]->state == State::at_barrier) waiting = group.threads[i];
    if (!waiting) break;
    for (uint i = 0; i < group.count; ++i) {
      Thread& other = *group.threads[i];
      if (other.state != State::at_barrier || other.line != waiting->line)
        never_meet(*waiting, other);
    }
    for (uint i = 0; i < group.count; ++i) group.threads[i]->state = State::ready;
  }
  for (void*& array : group.memory) {
    std::free(array);
    array = nullptr;
  }
  group.memory_bytes = 0;
}

// The group's array of one declaration; poisoned when a group first comes to it.
template <typename Array>
Array& threadgroup_array(uint declaration) {
  Unwatched here;
  if (group.memory.size() <= declaration) group.memory.resize(declaration + 1, nullptr);
  void*& array = group.memory[declaration];
  if (array == nullptr) {
    group.memory_bytes += sizeof(Array);
    if (group.memory_bytes > threadgroup_memory_limit)
      fault("%zu bytes of threadgroup memory, the limit is %zu", group.memory_bytes,
            threadgroup_memory_limit);
    if (posix_memalign(&array, 64, sizeof(Array)) != 0) std::abort();
    std::memset(array, 0xff, sizeof(Array));
  }
  return *static_cast<Array*>(array);
}

inline void run_grid(uint3 grid, uint3 threads, void (*kernel)(const Place&), bool reverse) {
  Unwatched here;
  group.kernel = kernel;
  group.reverse = reverse;
  uint3 groups((grid.x + threads.x - 1) / threads.x, (grid.y + threads.y - 1) / threads.y,
               (grid.z + threads.z - 1) / threads.z);
  uint most = threads.x * threads.y * threads.z;
  for (uint i = 0; i < most; ++i) {
    group.threads.push_back(new Thread);
    group.threads.back()->fiber.start(thread_main);
  }
  group.simdgroups.resize((most + lanes - 1) / lanes);
  release(&group.started);
  uint total = groups.x * groups.y * groups.z;
  for (uint n = 0; n < total; ++n) {
    uint at = reverse ? total - 1 - n : n;
    uint3 position(at % groups.x, at / groups.x % groups.y, at / groups.x / groups.y);
    uint3 size;
    for (uint axis = 0; axis < 3; ++axis) {
      uint left = grid[axis] - position[axis] * threads[axis];
      size[axis] = left < threads[axis] ? left : threads[axis];
    }
    group.count = size.x * size.y * size.z;
    for (uint i = 0; i < group.count; ++i) {
      uint3 local(i % size.x, i / size.x % size.y, i / size.x / size.y);
      group.threads[i]->place = {grid, threads, size, groups, position, local, i, group.count};
    }
    run_group();
  }
}

}  // namespace shim
