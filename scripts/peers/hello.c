/* A plain FastCGI program in C, on libfcgi: one request and one connection at a time.
 *
 *   /hello  13 bytes       /page  16 KiB from memory       anything else  404
 *
 * cc -O2 -o hello hello.c -lfcgi;  spawn-fcgi -n -s hello.sock -- /usr/bin/multiwatch -f 2 -- ./hello
 */
#include <fcgiapp.h>
#include <string.h>

#define PAGE_LEN 16384

static const char hello[] = "Hello, world\n";
static char page[PAGE_LEN];

static void answer(FCGX_Stream *out, const char *body, int length) {
    FCGX_FPrintF(out, "Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n", length);
    FCGX_PutStr(body, length, out);
}

int main(void) {
    FCGX_Request request;

    for (int i = 0; i < PAGE_LEN; i++)
        page[i] = i % 64 == 63 ? '\n' : (char)('a' + i % 26);
    if (FCGX_Init() != 0 || FCGX_InitRequest(&request, 0, 0) != 0)
        return 1;
    while (FCGX_Accept_r(&request) >= 0) {
        const char *path = FCGX_GetParam("SCRIPT_NAME", request.envp);

        if (path && strcmp(path, "/hello") == 0)
            answer(request.out, hello, sizeof hello - 1);
        else if (path && strcmp(path, "/page") == 0)
            answer(request.out, page, PAGE_LEN);
        else
            FCGX_PutS("Status: 404 Not Found\r\nContent-Type: text/plain\r\n\r\nno such page\n", request.out);
        FCGX_Finish_r(&request);
    }
    return 0;
}
