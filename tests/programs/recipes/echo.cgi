#!/bin/sh
# A CGI program: answers with the method, the path, the query and the length of the body.
length=$(wc -c)
printf 'Content-Type: text/plain\r\n\r\n'
printf '%s %s %s %d\n' "$REQUEST_METHOD" "$PATH_INFO" "$QUERY_STRING" "$length"
