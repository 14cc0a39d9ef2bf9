# An SCGI program with SCGI.pm, on the listening socket in descriptor 0: answers with the method, the path, the query and the
# length of the body. The path /die ends the process in the middle of its response, and /short announces a longer body.
use strict;
use warnings;
use IO::Socket::UNIX;
use SCGI;

my $socket = IO::Socket::UNIX->new_from_fd(0, 'r+') or die "no socket: $!";
my $scgi = SCGI->new($socket, blocking => 1);
while (my $request = $scgi->accept) {
    eval { $request->read_env; 1 } or next; # a connection that ended without a request
    my $env = $request->env;
    my ($body, $length) = ('', $env->{CONTENT_LENGTH});
    while (length($body) < $length) {
        read($request->connection, $body, $length - length($body), length($body)) or last;
    }
    my $path = $env->{PATH_INFO};
    my $text = "$env->{REQUEST_METHOD} $path $env->{QUERY_STRING} " . length($body) . "\n";
    my $connection = $request->connection;
    print $connection "Content-Type: text/plain\r\n";
    print $connection 'Content-Length: ', length($text) + ($path eq '/short'), "\r\n" if $path ne '/stream';
    print $connection "\r\n", $text;
    $connection->flush;
    kill 'KILL', $$ if $path eq '/die' || $path eq '/stream';
    $request->close;
}
