<?php
// A page that starts other programs, for the tests. The query selects the program.
header('Content-Type: text/plain');
$name = $_GET['name'] ?? '';
switch ($_GET['do'] ?? '') {
    case 'wait':
        // Waits for a program that writes its pid and then waits for a line from a FIFO.
        exec("echo $$ > $name.in; read line < $name.gate; echo picture made", $output, $status);
        echo "status=$status out=", implode(',', $output), "\n";
        break;
    case 'wait-itself':
        touch("$name.in");
        while (!file_exists("$name.go")) {
            usleep(2000);
        }
        echo "waited\n";
        break;
    case 'background':
        echo exec('sleep 600 > /dev/null 2>&1 & echo $!'), "\n";
        break;
    case 'session':
        // The program has the listening socket as its standard input.
        exec("setsid -f sh -c 'echo $$ > $name; exec sleep 600' > /dev/null 2>&1");
        echo "started\n";
        break;
    case 'non-blocking':
        // ssh and event loops also make their standard input non-blocking.
        echo shell_exec("perl -e 'use Fcntl; fcntl(STDIN, F_SETFL, fcntl(STDIN, F_GETFL, 0) | O_NONBLOCK) or die'; echo done");
        break;
    case 'shutdown':
        echo shell_exec("perl -e 'shutdown(STDIN, 2) or die'; echo done");
        break;
    case 'pid':
        echo getmypid(), "\n";
        break;
}
