/* The numbers that the scripts in golden/ (make_training.py and others) make for themselves, and the tests again. */
#ifndef UNIFORM_H
#define UNIFORM_H

#include <stdint.h>

static uint32_t hash32(uint32_t stream, uint32_t index)
{
    uint32_t x = index * 0x9e3779b1u + stream * 0x85ebca77u + 0x165667b1u;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* [0, 1) in steps of 2^-24. */
static double uniform(uint32_t stream, uint32_t index)
{
    return (double)(hash32(stream, index) >> 8) / 16777216.0;
}

#endif
