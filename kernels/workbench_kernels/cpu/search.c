/* A beam search in a graph over keys, for the largest inner products with a query. search.py beside this file calls it. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define WIDE 16

typedef float vf __attribute__((vector_size(64)));

static inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }

static float product(const float *a, const float *b, long n) {
    vf sums = {0};
    long i = 0;
    for (; i + WIDE <= n; i += WIDE) sums += load(a + i) * load(b + i);
    float sum = 0;
    for (int j = 0; j < WIDE; j++) sum += sums[j];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

typedef struct {
    float score;
    int32_t key;
    int32_t followed;
} Held;

/* Let a key join the beam, best first, where it belongs. */
static long joined(Held *beam, long held, long room, Held new) {
    if (held == room && !(new.score > beam[held - 1].score)) return held;
    long low = 0, high = held;
    while (low < high) {
        long middle = (low + high) / 2;
        if (beam[middle].score >= new.score) low = middle + 1; else high = middle;
    }
    long moved = (held < room ? held : room - 1) - low;
    memmove(beam + low + 1, beam + low, (size_t)moved * sizeof *beam);
    beam[low] = new;
    return held < room ? held + 1 : held;
}

/* keys [h, n, d], links [h, n, r] and entries [h, e], -1 for none, query [h, b, d]. found and scores [h, b, wanted], best
   first, n and -inf where there are fewer; visited [h, b]. Returns whether there was memory enough. */
int wb_search(
    const float *keys, const int32_t *links, const int32_t *entries, const float *query, long heads, long each, long count,
    long width, long degree, long entering, long room, long together, long wanted, int64_t *found, float *scores,
    int64_t *visited, int threads) {
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        uint8_t *seen = malloc((size_t)count);
        Held *beam = malloc((size_t)room * sizeof *beam);
        long most = together * degree > entering ? together * degree : entering;
        int32_t *next = malloc((size_t)(most > 0 ? most : 1) * sizeof *next);
        if (!seen || !beam || !next) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (long one = 0; one < heads * each; one++) {
            if (failed) continue;
            long head = one / each, held = 0, looked = 0, asked = entering;
            const float *key = keys + head * count * width, *q = query + one * width;
            memset(seen, 0, (size_t)count);
            memcpy(next, entries + head * entering, (size_t)entering * sizeof *next);
            while (asked) {
                long fresh = 0;
                for (long i = 0; i < asked; i++) {
                    if (next[i] < 0 || seen[next[i]]) continue;
                    seen[next[i]] = 1;
                    next[fresh++] = next[i];
                    const char *there = (const char *)(key + next[fresh - 1] * width);
                    for (long at = 0; at < width * 4; at += 64) __builtin_prefetch(there + at);
                }
                for (long i = 0; i < fresh; i++)
                    held = joined(beam, held, room, (Held){product(key + next[i] * width, q, width), next[i], 0});
                looked += fresh;
                asked = 0;
                for (long i = 0, going = 0; i < held && going < together; i++) {
                    if (beam[i].followed) continue;
                    beam[i].followed = 1;
                    going++;
                    memcpy(next + asked, links + (head * count + beam[i].key) * degree, (size_t)degree * sizeof *next);
                    asked += degree;
                }
            }
            for (long i = 0; i < wanted; i++) {
                found[one * wanted + i] = i < held ? beam[i].key : count;
                scores[one * wanted + i] = i < held ? beam[i].score : -INFINITY;
            }
            visited[one] = looked;
        }
        free(seen);
        free(beam);
        free(next);
    }
    return !failed;
}
