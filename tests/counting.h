/* An allocator that gives `left` pieces of memory more, and knows how many are held. */
#ifndef COUNTING_H
#define COUNTING_H

#include <stdint.h>
#include <stdlib.h>

typedef struct counting { int64_t left, held; } counting;

static void *counting_allocate(void *user, size_t bytes)
{
    counting *c = (counting *)user;
    if (c->left == 0) return NULL;
    --c->left;
    ++c->held;
    return malloc(bytes);
}

static void counting_release(void *user, void *memory, size_t bytes)
{
    (void)bytes;
    --((counting *)user)->held;
    free(memory);
}

#endif
