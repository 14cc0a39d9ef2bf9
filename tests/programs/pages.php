<?php
// A script for php-cgi, for the tests. The query selects the action.
header('Content-Type: text/plain');
switch ($_GET['do'] ?? '') {
    case 'add':
        echo $_GET['a'] + $_GET['b'], "\n";
        break;
    case 'length':
        // The MD5 detects a body of the right length with wrong bytes.
        $body = file_get_contents('php://input');
        echo strlen($body), ' ', md5($body), "\n";
        break;
    case 'environment':
        foreach (['FORKYARD_SLOT', 'FORKYARD_GENERATION', 'PHP_FCGI_CHILDREN'] as $name) {
            echo $name, '=', getenv($name, true), "\n";
        }
        echo 'pid=', getmypid(), "\n";
        break;
    case 'complain':
        error_log($_GET['text']);
        echo "complained\n";
        break;
    default:
        http_response_code(404);
        echo "no such page\n";
}
