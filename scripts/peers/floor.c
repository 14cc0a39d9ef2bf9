/* The baseline for comparisons: the minimum work of prefork workers on epoll for a request.
 *
 *   floor fastcgi WORKERS SIZE PATH     on a Unix socket
 *   floor http WORKERS SIZE             on a free port of loopback
 *
 * The program prints its address when it is listening. The program checks only where a request ends and whether its connection
 * stays open. The response is always the same SIZE bytes, which are prepared before the first fork, so a request takes one recv
 * and one send. The program supports only the benchmark's client, which sends each request in one write and reads each
 * response. A connection with a partial request is closed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BEGIN_REQUEST = 1, END_REQUEST = 3, STDIN = 5, STDOUT = 6, KEEP_CONN = 1, HEADER = 8 }; /* FastCGI 1.0, 8 */
enum { REQUEST_MAX = 16384, BODY_MAX = 65000, WORKERS_MAX = 1024, EVENTS = 64, ACCEPTS = 16, LEFT_MS = 1 };

struct connection {
    int fd;
    bool polled; /* registered with epoll */
};
struct request {
    size_t length; /* 0: incomplete */
    bool keep;
    unsigned char id[2];
};

static bool http;
static int workers, listener, poller;
static unsigned char response[BODY_MAX + 512];
static size_t response_len, end_at; /* FastCGI: where the last two records start */
static volatile int *connections;   /* per worker, in shared memory */
static pid_t pids[WORKERS_MAX];

static void die(const char *what) { perror(what); exit(1); }

/* ---- the protocols ---- */

static void put(const void *bytes, size_t n) { memcpy(response + response_len, bytes, n); response_len += n; }

static void put_record(int type, size_t length) {
    put((unsigned char[HEADER]){1, type, 0, 1, length >> 8, length & 255, 0, 0}, HEADER);
}

static void make_response(size_t size) {
    char head[128];
    int n = snprintf(head, sizeof head, "%sContent-Type: text/plain\r\nContent-Length: %zu\r\n\r\n",
                     http ? "HTTP/1.1 200 OK\r\n" : "", size);

    if (!http)
        put_record(STDOUT, n + size);
    put(head, n);
    for (size_t i = 0; i < size; i++)
        put(&"Hello, world\n"[i % 13], 1);
    end_at = response_len;
    if (!http) {
        put_record(STDOUT, 0);
        put_record(END_REQUEST, 8);
        put((char[8]){0}, 8); /* REQUEST_COMPLETE, appStatus 0 */
    }
}

static struct request http_request(const char *bytes, size_t n) {
    const char *end = memmem(bytes, n, "\r\n\r\n", 4);

    if (!end)
        return (struct request){0};
    bool close = memmem(bytes, end + 2 - bytes, "\r\nConnection: close\r\n", 21);
    return (struct request){.length = end + 4 - bytes, .keep = !close};
}

/* A request ends with the empty record of its STDIN. */
static struct request fastcgi_request(const unsigned char *bytes, size_t n) {
    struct request request = {0};

    for (size_t at = 0; at + HEADER <= n;) {
        const unsigned char *record = bytes + at;
        size_t length = record[4] << 8 | record[5];

        at += HEADER + length + record[6];
        if (at > n)
            break;
        if (record[1] == BEGIN_REQUEST && length == 8)
            request.keep = record[HEADER + 2] & KEEP_CONN;
        if (record[1] == STDIN && length == 0) {
            memcpy(request.id, record + 2, 2);
            request.length = at;
            break;
        }
    }
    return request;
}

/* ---- a connection; the functions return false if it is closed ---- */

static bool answer(int fd, const struct request *request) {
    const size_t records[] = {0, end_at, end_at + HEADER};

    for (size_t i = 0; !http && i < 3; i++)
        memcpy(response + records[i] + 2, request->id, 2);
    for (size_t sent = 0; sent < response_len;) {
        ssize_t n = send(fd, response + sent, response_len - sent, MSG_NOSIGNAL);

        if (n >= 0)
            sent += n;
        else if (errno != EAGAIN || poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1) < 0)
            return false;
    }
    return true;
}

static bool serve(int fd) {
    static char buffer[REQUEST_MAX]; /* shared by all connections, so it stays in the CPU's cache */
    ssize_t n = recv(fd, buffer, sizeof buffer, 0);
    struct request request;

    if (n <= 0)
        return n < 0 && errno == EAGAIN;
    for (char *at = buffer; n > 0; at += request.length, n -= request.length) {
        request = http ? http_request(at, n) : fastcgi_request((unsigned char *)at, n);
        if (request.length == 0 || !answer(fd, &request) || !request.keep)
            return false;
    }
    return true;
}

