<?php
// The front controller of the tests of gateways. The path selects the page, and the query names files in FAULTY_DIR.
// The pages that examples/faulty.rs has too behave in the same way.
header('Content-Type: text/plain');
$file = getenv('FAULTY_DIR') . '/' . ($_SERVER['QUERY_STRING'] ?? '');
switch ($_SERVER['PATH_INFO'] ?? parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH)) {
    case '/pid':
        echo getmypid(), "\n";
        break;
    case '/length':
        // The MD5 detects a body of the right length with wrong bytes.
        $body = file_get_contents('php://input');
        echo strlen($body), ' ', md5($body), "\n";
        break;
    case '/params':
        foreach ($_SERVER as $name => $value) {
            if (is_string($value)) {
                echo "$name=$value\n";
            }
        }
        break;
    case '/large':
        echo str_repeat('x', (int) $_SERVER['QUERY_STRING']);
        break;
    case '/redirect':
        header('Location: /elsewhere?a=1', true, 303);
        break;
    case '/cookies':
        setcookie('first', 'a b');
        setcookie('second', '2', ['httponly' => true]);
        echo json_encode($_COOKIE), "\n";
        break;
    case '/once':
        // Counts the executions of a request: each one creates another file.
        for ($count = 1; !@fopen("$file.$count", 'x'); $count++);
        echo "$count\n";
        break;
    case '/die':
        // Counts like /once, but then the process kills itself.
        for ($count = 1; !@fopen("$file.$count", 'x'); $count++);
        posix_kill(getmypid(), 9);
        break;
    case '/hold':
        // Creates a file with the pid of the process, and answers when the test has created another one.
        file_put_contents("$file.new", getmypid());
        rename("$file.new", "$file.in");
        while (!file_exists("$file.go")) {
            usleep(2000);
            clearstatcache();
        }
        echo "held\n";
        break;
    case '/shared':
        // The result of a counter in APCu, the pid, and whether opcache has this script.
        echo apcu_inc('count'), ' ', getmypid(), ' ', (int) opcache_is_script_cached(__FILE__), "\n";
        break;
    case '/segv':
        posix_kill(getmypid(), 11); // SIGSEGV
        break;
    default:
        http_response_code(404);
        echo "no such page\n";
}
