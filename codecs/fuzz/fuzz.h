/* What the fuzz targets share: an input is a few choices, then audio; a broken promise aborts. */
#ifndef STREAMSINK_FUZZ_H
#define STREAMSINK_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMISE(condition)                                                     \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                           \
        }                                                                      \
    } while (0)

/* Exactly so many bytes, and never NULL. */
static inline void *block(size_t bytes)
{
    void *made = malloc(bytes ? bytes : 1);
    PROMISE(made);
    return made;
}

static inline void *block_of(const void *from, size_t bytes)
{
    return memcpy(block(bytes), from, bytes);
}

/* The next stretch's length: 0 to 255 items by the octets of the audio itself, or all that is left. */
static inline size_t stretch(const uint8_t *audio, size_t at, size_t left)
{
    size_t length = audio[at];
    return length < left && at % 7 ? length : left;
}

#endif
