# A FastCGI program with FCGI.pm: answers with the method, the path, the query and the length of the body.
use strict;
use warnings;
use FCGI;

my $request = FCGI::Request();
while ($request->Accept() >= 0) {
    my ($body, $length) = ('', $ENV{CONTENT_LENGTH} || 0);
    read(STDIN, $body, $length) if $length;
    print "Content-Type: text/plain\r\n\r\n";
    print "$ENV{REQUEST_METHOD} $ENV{PATH_INFO} $ENV{QUERY_STRING} ", length($body), "\n";
}
