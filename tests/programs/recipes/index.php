<?php
// A front controller: answers with the method, the path, the query and the length of the body.
header('Content-Type: text/plain');
$path = explode('?', $_SERVER['REQUEST_URI'])[0];
$length = strlen(file_get_contents('php://input'));
echo "{$_SERVER['REQUEST_METHOD']} $path {$_SERVER['QUERY_STRING']} $length\n";