/* ---- a worker ---- */

/* Balances keep-alive connections: a worker that has over an eighth more connections than some other worker accepts no new ones. */
static bool has_enough(int me) {
    int mine = connections[me], fewest = mine;

    for (int i = 0; mine > 0 && i < workers; i++)
        if (connections[i] < fewest)
            fewest = connections[i];
    return mine > fewest + mine / 8;
}

static void control(int operation, int fd, unsigned events, void *what) {
    if (epoll_ctl(poller, operation, fd, &(struct epoll_event){.events = events, .data.ptr = what}) < 0)
        die("floor: epoll_ctl");
}

static void advance(struct connection *c, int me) {
    if (!serve(c->fd)) {
        close(c->fd);
        free(c);
        connections[me]--;
    } else if (!c->polled) {
        control(EPOLL_CTL_ADD, c->fd, EPOLLIN, c);
        c->polled = true;
    }
}

/* The request on a new connection has usually arrived already, so it is read immediately. */
static void welcome(int me) {
    for (int i = 0; i < ACCEPTS && !has_enough(me); i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (fd < 0 && (errno == EAGAIN || errno == ECONNABORTED))
            return;
        struct connection *c = fd < 0 ? NULL : calloc(1, sizeof *c);
        if (!c)
            die("floor: accept");
        c->fd = fd;
        connections[me]++;
        advance(c, me);
    }
}

static void work(int me) {
    struct epoll_event events[EVENTS];
    bool listens = false;

    poller = epoll_create1(EPOLL_CLOEXEC);
    for (;;) {
        if (listens == has_enough(me)) {
            listens = !listens;
            control(listens ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, listener, EPOLLIN | EPOLLEXCLUSIVE, NULL);
        }
        int n = epoll_wait(poller, events, EVENTS, listens ? -1 : LEFT_MS);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr)
                advance(events[i].data.ptr, me);
            else
                welcome(me);
        }
    }
}

/* ---- the master ---- */

static void listen_at(const char *path) {
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr *address = http ? (struct sockaddr *)&loopback : (struct sockaddr *)&local;
    socklen_t length = http ? sizeof loopback : sizeof local;

    if (!http && (size_t)snprintf(local.sun_path, sizeof local.sun_path, "%s", path) >= sizeof local.sun_path)
        errno = ENAMETOOLONG, die(path);
    listener = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (http) /* inherited by the connections */
        setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    if (bind(listener, address, length) < 0 || listen(listener, 1024) < 0 ||
        getsockname(listener, address, &length) < 0)
        die("floor: listen");
    if (http)
        printf("listening http:127.0.0.1:%d\n", ntohs(loopback.sin_port));
    else
        printf("listening fastcgi:unix:%s\n", path);
    fflush(stdout);
}

static void stop(int signal) {
    (void)signal;
    for (int i = 0; i < workers; i++)
        kill(pids[i], SIGKILL);
    while (wait(NULL) > 0)
        continue;
    _exit(0);
}

int main(int argc, char **argv) {
    http = argc == 4 && strcmp(argv[1], "http") == 0;
    workers = argc < 4 ? 0 : atoi(argv[2]);
    int size = argc < 4 ? 0 : atoi(argv[3]);
    if ((!http && (argc != 5 || strcmp(argv[1], "fastcgi") != 0)) || workers < 1 || workers > WORKERS_MAX || size < 0 ||
        size > BODY_MAX) {
        fputs("usage: floor fastcgi WORKERS SIZE PATH, or floor http WORKERS SIZE\n", stderr);
        return 2;
    }
    connections = mmap(NULL, workers * sizeof *connections, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (connections == MAP_FAILED)
        die("floor: mmap");
    make_response(size);
    listen_at(argv[4]);
    pid_t master = getpid();
    for (int i = 0; i < workers; i++) {
        if ((pids[i] = fork()) < 0)
            die("floor: fork");
        if (pids[i] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() == master)
                work(i);
            _exit(1);
        }
    }
    signal(SIGTERM, stop);
    wait(NULL); /* no worker exits by itself; all die with the master */
    fputs("floor: a worker died\n", stderr);
    return 1;
}
