/* The hot loop of the load: sends every stream's frame at its time and times what comes back, over TLS.
 *
 * All else of the load is Python (load.py), which calls these functions through ctypes. In Python the loop cost 16 µs
 * a message, half of it kernel and TLS, and the load would have been what limits from 1,300 streams on.
 *
 * OpenSSL is used by the few functions below, declared here because its headers need not be installed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

typedef struct ssl_ctx_st SSL_CTX;
typedef struct ssl_st SSL;
const void *TLS_client_method(void);
SSL_CTX *SSL_CTX_new(const void *method);
long SSL_CTX_ctrl(SSL_CTX *ctx, int command, long larg, void *parg);
SSL *SSL_new(SSL_CTX *ctx);
void SSL_free(SSL *ssl);
int SSL_set_fd(SSL *ssl, int fd);
int SSL_connect(SSL *ssl);
int SSL_read(SSL *ssl, void *buffer, int size);
int SSL_write(SSL *ssl, const void *buffer, int size);
int SSL_get_error(const SSL *ssl, int result);
int SSL_has_pending(const SSL *ssl);
void ERR_clear_error(void);

enum {
    SSL_ERROR_WANT_READ = 2,
    SSL_CTRL_MODE = 33,
    SSL_CTRL_SET_READ_AHEAD = 41,
    SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER = 2,
};

enum {
    OUT = 256,   /* frames of a stream that may be out at once: 5 s of them */
    ROOM = 8192, /* bytes of replies read at once */
    BATCH = 16,  /* frames sent before streams with replies get their turn, and the other way round */
};

struct stream {
    SSL *ssl;
    int fd;
    int ended;
    long sent, echoed;
    double sent_at[OUT];
    int have; /* bytes of an incomplete frame in `buffer` */
    unsigned char buffer[ROOM];
};

struct bytes {
    const unsigned char *at;
    int size;
};

/* Where figures go, as many as there is room for. */
struct figures {
    double *at;
    long room, count;
};

struct load {
    SSL_CTX *ctx;
    struct stream **streams;
    int count, polled, epoll;
    struct bytes frames; /* one a step, each `frame_size` long, the same for every stream */
    int frame_size;
    long step;
    struct bytes plain, masked; /* the audio as it stands in a reply */

    double began, rate; /* the schedule: send number n is due at began + n / rate */
    long scheduled;     /* sends since `began` */
    int next;           /* the stream that sends next */

