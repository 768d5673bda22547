// Memory of large results, used again instead of being returned to the system.
#pragma once

#include <c10/core/Allocator.h>

namespace boft {

// Allocates like torch's CPU allocator; blocks of kRecycledFrom bytes and more are kept when they are freed, up to
// kMostIdleBytes in all, the oldest returned first.
//
// A training step frees its activations in backward, glibc then returns the top of its heap to the system, and the next
// step faults every page in again: 25,000 faults a step for a model of six layers of 768 channels and 1024 tokens.
// Kept blocks are idle between steps only, so the largest amount of memory in use is the same.
//
// Thread-safe, also across fork.
c10::Allocator& recycler();

// The same for a block of which no more than `used` bytes will be written, wherever in it: only pages that were written
// take memory, so torch's memory profile counts `used`.
c10::DataPtr reserve(size_t bytes, size_t used);

// The bytes that are kept and not in use, which `release_idle` returns to the system.
size_t idle_bytes();
void release_idle();

}  // namespace boft
