/* One token through a decoder layer on a CPU: products with rows of weights, and attention over what a cache holds.

   Sums are in float32, in vectors of 16. token.py beside this file calls the functions and checks what they are given. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define WIDE 16
#define AT_ONCE 4      /* rows of weights that are read side by side */
#define AHEAD 8192     /* bytes by which memory is asked for before it is needed */
#define BLOCK 32        /* numbers that share a scale and a zero */
#define QUERIES 8      /* query heads of a KV head that share one pass over its values */

typedef float vf __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(16)));
typedef uint16_t vs __attribute__((vector_size(32)));
typedef _Float16 vh __attribute__((vector_size(32)));

static inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf floats(vu bits) { vf x; memcpy(&x, &bits, sizeof x); return x; }
static inline vf halves(const _Float16 *p) { vh x; memcpy(&x, p, sizeof x); return __builtin_convertvector(x, vf); }
/* By way of 16 bits: GCC 12 takes vectors apart to widen them fourfold. */
static inline vu bytes(const uint8_t *p) {
    vb x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, vs), vu);
}
static inline vf all(float x) { return (vf){0} + x; }
static inline vf chosen(vi where, vf x, vf y) {
    vi a, b;
    memcpy(&a, &x, sizeof a);
    memcpy(&b, &y, sizeof b);
    a = (a & where) | (b & ~where);
    memcpy(&x, &a, sizeof x);
    return x;
}

