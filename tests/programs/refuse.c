/* Runs a program for which system calls do not exist:
 *
 *     refuse ERRNO NUMBER... -- PROGRAM [ARGUMENT...]
 *
 * Each call NUMBER fails with ERRNO, in the program and in all its descendants.
 *
 * cc -o refuse refuse.c */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sock_filter filter[256];
    unsigned short length = 0;
    int error = argc > 1 ? atoi(argv[1]) : 0, at;

    filter[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (at = 2; at < argc && strcmp(argv[at], "--") != 0 && length < 250; at++) {
        filter[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)atoi(argv[at]), 0, 1);
        filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error);
    }
    filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    if (error <= 0 || at + 1 >= argc || strcmp(argv[at], "--") != 0) {
        fprintf(stderr, "usage: refuse ERRNO NUMBER... -- PROGRAM [ARGUMENT...]\n");
        return 2;
    }
    struct sock_fprog program = {length, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        perror("refuse: seccomp");
        return 2;
    }
    execv(argv[at + 1], argv + at + 1);
    perror("refuse: exec");
    return 127;
}
