// The main program around one kernel: reads the launch and the buffers from standard input, runs
// the grid, writes the outputs to standard output. Exit status 3: a fault, in words on stderr.
#pragma once
#include "group.h"

namespace shim {

constexpr size_t guard = 4096;  // bytes before and behind a buffer

struct Buffer {
  const char* name;
  bool output;
  size_t bytes = 0;
  unsigned char* data = nullptr;
};

inline void read_all(void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) std::abort();
}

inline void read_buffer(Buffer& buffer) {
  uint64_t bytes;
  read_all(&bytes, 8);
  buffer.bytes = bytes;
  void* memory;
#if defined(__SANITIZE_ADDRESS__)
  // of the exact size: the sanitizer sees the first byte beyond
  if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  buffer.data = static_cast<unsigned char*>(memory);
#else
  if (posix_memalign(&memory, 64, bytes + 2 * guard) != 0) std::abort();
  std::memset(memory, 0xff, bytes + 2 * guard);
  buffer.data = static_cast<unsigned char*>(memory) + guard;
#endif
  read_all(buffer.data, bytes);
}

inline void check_guards(const Buffer& buffer) {
#if !defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < guard; ++i) {
    bool before = buffer.data[-1 - static_cast<ptrdiff_t>(i)] != 0xff;
    if (!before && buffer.data[buffer.bytes + i] == 0xff) continue;
    std::fprintf(stderr, "write out of bounds: byte %zu %s %s, which has %zu\n", i + 1,
                 before ? "before" : "behind the end of", buffer.name, buffer.bytes);
    std::fflush(stderr);
    std::_Exit(3);
  }
#endif
}

inline int program(int count, char** arguments, Buffer* buffers, int buffer_count,
                   void (*kernel)(const Place&)) {
  Unwatched here;
  uint32_t launch[6];
  read_all(launch, sizeof(launch));
  for (int i = 0; i < buffer_count; ++i) read_buffer(buffers[i]);
  bool reverse = count > 1 && std::strcmp(arguments[1], "reverse") == 0;
  run_grid(uint3(launch[0], launch[1], launch[2]), uint3(launch[3], launch[4], launch[5]), kernel,
           reverse);
  for (int i = 0; i < buffer_count; ++i) check_guards(buffers[i]);
  for (int i = 0; i < buffer_count; ++i)
    if (buffers[i].output) std::fwrite(buffers[i].data, 1, buffers[i].bytes, stdout);
  std::fflush(stdout);
  std::fflush(stderr);
  std::_Exit(0);  // the threads' fibers never end
}

}  // namespace shim