static inline float sum(vf x) {
    union { vf whole; struct { v8 low, high; } half; } a = {x};
    union { v8 whole; struct { v4 low, high; } half; } b = {a.half.low + a.half.high};
    v4 s = b.half.low + b.half.high;
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* e ** x by 2 ** n times a polynomial of what is left (Cephes), for x <= 88. */
static inline vf exponential(vf x) {
    x = chosen(x < -87.0f, all(-87.0f), x);
    vf n = x * 1.44269504f + 12582912.0f;
    n -= 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
            + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf scale;
    memcpy(&scale, &power, sizeof scale);
    return (p * r * r + r + 1.0f) * scale;
}

/* -- products with rows of weights */

/* Rows of one weight. form: how its numbers are held; scale and zero are of blocks of 32. */
enum { FLOATS, BFLOATS, FOURS, EIGHTS, HALVES };
typedef struct {
    const void *rows;
    const _Float16 *scale, *zero;
    const float *bias;
    long count;
    long form;
} Part;

/* The inputs of a product: x itself (0), normalised by its root mean square (1), or silu(first half) * second (2). */
static void inputs(int kind, const float *x, const float *norm, float eps, long k, float *to) {
    float root = 1.0f;
    long i = 0;
    if (kind == 1) {
        vf squares = {0};
        float rest = 0;
        for (; i + WIDE <= k; i += WIDE) { vf v = load(x + i); squares += v * v; }
        for (; i < k; i++) rest += x[i] * x[i];
        root = 1.0f / sqrtf((sum(squares) + rest) / (float)k + eps);
    }
    for (i = 0; i + WIDE <= k; i += WIDE) {
        vf v = load(x + i);
        if (kind == 1) v = load(norm + i) * (v * root);
        if (kind == 2) {
            vf less = -v;
            less = chosen(less > 88.0f, all(88.0f), less);
            v = v / (1.0f + exponential(less)) * load(x + k + i);
        }
        store(to + i, v);
    }
    for (; i < k; i++) {
        float v = x[i];
        if (kind == 1) v = norm[i] * (v * root);
        if (kind == 2) v = v / (1.0f + expf(-v)) * x[k + i];
        to[i] = v;
    }
}

/* Of every 32 numbers those of even place before those of odd place, as bfloat16 weights are read. */
static void pair(const float *x, long k, float *to) {
    long first = 0;
    for (; first + 2 * WIDE <= k; first += 2 * WIDE)
        for (int i = 0; i < WIDE; i++) {
            to[first + i] = x[first + 2 * i];
            to[first + WIDE + i] = x[first + 2 * i + 1];
        }
    for (; first < k; first++) to[first] = x[first];
}

static inline __attribute__((always_inline)) void bfloats(const uint16_t *w, const float *x, long k, int rows, float *y) {
    vf s[AT_ONCE];
    long i = 0;
    for (int j = 0; j < rows; j++) s[j] = (vf){0};
    for (; i + 2 * WIDE <= k; i += 2 * WIDE) {
        vf even = load(x + i), odd = load(x + i + WIDE);
        for (int j = 0; j < rows; j++) {
            const uint16_t *p = w + j * k + i;
            __builtin_prefetch((const char *)p + AHEAD);
            vu two;
            memcpy(&two, p, sizeof two);
            s[j] += floats(two << 16) * even;
            s[j] += floats(two & 0xffff0000u) * odd;
        }
    }
    for (int j = 0; j < rows; j++) {
        float rest = 0;
        for (long c = i; c < k; c++) {
            uint32_t bits = (uint32_t)w[j * k + c] << 16;
            float v;
            memcpy(&v, &bits, sizeof v);
            rest += v * x[c];
        }
        y[j] = sum(s[j]) + rest;
    }
}

static inline __attribute__((always_inline)) void singles(const float *w, const float *x, long k, int rows, float *y) {
    vf s[AT_ONCE];
    long i = 0;
    for (int j = 0; j < rows; j++) s[j] = (vf){0};
    for (; i + WIDE <= k; i += WIDE) {
        vf each = load(x + i);
        for (int j = 0; j < rows; j++) {
            const float *p = w + j * k + i;
            __builtin_prefetch((const char *)p + AHEAD);
            s[j] += load(p) * each;
        }
    }
    for (int j = 0; j < rows; j++) {
        float rest = 0;
        for (long c = i; c < k; c++) rest += w[j * k + c] * x[c];
        y[j] = sum(s[j]) + rest;
    }
}

/* `count` halves as floats. */
static inline void widen(const _Float16 *from, long count, float *to) {
    long i = 0;
    for (; i + WIDE <= count; i += WIDE) store(to + i, halves(from + i));
    for (; i < count; i++) to[i] = (float)from[i];
}

static inline vi words(const uint8_t *p) { vs x; memcpy(&x, p, sizeof x); return (vi)__builtin_convertvector(x, vu); }
static inline vf counted(vi codes) { return __builtin_convertvector(codes, vf); }

/* Rows of codes of 4 or 8 bits: first sums of codes times inputs, each block's times its scale, then each block's zero
   times the sum of its inputs. 32 bytes are 16 words, and lane l of a word's field f is the code of column 16 f + l. */
static inline __attribute__((always_inline)) void coded(const Part *part, long row, const float *x, const float *totals,
                                                        long k, int bits, int rows, float *y) {
    long blocks = k / BLOCK, size = BLOCK * bits / 8;
    const uint8_t *w = (const uint8_t *)part->rows + row * blocks * size;
    const _Float16 *scale = part->scale + row * blocks, *zero = part->zero + row * blocks;
    float by[AT_ONCE * blocks];
    vf s[AT_ONCE];
    widen(scale, rows * blocks, by);
    for (int j = 0; j < rows; j++) s[j] = (vf){0};
    for (long b = 0; b < blocks; b += 8 / bits) {
        const float *in = x + b * BLOCK;
        for (int j = 0; j < rows; j++) {
            const uint8_t *p = w + (j * blocks + b) * size;
            const float *scales = by + j * blocks + b;
            __builtin_prefetch((const char *)p + AHEAD);
            vi codes = words(p);
            if (bits == 8)
                s[j] += (counted(codes & 255) * load(in) + counted(codes >> 8) * load(in + WIDE)) * scales[0];
            else {
                s[j] += (counted(codes & 15) * load(in) + counted((codes >> 4) & 15) * load(in + WIDE)) * scales[0];
                s[j] += (counted((codes >> 8) & 15) * load(in + 2 * WIDE) + counted(codes >> 12) * load(in + 3 * WIDE))
                        * scales[1];
            }
        }
    }
    for (int j = 0; j < rows; j++) {
        vf more = {0};
        float rest = 0;
        long b = 0;
        for (; b + WIDE <= blocks; b += WIDE) more += halves(zero + j * blocks + b) * load(totals + b);
        for (; b < blocks; b++) rest += (float)zero[j * blocks + b] * totals[b];
        y[j] = sum(s[j] + more) + rest;
    }
}

static inline __attribute__((always_inline)) void rows_of(const Part *part, long r, int rows, const float *x,
                                                          const float *paired, const float *totals, long k, float *y) {
    switch (part->form) {
    case FLOATS: singles((const float *)part->rows + r * k, x, k, rows, y); break;
    case BFLOATS: bfloats((const uint16_t *)part->rows + r * k, paired, k, rows, y); break;
    case FOURS: coded(part, r, x, totals, k, 4, rows, y); break;
    default: coded(part, r, x, totals, k, 8, rows, y);
    }
}

/* y = the rows of all parts times the inputs, plus biases, plus what `plus` holds (both may be null).
   scratch: 2 k numbers, and one for each block. */
void wb_linear(int kind, const float *x, const float *norm, float eps, long k, long count, const Part *parts,
               const float *plus, float *y, float *scratch, int threads) {
    float *paired = scratch + k, *totals = paired + k;
    int forms[EIGHTS + 1] = {0};
    for (long p = 0; p < count; p++) forms[parts[p].form] = 1;
    inputs(kind, x, norm, eps, k, scratch);
    if (forms[BFLOATS]) pair(scratch, k, paired);
    if (forms[FOURS] || forms[EIGHTS])
        for (long b = 0; b < k / BLOCK; b++) totals[b] = sum(load(scratch + b * BLOCK) + load(scratch + b * BLOCK + WIDE));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long me = 0, of = 1, base = 0;
#ifdef _OPENMP
        me = omp_get_thread_num();
        of = omp_get_num_threads();
#endif
        for (long p = 0; p < count; p++) {
            const Part *part = parts + p;
            long groups = (part->count + AT_ONCE - 1) / AT_ONCE, end = groups * (me + 1) / of * AT_ONCE;
            if (end > part->count) end = part->count;
            for (long r = groups * me / of * AT_ONCE; r < end; r += AT_ONCE) {
                float out[AT_ONCE];
                int rows = end - r < AT_ONCE ? (int)(end - r) : AT_ONCE;
                if (rows == AT_ONCE) rows_of(part, r, AT_ONCE, scratch, paired, totals, k, out);
                else for (int j = 0; j < rows; j++) rows_of(part, r + j, 1, scratch, paired, totals, k, out + j);
                for (int j = 0; j < rows; j++) {
                    float v = out[j];
                    if (part->bias) v += part->bias[r + j];
                    y[base + r + j] = plus ? plus[base + r + j] + v : v;
                }
            }
            base += part->count;
        }
    }
}

