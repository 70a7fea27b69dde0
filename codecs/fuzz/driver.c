/* Runs LLVMFuzzerTestOneInput without libFuzzer: mutates a pool of inputs with a seeded generator for so many seconds.
 *
 *     fuzz_g722 SECONDS [SEED] */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define POOL 64
#define MOST 4096 /* octets of an input */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state;

/* xorshift64* */
static uint64_t random_below(uint64_t bound)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * 0x2545F4914F6CDD1DULL >> 16) % bound;
}

static size_t mutate(uint8_t *data, size_t size)
{
    static const uint8_t EDGES[] = {0x00, 0x01, 0x7f, 0x80, 0xff, 0xfe, 0x3f, 0xc0};
    for (uint64_t rounds = 1 + random_below(6); rounds; rounds--) {
        uint64_t at = size ? random_below(size) : 0, length = size ? 1 + random_below(size - at) : 0;
        switch (random_below(7)) {
        case 0: /* a random octet */
            if (size)
                data[at] = (uint8_t)random_below(256);
            break;
        case 1: /* a bit */
            if (size)
                data[at] ^= (uint8_t)(1 << random_below(8));
            break;
        case 2: /* a run of an extreme */
            memset(data + at, EDGES[random_below(sizeof EDGES)], length);
            break;
        case 3: /* cut */
            size = at;
            break;
        case 4: /* repeat a part */
            if (size + length <= MOST) {
                memmove(data + at + length, data + at, size - at);
                size += length;
            }
            break;
        case 5: /* fresh octets at the end */
            for (length = random_below(1 + MOST - size); length; length--)
                data[size++] = (uint8_t)random_below(256);
            break;
        default: /* a few of them */
            for (length = random_below(40); length && size < MOST; length--)
                data[size++] = (uint8_t)random_below(256);
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    static uint8_t pool[POOL][MOST];
    static size_t sizes[POOL];
    if (argc < 2) {
        fprintf(stderr, "usage: %s SECONDS [SEED]\n", argv[0]);
        return 2;
    }
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : (uint64_t)time(NULL), runs = 0;
    state = seed * 2 + 1;
    printf("%s: seed %llu\n", argv[0], (unsigned long long)seed);
    fflush(stdout);
    for (time_t end = time(NULL) + atoi(argv[1]); time(NULL) < end; runs++) {
        uint64_t slot = random_below(POOL);
        sizes[slot] = mutate(pool[slot], sizes[slot]);
        uint8_t *exact = malloc(sizes[slot] ? sizes[slot] : 1); /* so that a step beyond its end is seen */
        memcpy(exact, pool[slot], sizes[slot]);
        LLVMFuzzerTestOneInput(exact, sizes[slot]);
        free(exact);
    }
    printf("%s: %llu inputs, no fault\n", argv[0], (unsigned long long)runs);
    return 0;
}
