<?php
// The front controller of the tests of event streams behind gateways. The query is `topic=TOPIC`.
$path = parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH);
$topic = $_GET['topic'] ?? '';
switch ($path) {
    case '/pid':
        echo getmypid(), "\n";
        break;
    case '/publish':
        // Publishes the body of the request.
        $events = stream_socket_client('udg://' . getenv('FORKYARD_EVENTS'));
        $data = file_get_contents('php://input');
        echo stream_socket_sendto($events, "$topic\nfrom-php\n$data") > 0 ? "published\n" : "not published\n";
        break;
    case '/subscribe':
        header("X-Forkyard-Subscribe: $topic");
        setcookie('visitor', '7');
        header('Cache-Control: public, max-age=600');
        header('X-Own: kept');
        echo "this text is not sent\n";
        break;
    case '/two-lines':
        header('X-Forkyard-Subscribe: a');
        header('X-Forkyard-Subscribe: b', false);
        break;
    case '/not-found':
        http_response_code(404);
        header('X-Forkyard-Subscribe: a');
        break;
    case '/works-on':
        // Hands the client over, and continues to work until the test creates a file.
        header('X-Forkyard-Subscribe: a');
        echo str_repeat('x', 100000);
        flush();
        while (!file_exists(getenv('FAULTY_DIR') . '/go')) {
            usleep(2000);
            clearstatcache();
        }
        break;
    default:
        http_response_code(404);
        echo "no such page\n";
}
