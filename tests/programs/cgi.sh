#!/bin/sh
# A CGI program for tests. FAULTY_DIR is a directory for its files.
head() { printf 'Content-Type: text/plain\r\n\r\n'; }
case $PATH_INFO in
/echo) head; exec cat ;;
/env) head; env ;;
/limits) head; pwd; ulimit -n; nice; id -u ;;
/ignore) head; echo ignored ;;
/stderr) printf 'one\ntwo' >&2; head; echo done ;;
/fail) echo failing >&2; exit 3 ;;
/status) printf 'Status: 404 Not Found\r\n'; head; echo no; exit 1 ;;
/segv) kill -SEGV $$ ;;
/half) head; dd if=/dev/zero bs=1000 count=100 2>/dev/null; kill -SEGV $$ ;;
/hang) echo $$ >"$FAULTY_DIR/hang"; sleep 600 & wait ;;
/behind) head; echo begun; sleep 600 & echo $! >"$FAULTY_DIR/behind" ;;
/none) ;;
*) head; echo "$PATH_INFO" ;;
esac