/* Write w as codes of 4 or 8 bits in blocks of 32, each number exactly scale * code + zero of its block: as files hold
   them whose weights were rounded so. 0 where one number would be another. */
int wb_code(const float *w, long blocks, int bits, uint8_t *codes, _Float16 *scales, _Float16 *zeros, int threads) {
    int exact = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(&& : exact)
    for (long b = 0; b < blocks; b++) {
        const float *x = w + b * BLOCK;
        float low = x[0], high = x[0], most = bits == 4 ? 15.0f : 255.0f;
        uint8_t code[BLOCK];
        int same = 1;
        if (!exact) continue;
        for (int i = 1; i < BLOCK; i++) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
        }
        float reach = high > -low ? high : -low;
        scales[b] = (_Float16)(bits == 4 ? (high - low) / 15.0f : reach / 127.0f);
        float scale = (float)scales[b];
        zeros[b] = (_Float16)(bits == 4 ? low : -128.0f * scale);
        float zero = (float)zeros[b], by = scale > 0 ? 1.0f / scale : 0.0f;
        for (int i = 0; i < BLOCK; i++) {
            float c = (x[i] - zero) * by + 0.5f;
            c = c >= 0 ? c : 0;
            code[i] = (uint8_t)(c < most ? c : most);
            same &= (float)code[i] * scale + zero == x[i];
        }
        if (bits == 8)
            for (int i = 0; i < WIDE; i++) {
                codes[b * BLOCK + 2 * i] = code[i];
                codes[b * BLOCK + 2 * i + 1] = code[i + WIDE];
            }
        else  /* two blocks share 16 words: the first has their lower bytes */
            for (int i = 0; i < WIDE; i++)
                codes[b / 2 * BLOCK + 2 * i + b % 2] = (uint8_t)(code[i] | code[i + WIDE] << 4);
        exact = exact && same;
    }
    return exact;
}