    long wrong; /* replies without the audio that was sent */
    long cut;   /* streams that ended before they were to */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

struct load *load_new(const unsigned char *frames, int frames_size, int frame_size, const unsigned char *plain,
                      const unsigned char *masked, int audio_size)
{
    struct load *load = calloc(1, sizeof *load);
    load->ctx = SSL_CTX_new(TLS_client_method());
    SSL_CTX_ctrl(load->ctx, SSL_CTRL_SET_READ_AHEAD, 1, NULL); /* a record's head and body in one recv */
    /* When a socket takes no more, the next frame, as long as the one that waits, is given in its stead. */
    SSL_CTX_ctrl(load->ctx, SSL_CTRL_MODE, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, NULL);
    load->epoll = epoll_create1(EPOLL_CLOEXEC);
    load->frames = (struct bytes){frames, frames_size};
    load->frame_size = frame_size;
    load->plain = (struct bytes){plain, audio_size};
    load->masked = (struct bytes){masked, audio_size};
    return load;
}

/* Takes a connected, blocking socket, whose descriptor is the load's from now on. Returns the stream, or -1 when the
 * TLS handshake failed. */
int load_open(struct load *load, int fd)
{
    SSL *ssl = SSL_new(load->ctx);
    SSL_set_fd(ssl, fd);
    if (SSL_connect(ssl) != 1) {
        ERR_clear_error();
        SSL_free(ssl);
        close(fd);
        return -1;
    }
    struct stream *stream = calloc(1, sizeof *stream);
    stream->ssl = ssl;
    stream->fd = fd;
    load->streams = realloc(load->streams, (load->count + 1) * sizeof *load->streams);
    load->streams[load->count] = stream;
    return load->count++;
}

/* For what comes before and after the media, on a blocking socket; what OpenSSL returns. */
int load_write(struct load *load, int stream, const void *bytes, int size)
{
    return SSL_write(load->streams[stream]->ssl, bytes, size);
}

int load_read(struct load *load, int stream, void *bytes, int size)
{
    return SSL_read(load->streams[stream]->ssl, bytes, size);
}

static void end(struct load *load, struct stream *stream)
{
    ERR_clear_error();
    epoll_ctl(load->epoll, EPOLL_CTL_DEL, stream->fd, NULL);
    stream->ended = 1;
    load->cut++;
}

static void put(struct figures *figures, double value)
{
    if (figures->count < figures->room)
        figures->at[figures->count++] = value;
}

/* One whole frame; an echo is matched to the oldest frame that is out. */
static void take_frame(struct load *load, struct stream *stream, int first, int is_masked, const unsigned char *text,
                       int size, struct figures *turnarounds)
{
    static const unsigned char closing[] = {0x88, 0x80, 0, 0, 0, 0};
    if (first == 0x88)
        SSL_write(stream->ssl, closing, sizeof closing);
    if (first != 0x81 || stream->echoed == stream->sent)
        return;
    put(turnarounds, now() - stream->sent_at[stream->echoed++ % OUT]);
    struct bytes audio = is_masked ? load->masked : load->plain;
    if (!memmem(text, size, audio.at, audio.size))
        load->wrong++;
}

/* Reads what a stream has, and takes the frames in it (RFC 6455 §5.2; none is longer than 64 KiB). */
static void read_replies(struct load *load, struct stream *stream, struct figures *turnarounds)
{
    do {
        int got = SSL_read(stream->ssl, stream->buffer + stream->have, ROOM - stream->have);
        if (got <= 0) {
            if (SSL_get_error(stream->ssl, got) != SSL_ERROR_WANT_READ)
                end(load, stream);
            return;
        }
        stream->have += got;
        const unsigned char *frame = stream->buffer, *stop = frame + stream->have;
        while (stop - frame >= 2) {
            int is_masked = frame[1] >> 7, size = frame[1] & 0x7f, head = is_masked ? 6 : 2;
            if (size == 126) {
                if (stop - frame < 4)
                    break;
                size = frame[2] << 8 | frame[3];
                head += 2;
            }
            if (stop - frame < head + size)
                break;
            take_frame(load, stream, frame[0], is_masked, frame + head, size, turnarounds);
            frame += head + size;
        }
        stream->have = stop - frame;
        memmove(stream->buffer, frame, stream->have);
    } while (SSL_has_pending(stream->ssl));
}

static void read_ready(struct load *load, int timeout_ms, struct figures *turnarounds)
{
    struct epoll_event ready[BATCH];
    int count = epoll_wait(load->epoll, ready, BATCH, timeout_ms);
    for (int i = 0; i < count; i++)
        read_replies(load, ready[i].data.ptr, turnarounds);
}

/* Sends the frame of the stream whose turn it is. A stream that cannot take it is overloaded: it counts as sent, and so
 * as lost. */
static void send_next(struct load *load, struct figures *lateness)
{
    struct stream *stream = load->streams[load->next];
    double time = now();
    put(lateness, time - load->began - load->scheduled / load->rate);
    if (!stream->ended) {
        stream->sent_at[stream->sent++ % OUT] = time;
        if (SSL_write(stream->ssl, load->frames.at + load->step * load->frame_size, load->frame_size) <= 0)
            ERR_clear_error();
    }
    load->scheduled++;
    if (++load->next == load->count) {
        load->next = 0;
        load->step = (load->step + 1) % (load->frames.size / load->frame_size);
    }
}

/* Spreads the streams evenly over `ptime` seconds, from now on. What a server says before that is no echo of a frame:
 * it is read for a moment, and dropped. */
void load_begin(struct load *load, double ptime)
{
    for (; load->polled < load->count; load->polled++) {
        struct stream *stream = load->streams[load->polled];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = stream};
        fcntl(stream->fd, F_SETFL, fcntl(stream->fd, F_GETFL) | O_NONBLOCK);
        epoll_ctl(load->epoll, EPOLL_CTL_ADD, stream->fd, &event);
    }
    struct figures none = {0};
    for (double until = now() + 0.2; now() < until;)
        read_ready(load, 10, &none);
    load->rate = load->count / ptime;
    load->scheduled = 0;
    load->began = now();
}

/* Sends and reads for some seconds, and on to where every stream has sent as much when `whole`. Writes seconds from
 * send to echo, and seconds by which a send came after its deadline; returns the number of echoes. */
long load_run(struct load *load, double seconds, int whole, double *turnarounds, double *lateness, long room)
{
    struct figures times = {turnarounds, room, 0}, late = {lateness, room, 0};
    double until = now() + seconds;
    for (double time; (time = now()) < until || (whole && load->next);) {
        long due = (long)((time - load->began) * load->rate) - load->scheduled;
        for (int i = 0; i < due && i < BATCH && (time < until || load->next); i++)
            send_next(load, &late);
        read_ready(load, due > BATCH ? 0 : 1, &times);
    }
    return times.count;
}

/* Reads until every frame has been echoed, `seconds` at most; returns how many never were. */
long load_drain(struct load *load, double seconds)
{
    struct figures none = {0};
    double until = now() + seconds;
    for (;;) {
        long out = 0;
        for (int i = 0; i < load->count; i++)
            out += load->streams[i]->sent - load->streams[i]->echoed;
        if (!out || now() >= until)
            return out;
        read_ready(load, 10, &none);
    }
}

/* Reads until the server has closed every stream, `seconds` at most, and forgets them. */
void load_end(struct load *load, double seconds)
{
    struct figures none = {0};
    double until = now() + seconds;
    long cut = load->cut;
    for (int open = 1; open && now() < until;) {
        read_ready(load, 10, &none);
        open = 0;
        for (int i = 0; i < load->count; i++)
            open += !load->streams[i]->ended;
    }
    for (int i = 0; i < load->count; i++) {
        SSL_free(load->streams[i]->ssl);
        close(load->streams[i]->fd);
        free(load->streams[i]);
    }
    load->count = load->polled = 0;
    load->cut = cut;
}

long load_wrong(struct load *load)
{
    return load->wrong;
}

long load_cut(struct load *load)
{
    return load->cut;
}
