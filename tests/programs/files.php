<?php
// The front controller of the tests of files. The query names the headers of the response, in JSON.
$wish = json_decode(urldecode($_SERVER['QUERY_STRING'] ?? ''), true) ?: [];
foreach ($wish['headers'] ?? [] as [$name, $value]) {
    header("$name: $value", false);
}
http_response_code($wish['status'] ?? 200);
if (!isset($wish['quiet'])) {
    echo 'application ', $_SERVER['REQUEST_METHOD'], ' ', $_SERVER['REQUEST_URI'], "\n";
    foreach ($_SERVER as $name => $value) {
        if (str_starts_with($name, 'HTTP_X')) {
            echo "$name=$value\n";
        }
    }
}
