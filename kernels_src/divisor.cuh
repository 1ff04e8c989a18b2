// Division by numbers that the host knows: `divisor` in sagepp/schedule.py.
#pragma once

// x / d for x below 2^31, by the round-up method of Granlund and Montgomery ("Division by Invariant Integers using
// Multiplication", 1994): 2^32 + multiplier is 2^(32 + shift) / d, rounded up.
struct Divisor {
    unsigned multiplier, shift;
};

__device__ __forceinline__ unsigned operator/(unsigned x, Divisor d) {
    return (__umulhi(x, d.multiplier) + x) >> d.shift;
}