/* Turn the first r channels of x [n, d] in place by cos and sin [r]: channel i is paired with i + r / 2. */
void wb_rotate(float *x, long n, long d, long r, const float *cosine, const float *sine) {
    for (long i = 0; i < n; i++)
        for (long c = 0; c < r / 2; c++) {
            float *a = x + i * d + c, *b = a + r / 2, first = *a, second = *b;
            *a = first * cosine[c] - second * sine[c];
            *b = second * cosine[c + r / 2] + first * sine[c + r / 2];
        }
}

/* -- attention of one token over the rows of a cache */

/* A head's rows: `packed` of them as codes, then those of the tail. */
typedef struct {
    const uint8_t *codes;   /* [t, b], bits 0 where nothing is packed */
    const _Float16 *scale, *zero;
    const int32_t *starts, *lengths;               /* of codes, each head */
    const int32_t *scale_starts, *zero_starts;     /* of scale and zero */
    const void *tail;
    const int32_t *tail_starts, *tail_lengths;
    const _Float16 *balance;                       /* [k, d] or null */
    int32_t bits, group, channel;                  /* channel: scales go along the tokens */
    int32_t width;
    int32_t form;                                  /* of the tail: FLOATS, BFLOATS or HALVES */
} Side;

/* Numbers i .. i + 15 of what is held in this form. */
static inline __attribute__((always_inline)) vf held(const void *p, long i, int form) {
    if (form == FLOATS) return load((const float *)p + i);
    if (form == HALVES) return halves((const _Float16 *)p + i);
    vs x;
    memcpy(&x, (const uint16_t *)p + i, sizeof x);
    return floats(__builtin_convertvector(x, vu) << 16);
}

/* The codes of channels c .. c + 15 of a row, whose bytes hold the codes j, j + b, j + 2 b and so on. */
typedef struct { int byte, shift, group; } Place;
static inline Place place(const Side *s, long c) {
    long stride = s->width * s->bits / 8;
    return (Place){(int)(c % stride), (int)(c / stride) * s->bits, (int)(c / s->group)};
}
static inline vf codes_at(const uint8_t *row, Place where, uint32_t mask) {
    return __builtin_convertvector((vi)((bytes(row + where.byte) >> (uint32_t)where.shift) & mask), vf);
}

static void packed_scores(const Side *s, long head, const float *query, long queries, long stride_out, float *out) {
    long d = s->width, b = d * s->bits / 8, groups = (d + s->group - 1) / s->group;
    const uint8_t *codes = s->codes + s->starts[head] * b;
    long rows = s->lengths[head];
    float turned[queries * d], shift[queries];
    float sums[queries * groups];
    uint32_t mask = (1u << s->bits) - 1;
    Place places[d / WIDE];
    for (long c = 0; c < d; c += WIDE) places[c / WIDE] = place(s, c);
    if (!s->channel)
        for (long q = 0; q < queries; q++)
            for (long g = 0; g < groups; g++) {
                float total = 0;
                for (long c = g * s->group; c < d && c < (g + 1) * s->group; c++) total += query[q * d + c];
                sums[q * groups + g] = total;
            }
    for (long r = 0, in_group = 0, group = 0; r < rows; r++, in_group++) {
        const uint8_t *row = codes + r * b;
        if (in_group == s->group) { in_group = 0; group++; }
        if (s->channel && in_group == 0) {
            const _Float16 *scale = s->scale + (s->scale_starts[head] + group) * d;
            const _Float16 *zero = s->zero + (s->zero_starts[head] + group) * d;
            for (long q = 0; q < queries; q++) {
                vf total = {0};
                for (long c = 0; c < d; c += WIDE) {
                    vf v = load(query + q * d + c);
                    if (s->balance) v /= halves(s->balance + head * d + c);
                    total += v * halves(zero + c);
                    store(turned + q * d + c, v * halves(scale + c));
                }
                shift[q] = sum(total);
            }
        }
        vf total[QUERIES];
        for (long first = 0; first < queries; first += QUERIES) {
            long count = queries - first < QUERIES ? queries - first : QUERIES;
            for (long q = 0; q < count; q++) total[q] = (vf){0};
            for (long c = 0; c < d; c += WIDE) {
                vf code = codes_at(row, places[c / WIDE], mask);
                if (s->channel)
                    for (long q = 0; q < count; q++) total[q] += load(turned + (first + q) * d + c) * code;
                else {
                    code *= (float)s->scale[(s->scale_starts[head] + r) * groups + places[c / WIDE].group];
                    for (long q = 0; q < count; q++) total[q] += load(query + (first + q) * d + c) * code;
                }
            }
            for (long q = 0; q < count; q++) {
                float more = 0;
                if (s->channel) more = shift[first + q];
                else
                    for (long g = 0; g < groups; g++)
                        more += (float)s->zero[(s->zero_starts[head] + r) * groups + g] * sums[(first + q) * groups + g];
                out[(first + q) * stride_out + r] = sum(total[q]) + more;
            }
        }
    }
}

