<?php
// Fills APCu and times its operations from within, as src/get/measure.rs does for the other competitors.
//
// Arguments: a file with all keys of 38 bytes, a file with the sequence of their indices in 32 bits each, and the size of a value. First
// prints "ok FORKS EMPTY_LOOP_NS". Then, for each input line "WORK MILLISECONDS START PROCESSES", prints one line for each process (two
// processes if this PHP can fork): "ok NS KEPT DROPPED OPERATIONS MISSES". Nothing is subtracted from the times.

const KEY_LEN = 38;
const WINDOW_NS = 2_000_000;
const LEAST_CPU = 0.95;
const LEAST_WINDOWS = 10;
const MOST_TIMES = 4;

if (!function_exists('apcu_fetch') || !apcu_enabled()) {
    echo "missing php-apcu\n";
    exit;
}

[, $keys_file, $sequence_file, $size] = $argv;
$keys = str_split(file_get_contents($keys_file), KEY_LEN);
$sequence = array_values(unpack('V*', file_get_contents($sequence_file)));
$mask = count($sequence) - 1;
$page = value(0, $size);

fill($keys, $size);
check($keys, $size);
$mate = second_process($keys, $size);
say('ok ' . ($mate === null ? 0 : 1) . ' ' . empty_loop_ns($keys, $sequence, $mask));

while (($line = fgets(STDIN)) !== false) {
    [$work, $milliseconds, $start, $processes] = explode(' ', trim($line));
    if ($processes > 1) {
        fwrite($mate, $line);
    }
    say(measure($work, $milliseconds, (int) $start));
    if ($processes > 1) {
        say(trim(fgets($mate)));
    }
}

// Forks a process that also measures, at a different position in the sequence. Returns the connection to it, or null without fork.
function second_process(array $keys, int $size)
{
    global $sequence;
    if (!function_exists('pcntl_fork') || !function_exists('posix_kill')) {
        return null;
    }
    [$ours, $theirs] = stream_socket_pair(STREAM_PF_UNIX, STREAM_SOCK_STREAM, 0);
    if (pcntl_fork() !== 0) {
        fclose($theirs);
        return $ours;
    }
    fclose($ours);
    check($keys, $size); // reading maps the memory into this process
    while (($line = fgets($theirs)) !== false) {
        [$work, $milliseconds, $start] = explode(' ', trim($line));
        fwrite($theirs, measure($work, $milliseconds, (int) $start + intdiv(count($sequence), 2)) . "\n");
    }
    posix_kill(getmypid(), SIGKILL); // no cleanup: the resources belong to the other process
}

function say(string $line): void
{
    fwrite(STDOUT, $line . "\n");
}

function fill(array $keys, int $size): void
{
    foreach ($keys as $index => $key) {
        apcu_store($key, value($index, $size));
    }
}

function check(array $keys, int $size): void
{
    foreach ($keys as $index => $key) {
        if (apcu_fetch($key) !== value($index, $size)) {
            say("error APCu has not kept the value of $key");
            exit(1);
        }
    }
}

function value(int $index, int $size): string
{
    return str_repeat(pack('P', $index), intdiv($size, 8));
}

function measure(string $work, int $milliseconds, int $at): string
{
    global $keys, $sequence, $mask, $page;
    $misses = 0;
    $go = $work === 'mix'
        ? function (int $operations) use ($keys, $sequence, $mask, $page, &$at, &$misses): void {
            mixed($keys, $sequence, $mask, $page, $at, $operations, $misses);
        }
        : function (int $operations) use ($keys, $sequence, $mask, &$at, &$misses): void {
            reading($keys, $sequence, $mask, $at, $operations, $misses);
        };

    $operations = 16;
    for ($began = hrtime(true); ; ) {
        $window = hrtime(true);
        $go($operations);
        $took = hrtime(true) - $window;
        if ($took < WINDOW_NS / 2) {
            $operations *= 2;
        } elseif (hrtime(true) - $began >= $milliseconds * 250_000) {
            break;
        } elseif ($took > WINDOW_NS * 2) {
            $operations = max(1, intdiv($operations, 2));
        }
    }

    $misses = $dropped = $done = 0;
    $windows = [];
    $time = $milliseconds * 1_000_000;
    for ($began = hrtime(true); ($passed = hrtime(true) - $began) < $time
        || (count($windows) < LEAST_WINDOWS && $passed < $time * MOST_TIMES); ) {
        [$cpu, $sleeps] = used();
        $window = hrtime(true);
        $go($operations);
        $took = hrtime(true) - $window;
        [$cpu_after, $sleeps_after] = used();
        $done += $operations;
        if ($sleeps_after > $sleeps || $cpu_after - $cpu >= $took * LEAST_CPU) {
            $windows[] = $took / $operations;
        } else {
            $dropped++;
        }
    }
    return 'ok ' . median($windows) . ' ' . count($windows) . " $dropped $done $misses";
}

function reading(array $keys, array $sequence, int $mask, int &$place, int $operations, int &$missed): void
{
    $at = $place;
    $misses = 0;
    for ($turn = 0; $turn < $operations; $turn++) {
        $value = apcu_fetch($keys[$sequence[$at++ & $mask]]);
        if ($value === false) {
            $misses++;
        }
    }
    $place = $at;
    $missed += $misses;
}

// One operation in ten stores a value. A value that is missing is also stored.
function mixed(
    array $keys, array $sequence, int $mask, string $page, int &$place, int $operations, int &$missed
): void {
    $at = $place;
    $misses = 0;
    for ($turn = 0; $turn < $operations; $turn++) {
        $key = $keys[$sequence[$at++ & $mask]];
        if ($turn % 10 === 9) {
            apcu_store($key, $page);
        } elseif (apcu_fetch($key) === false) {
            $misses++;
            apcu_store($key, $page);
        }
    }
    $place = $at;
    $missed += $misses;
}

// Returns the time of one iteration of the loop in reading() without APCu.
function empty_loop_ns(array $keys, array $sequence, int $mask): float
{
    $times = [];
    for ($round = 0; $round < 20; $round++) {
        $at = 0;
        $misses = 0;
        $began = hrtime(true);
        for ($turn = 0; $turn < 20_000; $turn++) {
            $value = $keys[$sequence[$at++ & $mask]];
            if ($value === false) {
                $misses++;
            }
        }
        $times[] = (hrtime(true) - $began) / 20_000;
    }
    return median($times);
}

// Returns the CPU time in ns, and the number of times that this process went to sleep.
function used(): array
{
    $usage = getrusage();
    $micros = ($usage['ru_utime.tv_sec'] + $usage['ru_stime.tv_sec']) * 1_000_000
        + $usage['ru_utime.tv_usec'] + $usage['ru_stime.tv_usec'];
    return [$micros * 1000, $usage['ru_nvcsw']];
}

function median(array $values): float
{
    sort($values);
    $count = count($values);
    if ($count === 0) {
        return 0;
    }
    return ($values[intdiv($count - 1, 2)] + $values[intdiv($count, 2)]) / 2;
}
