/* A FastCGI program on libfcgi: answers with the method, the path, the query and the length of the body. */
#include <fcgi_stdio.h>
#include <stdlib.h>

static const char *variable(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

int main(void) {
    while (FCGI_Accept() >= 0) {
        long length = 0;
        while (getchar() != EOF)
            length++;
        printf("Content-Type: text/plain\r\n\r\n");
        printf("%s %s %s %ld\n", variable("REQUEST_METHOD"), variable("PATH_INFO"), variable("QUERY_STRING"), length);
    }
    return 0;
}