static inline __attribute__((always_inline)) void scores_of(const void *rows, long first, long count, long d, int form,
                                                            const float *query, long queries, long stride, float *out) {
    for (long r = 0; r < count; r++)
        for (long q = 0; q < queries; q++) {
            vf total = {0};
            for (long c = 0; c < d; c += WIDE) total += held(rows, (first + r) * d + c, form) * load(query + q * d + c);
            out[q * stride + r] = sum(total);
        }
}

static void tail_scores(const Side *s, long head, long count, const float *query, long queries, long stride, float *out) {
    long first = s->tail_starts[head];
    switch (s->form) {
    case FLOATS: scores_of(s->tail, first, count, s->width, FLOATS, query, queries, stride, out); break;
    case BFLOATS: scores_of(s->tail, first, count, s->width, BFLOATS, query, queries, stride, out); break;
    default: scores_of(s->tail, first, count, s->width, HALVES, query, queries, stride, out);
    }
}

static void packed_values(const Side *s, long head, const float *weights, long stride, long queries, float *out) {
    long d = s->width, b = d * s->bits / 8, groups = (d + s->group - 1) / s->group, rows = s->lengths[head];
    const uint8_t *codes = s->codes + s->starts[head] * b;
    const _Float16 *scale = s->scale + s->scale_starts[head] * groups, *zero = s->zero + s->zero_starts[head] * groups;
    for (long first = 0; first < queries; first += QUERIES) {
        long count = queries - first < QUERIES ? queries - first : QUERIES;
        for (long c = 0; c < d; c += WIDE) {
            vf total[QUERIES];
            float shift[QUERIES];
            Place where = place(s, c);
            uint32_t mask = (1u << s->bits) - 1;
            for (long q = 0; q < count; q++) { total[q] = load(out + (first + q) * d + c); shift[q] = 0; }
            for (long r = 0; r < rows; r++) {
                vf code = codes_at(codes + r * b, where, mask);
                float by = (float)scale[r * groups + where.group], from = (float)zero[r * groups + where.group];
                for (long q = 0; q < count; q++) {
                    float weight = weights[(first + q) * stride + r];
                    total[q] += code * (weight * by);
                    shift[q] += weight * from;
                }
            }
            for (long q = 0; q < count; q++) store(out + (first + q) * d + c, total[q] + shift[q]);
        }
    }
}

static inline __attribute__((always_inline)) void values_of(const void *rows, long begin, long count_rows, long d, int form,
                                                            const float *weights, long stride, long queries, float *out) {
    for (long first = 0; first < queries; first += QUERIES) {
        long count = queries - first < QUERIES ? queries - first : QUERIES;
        for (long c = 0; c < d; c += WIDE) {
            vf total[QUERIES];
            for (long q = 0; q < count; q++) total[q] = load(out + (first + q) * d + c);
            for (long r = 0; r < count_rows; r++) {
                vf row = held(rows, (begin + r) * d + c, form);
                for (long q = 0; q < count; q++) total[q] += row * weights[(first + q) * stride + r];
            }
            for (long q = 0; q < count; q++) store(out + (first + q) * d + c, total[q]);
        }
    }
}

static void tail_values(const Side *s, long head, long count, const float *weights, long stride, long queries, float *out) {
    long first = s->tail_starts[head];
    switch (s->form) {
    case FLOATS: values_of(s->tail, first, count, s->width, FLOATS, weights, stride, queries, out); break;
    case BFLOATS: values_of(s->tail, first, count, s->width, BFLOATS, weights, stride, queries, out); break;
    default: values_of(s->tail, first, count, s->width, HALVES, weights, stride, queries, out);
    }
}

