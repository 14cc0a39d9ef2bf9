# An SCGI program with the pages of examples/faulty.rs that the load of tests/common/gateway.rs requests.
use strict;
use warnings;
use Fcntl;
use IO::Socket::UNIX;
use SCGI;

# Counts the executions of a request: each one creates another file.
sub once {
    my ($name) = @_;
    for (my $count = 1; ; $count++) {
        my $path = "$ENV{FAULTY_DIR}/$name.$count";
        if (sysopen(my $file, $path, O_CREAT | O_EXCL | O_WRONLY)) { return "$count\n"; }
        die "$path: $!" unless $!{EEXIST};
    }
}

my %pages = (
    '/pid' => sub { "$$\n" },
    '/large' => sub { 'x' x $_[0] },
    '/once' => \&once,
);

my $socket = IO::Socket::UNIX->new_from_fd(0, 'r+') or die "no socket: $!";
my $scgi = SCGI->new($socket, blocking => 1);
while (my $request = $scgi->accept) {
    eval { $request->read_env; 1 } or next; # a connection that ended without a request
    my ($path, $query) = split /\?/, $request->env->{REQUEST_URI};
    my $page = $pages{$path};
    my $text = $page ? $page->($query) : "no such page\n";
    my $status = $page ? '200 OK' : '404 Not Found';
    my $connection = $request->connection;
    print $connection "Status: $status\r\nContent-Type: text/plain\r\nContent-Length: ", length($text), "\r\n\r\n", $text;
    $connection->flush;
    $request->close;
}
