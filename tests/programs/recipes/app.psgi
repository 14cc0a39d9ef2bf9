# A PSGI application: answers with the method, the path, the query and the length of the body.
use strict;
use warnings;

sub {
    my $env = shift;
    my ($body, $length) = ('', $env->{CONTENT_LENGTH} || 0);
    while (length($body) < $length) {
        $env->{'psgi.input'}->read($body, $length - length($body), length($body)) or last;
    }
    my $text = "$env->{REQUEST_METHOD} $env->{PATH_INFO} $env->{QUERY_STRING} " . length($body) . "\n";
    return [200, ['Content-Type' => 'text/plain', 'Content-Length' => length($text)], [$text]];
};