/* Scores to weights, in place. */
static void soften(float *x, long m, float scale, float softcap) {
    float most = -INFINITY, total = 0;
    for (long i = 0; i < m; i++) {
        x[i] *= scale;
        if (softcap > 0) x[i] = tanhf(x[i] / softcap) * softcap;
        most = x[i] > most || x[i] != x[i] ? x[i] : most;
    }
    vf sums = {0};
    long i = 0;
    for (; i + WIDE <= m; i += WIDE) {
        vf e = exponential(load(x + i) - most);
        store(x + i, e);
        sums += e;
    }
    for (; i < m; i++) total += x[i] = expf(x[i] - most);
    total = 1.0f / (total + sum(sums));
    for (i = 0; i < m; i++) x[i] *= total;
}

static float at(const void *p, long i, int form) {
    if (form == FLOATS) return ((const float *)p)[i];
    if (form == HALVES) return (float)((const _Float16 *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Quantise the first of `rows` rows of each head's tail, whose parts are `room` rows, to row `to` of its codes, and close
   the tail up. As `quantise` and `pack` do, to the bit. 0 where a scale or zero would not be finite, and nothing is done. */
int wb_leave(void *tail, int form, long heads, long room, long rows, long d, uint8_t *codes, _Float16 *scales,
             _Float16 *zeros, long codes_room, long scales_room, long zeros_room, long to, int bits, long group) {
    long b = (d * bits + 7) / 8, groups = (d + group - 1) / group, size = form == FLOATS ? 4 : 2;
    float steps = (float)((1 << bits) - 1);
    for (long head = 0; head < heads; head++)
        for (long g = 0; g < groups; g++) {
            float low = INFINITY, high = -INFINITY;
            for (long c = g * group; c < d && c < (g + 1) * group; c++) {
                float x = at(tail, head * room * d + c, form);
                if (x != x) return 0;
                low = x < low ? x : low;
                high = x > high ? x : high;
            }
            _Float16 zero = (_Float16)low, scale = (_Float16)((high - (float)zero) / steps);
            if (!isfinite((float)zero) || !isfinite((float)scale)) return 0;
            scales[(head * scales_room + to) * groups + g] = scale;
            zeros[(head * zeros_room + to) * groups + g] = zero;
        }
    for (long head = 0; head < heads; head++) {
        uint8_t *row = codes + (head * codes_room + to) * b;
        memset(row, 0, b);
        for (long c = 0; c < d; c++) {
            float scale = (float)scales[(head * scales_room + to) * groups + c / group];
            float code = at(tail, head * room * d + c, form) - (float)zeros[(head * zeros_room + to) * groups + c / group];
            code = rintf(code / (scale > 0 ? scale : 1.0f));
            code = code < 0 ? 0 : code > steps ? steps : code;
            row[c % b] |= (uint8_t)((int)code << (c / b * bits));
        }
        char *first = (char *)tail + head * room * d * size;
        memmove(first, first + d * size, (rows - 1) * d * size);
    }
    return 1;
}

/* Attention of query [h, d] over each KV head's rows: out [h, dv]. scratch [h, m], m the most rows of a head. */
void wb_attend(const float *query, const Side *keys, const Side *values, long heads, long kv_heads, long m, float scale,
               float softcap, float *out, float *scratch, int threads) {
    long queries = heads / kv_heads, d = keys->width, dv = values->width;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (long head = 0; head < kv_heads; head++) {
        const float *q = query + head * queries * d;
        float *scores = scratch + head * queries * m, *to = out + head * queries * dv;
        long front = keys->bits ? keys->lengths[head] : 0, rows = front + keys->tail_lengths[head];
        if (front) packed_scores(keys, head, q, queries, m, scores);
        tail_scores(keys, head, rows - front, q, queries, m, scores + front);
        for (long i = 0; i < queries; i++) soften(scores + i * m, rows, scale, softcap);
        memset(to, 0, queries * dv * sizeof(float));
        front = values->bits ? values->lengths[head] : 0;
        if (front) packed_values(values, head, scores, m, queries, to);
        tail_values(values, head, rows - front, scores + front, m, queries, to);
    }
}
