// The checks and registrations of all ops, in one source: torch's headers are read once.
#include "../../../csrc/cuda/attention.cpp"
#include "../../../csrc/cuda/loss.cpp"
#include "../../../csrc/cuda/masking.cpp"
#include "../../../csrc/cuda/patches.cpp"
#include "faults.inl"
