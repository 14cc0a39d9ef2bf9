/* A FastCGI program on libfcgi, for the tests: one connection at a time, one request on each.
 *
 *   /hello  prints hello          /env     prints its environment, one variable per line
 *   /echo   returns the body      /params  the parameters of the request, one per line
 *   /pid    prints its pid        /abort   kills itself with SIGABRT
 *
 * On SIGTERM it finishes the current request and exits. It calls accept itself and unblocks the signal only there,
 * because FCGX_Accept_r drops a connection if a signal arrives before the connection's first byte.
 *
 * cc -o hello hello.c -lfcgi
 */
#define _POSIX_C_SOURCE 200809L
#include <fcgiapp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

extern char **environ;

static volatile sig_atomic_t leaving;

static void leave(int signal) {
    (void)signal;
    leaving = 1;
}

static void say_hello(FCGX_Request *request) { FCGX_PutS("Hello, world\n", request->out); }

static void say_pid(FCGX_Request *request) { FCGX_FPrintF(request->out, "%d\n", (int)getpid()); }

static void list(FCGX_Stream *out, char **variables) {
    for (; *variables; variables++)
        FCGX_FPrintF(out, "%s\n", *variables);
}

static void list_environment(FCGX_Request *request) { list(request->out, environ); }

static void list_params(FCGX_Request *request) { list(request->out, request->envp); }

/* Reads the whole body before it writes, because a client may write the whole request before it reads. */
static void echo(FCGX_Request *request) {
    size_t length = 0, room = 4096;
    char *body = malloc(room);
    int got;

    while (body && (got = FCGX_GetStr(body + length, (int)(room - length), request->in)) > 0) {
        length += (size_t)got;
        if (length == room)
            body = realloc(body, room *= 2);
    }
    if (body)
        FCGX_PutStr(body, (int)length, request->out);
    free(body);
}

static void end_badly(FCGX_Request *request) {
    (void)request;
    abort();
}

static const struct {
    const char *path;
    void (*answer)(FCGX_Request *);
} routes[] = {
    {"/hello", say_hello}, {"/echo", echo},  {"/env", list_environment}, {"/params", list_params},
    {"/pid", say_pid},     {"/abort", end_badly},
};

static void answer(FCGX_Request *request) {
    const char *path = FCGX_GetParam("SCRIPT_NAME", request->envp);

    for (size_t i = 0; path && i < sizeof routes / sizeof *routes; i++) {
        if (strcmp(path, routes[i].path) == 0) {
            FCGX_PutS("Status: 200 OK\r\nContent-Type: text/plain\r\n\r\n", request->out);
            routes[i].answer(request);
            return;
        }
    }
    FCGX_PutS("Status: 404 Not Found\r\nContent-Type: text/plain\r\n\r\nno such page\n", request->out);
}

int main(void) {
    struct sigaction on_term = {.sa_handler = leave}; /* without SA_RESTART, so that it interrupts accept */
    sigset_t term;
    FCGX_Request request;

    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    /* There is no listening socket. If a connection is invalid, FCGX_Accept_r returns, and the loop accepts the next one. */
    if (sigaction(SIGTERM, &on_term, NULL) != 0 || FCGX_Init() != 0 || FCGX_InitRequest(&request, -1, 0) != 0)
        return 1;
    for (;;) {
        int connection;

        sigprocmask(SIG_UNBLOCK, &term, NULL);
        if (leaving)
            return 0;
        connection = accept(0, NULL, NULL);
        sigprocmask(SIG_BLOCK, &term, NULL);
        if (connection < 0)
            continue;
        request.ipcFd = connection;
        request.keepConnection = 1; /* otherwise FCGX_Accept_r would begin by closing it */
        if (FCGX_Accept_r(&request) == 0) {
            request.keepConnection = 0;
            answer(&request);
            FCGX_Finish_r(&request);
        }
    }
}
